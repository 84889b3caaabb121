"""Laplace's approximation: a Gaussian over the parameters, from the curvature at the best ones.

With a negative log-likelihood `n L(theta)`, `L` the training loss, and a prior of precision `tau`,

    P = n F + tau I                                                   posterior precision
    log p(D) ~ log p(D | theta) - (tau |theta|^2 - p log tau + logdet P) / 2        evidence
    theta + P^-1/2 e,  e ~ N(0, I)                                    a sample
    J P^-1 J.T                               variance of the outputs of the linearised model

(MacKay 1992; Ritter et al. 2018; Immer et al. 2021, arXiv:2008.08400; Daxberger et al. 2021,
arXiv:2106.14806). All of it is the algebra of the blocks: with Kronecker factors the determinant
needs their eigenvalues alone, so that a prior is fitted without another look at the data.

Shapes: p = parameters that have a posterior, k = samples, N = examples, C = outputs of one.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami._words import nearest_few
from matrigami.curvature._each import Observer, vectors
from matrigami.curvature._influence import refuse_other_sizes
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._objective import trainable
from matrigami.curvature._tape import unwrapped
from matrigami.operators import LinearOperator, eigh, power, scale, shift, solve

NEGATIVE = 1e-5
"""An eigenvalue below minus this share of the largest is no rounding error."""

LARGEST = 60.0
"""The logarithm of the largest prior precision that is looked for, and of one over the least."""

HALVINGS = 100
"""Of the interval of the logarithm: to the last bit."""

ENTRIES = 2**24
"""Numbers of Jacobians that are held at once."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The outputs of the linearised model under the posterior.

    Attributes:
        mean: The outputs of the model itself.
        covariance: Of the outputs of each example.
    """

    mean: Float[Tensor, "N C"]
    covariance: Float[Tensor, "N C C"]

    @property
    def probabilities(self) -> Float[Tensor, "N C"]:
        """Of classes, by the probit approximation; of one logit, that of the label 1.

        Each logit is divided by `sqrt(1 + pi variance / 8)` (MacKay 1992; for several classes
        Gibbs 1997).
        """
        variance = self.covariance.diagonal(0, -2, -1)
        logits = self.mean / (1 + math.pi / 8 * variance).sqrt()
        return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    """A Gaussian over some parameters of a model; made by `laplace`.

    Attributes:
        model: The model; its parameters are the mean.
        curvature: `n F` of the parameters, in their order.
        eigenvalues: Those of `curvature`.
        mean: The parameters as a vector.
        prior: Precision of the prior.
        sizes: Names and shapes of the parameters.
    """

    model: nn.Module
    curvature: LinearOperator
    eigenvalues: Float[Tensor, " p"]
    mean: Float[Tensor, " p"]
    prior: Float[Tensor, ""]
    sizes: Mapping[str, tuple[int, ...]]

    @property
    def precision(self) -> LinearOperator:
        """`P = n F + tau I`: a matrix, with `solve`, `logdet`, `power`, `diagonal`."""
        return shift(self.curvature, self.prior)

    def evidence(self, log_likelihood: Tensor | float) -> Float[Tensor, ""]:
        """The logarithm of the marginal likelihood; it has derivatives in `prior` and `n`.

        Args:
            log_likelihood: `log p(D | theta)` of all training data at the mean, with its constants
                if evidences of different likelihoods are compared.
        """
        tau, p = self.prior, len(self.mean)
        known = tau * self.mean.square().sum() - p * tau.log()
        return log_likelihood - (known + (self.eigenvalues + tau).log().sum()) / 2

    @property
    def effective(self) -> Float[Tensor, ""]:
        """How many parameters the data determine: `sum lambda / (lambda + tau)`."""
        return (self.eigenvalues / (self.eigenvalues + self.prior)).sum()

    def fitted(self) -> "LaplacePosterior":
        """With the prior of the largest evidence, `tau |theta|^2 = sum lambda / (lambda + tau)`.

        That is where its derivative in `log tau` is zero; it falls in `log tau`, so the interval is
        halved.

        Raises:
            ValueError: If all parameters are zero.
        """
        size = self.mean.square().sum()
        if not size > 0:
            raise ValueError(
                "laplace(...).fitted(): all parameters are zero, which no prior is too narrow for."
                "\nTrain the model first."
            )
        low, high = (torch.full_like(size, s * LARGEST) for s in (-1, 1))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tau = middle.exp()
            rises = (self.eigenvalues / (self.eigenvalues + tau)).sum() > tau * size
            low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
        return replace(self, prior=((low + high) / 2).exp())

    def samples(
        self, k: int, generator: torch.Generator | None = None
    ) -> dict[str, Float[Tensor, "k ..."]]:
        """Parameters drawn from the posterior, by name, for `torch.func.functional_call`."""
        like = self.mean
        noise = torch.randn(len(like), k, generator=generator, dtype=like.dtype, device=like.device)
        drawn = (like[:, None] + power(self.precision, -0.5) @ noise).mT
        parts = drawn.split([math.prod(shape) for shape in self.sizes.values()], 1)
        return {
            name: part.view(k, *shape)
            for (name, shape), part in zip(self.sizes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def predict(self, inputs: Any) -> Prediction:
        """The outputs of the model, linearised in its parameters, with their covariance.

        One backward pass for each output of an example, all examples together.

        Args:
            inputs: One batch.

        Raises:
            ValueError: If the outputs are not `(N, C)`, or those of one example depend on others.
        """
        seen = Observer(self.model, self.sizes)(inputs)
        outputs = seen.outputs.detach()
        if outputs.ndim != 2:
            raise ValueError(
                f"laplace(...).predict: the outputs are {tuple(outputs.shape)}.\n"
                "They should be (N, C): wrap the model in one that returns those that matter."
            )
        (N, C), P = outputs.shape, self.precision
        columns = torch.eye(C).to(outputs)[:, None].expand(C, N, C)
        blocks = seen.pulled(columns)
        J = vectors(blocks, self.sizes)  # (p, N C)
        found = []
        for part in J.split(max(1, ENTRIES // (len(J) * C)) * C, 1):
            some, solved = (t.mT.unflatten(0, (-1, C)) for t in (part, solve(P, part)))
            found.append(some @ solved.mT)
        return Prediction(outputs, torch.cat(found))


def laplace(
    F: LinearOperator,
    model: nn.Module,
    n: float | Tensor,
    *,
    prior: float | Tensor = 1.0,
    only: str | None = None,
) -> LaplacePosterior:
    """The Gaussian posterior of a trained model.

    Args:
        F: The curvature of the training loss at the trained parameters: of `kfac`, `ekfac`, `kfoc`,
            or any matrix over all trainable parameters.
        model: The trained model.
        n: What makes the loss the negative log-likelihood: for a mean cross-entropy the number of
            its terms, for a mean squared error their number over `2 sigma^2`, for sums 1 or
            `1 / (2 sigma^2)`.
        prior: Precision of the Gaussian prior, of mean zero; `n` times twice the weight decay.
        only: A pattern such as `head.*` of the parameters that have a posterior, all others stay as
            they are; of `F` the blocks of these are taken. Another way is to freeze the others
            before `F` is made.

    Raises:
        ValueError: If the curvature is of other parameters or has negative eigenvalues, or the
            pattern fits none.

    Examples:
        >>> from matrigami.curvature import kfac
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.1]])
        >>> model, loss = nn.Linear(1, 1, bias=False), nn.MSELoss()
        >>> posterior = laplace(kfac(model, loss, (x, y)), model, 2 / (2 * 0.1**2), prior=1.0)
        >>> posterior.precision.dense()  # x.T x / sigma^2 + tau
        tensor([[501.]])
    """
    inner = unwrapped(model)
    at = trainable(inner)
    refuse_other_sizes("laplace", F, {name: tuple(p.shape) for name, p in at.items()})
    if only is not None:
        F = _restricted(F, only)
        at = {name: at[name] for name in F.order}
    values = eigh(F).values
    if float(values.amin()) < -NEGATIVE * float(values.abs().amax()):
        raise ValueError(
            f"laplace(F, model, n): F has the eigenvalue {float(values.amin()):.2g}.\n"
            "A Gaussian has a positive semi-definite one: that of kfac, ggn or fisher."
        )
    values = values.clamp_min(0)
    tau = torch.as_tensor(prior, dtype=values.dtype, device=values.device)
    if not bool((tau > 0).all()):
        raise ValueError(f"laplace(prior={prior}): the precision of a prior is above 0.")
    many = torch.as_tensor(n, dtype=values.dtype, device=values.device)
    return LaplacePosterior(
        inner,
        scale(F, many),
        many * values,
        torch.cat([p.flatten() for p in at.values()]).to(values),
        tau,
        {name: tuple(p.shape) for name, p in at.items()},
    )


def _restricted(F: LinearOperator, only: str) -> CurvatureMatrix:
    """The blocks of some parameters."""
    if not isinstance(F, CurvatureMatrix):
        raise ValueError(
            f"laplace(only={only!r}): F is a {type(F).__name__}, which has no blocks.\n"
            "Freeze the other parameters before F is made."
        )
    every = zip(F.blocks, F.names, F.shapes, strict=True)
    kept = [block for block in every if all(fnmatch(name, only) for name in block[1])]
    if not kept:
        near = nearest_few(only, F.order)
        raise ValueError(f"laplace(only={only!r}): no block fits.\nThe nearest names: {near}.")
    blocks, names, shapes = zip(*kept, strict=True)
    chosen = set(itertools.chain.from_iterable(names))
    order = tuple(name for name in F.order if name in chosen)
    return CurvatureMatrix(blocks, names, shapes, order)
