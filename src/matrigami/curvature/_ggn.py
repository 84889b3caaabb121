"""Gauss-Newton matrices: `G = sum_b J.T H J` with the Jacobian `J` of the outputs.

`H` is a curvature of the loss in the outputs.

With the Hessian of the loss as `H` it is the generalised Gauss-Newton matrix, with the expected
outer product of the output
gradients the Fisher matrix (Schraudolph 2002; Martens 2020, arXiv:1412.1193). Each product is a
forward and a reverse
derivative of the model; nothing is stored but the sampled output gradients.

Shapes: p = parameters in all, k = columns, N = examples of a batch, S = samples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from matrigami.curvature._hessian import columnwise
from matrigami.curvature._likelihood import (
    drawn_gradients,
    empirical_gradient,
    output_curvature,
    term_axis,
    terms,
)
from matrigami.curvature._objective import Batch, Loss, Objective, join, objective, split, trainable
from matrigami.curvature._passes import Labels, refuse_labels
from matrigami.operators import LinearOperator

OutputCurvature = Callable[[Loss, Tensor, Tensor, Tensor], Tensor]
"""`H u` for the loss, the targets, the outputs and the output tangent `u` of one batch."""


@dataclass(frozen=True, eq=False, repr=False)
class GaussNewtonMatrix(LinearOperator):
    """`sum_b weight_b J_b.T H_b J_b` at the given parameters, row-major in each of them."""

    parameters: tuple[Float[Tensor, "..."], ...]
    names: tuple[str, ...]
    objective: Objective
    curvature: OutputCurvature

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters in all, twice."""
        p = sum(t.numel() for t in self.parameters)
        return p, p

    def matmat(self, X: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        """Push each column forward, apply the output curvature, pull it back."""
        at = dict(zip(self.names, self.parameters, strict=True))
        total = torch.zeros_like(X)
        push = _backward_twice if _has_rows_apart(self.objective.model) else _forward
        for inputs, targets, weight in self.objective:
            model = partial(self.objective.outputs, inputs=inputs)
            curvature = partial(self.curvature, self.objective.loss, targets)

            def product(v: Tensor, model: Any = model, curvature: Any = curvature) -> Tensor:
                """One column, over one batch."""
                outputs, pull = vjp(model, at)  # pyright: ignore[reportAssignmentType]
                tangent = push(model, at, split(v, at), outputs)
                return join(pull(curvature(outputs, tangent))[0])

            total = total + weight * columnwise(product, X)
        return total

    @property
    def T(self) -> "GaussNewtonMatrix":
        """Itself."""
        return self

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself, column by column."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


Tensors = dict[str, Tensor]
"""Parameters, or directions of them, by name."""


def _forward(model: Any, at: Tensors, v: Tensors, outputs: Tensor) -> Tensor:  # noqa: ARG001
    """`J v` in forward mode."""
    return jvp(model, (at,), (v,))[1]


def _backward_twice(model: Any, at: Tensors, v: Tensors, outputs: Tensor) -> Tensor:
    """`J v` as the derivative of `u -> J.T u`: of the same `J` as the gradients."""
    pull = vjp(model, at)[1]  # pyright: ignore[reportAssignmentType]
    return vjp(pull, torch.zeros_like(outputs))[1]((v,))[0]  # pyright: ignore[reportCallIssue]


def _has_rows_apart(model: nn.Module) -> bool:
    """Whether some rows of a table have no gradient, of which forward mode does not know."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return any(m.padding_idx is not None for m in tables)


def ggn(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch) -> GaussNewtonMatrix:
    """The generalised Gauss-Newton matrix, `J.T (Hessian of the loss in the outputs) J`.

    Positive semi-definite for a loss that is convex in the outputs; equal to the Hessian for a
    linear model.

    Args:
        model: A model without random layers.
        loss: Of outputs and targets, twice differentiable.
        data: One batch `(inputs, targets)` or an iterable of batches, read for each product.

    Raises:
        ValueError: If nothing is trainable, or the data are empty or hold NaN.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> ggn(model, nn.MSELoss(), (torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))).dense()
        tensor([[2., 4.],
                [4., 8.]])
    """
    return _gauss_newton(model, objective(model, loss, data), _loss_hessian)


def fisher(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Batch] | Batch,
    *,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
) -> GaussNewtonMatrix:
    """The Fisher matrix of the likelihood that the loss stands for, scaled like the loss.

    Args:
        model: A model without random layers.
        loss: As for `kfac`.
        data: One batch `(inputs, targets)` or an iterable of batches, read for each product;
            with drawn labels it is kept.
        labels: `"exact"`: the expectation over the model's labels, equal to the generalised Gauss-
            Newton matrix. A number: as many labels drawn for each term, an unbiased estimate. The
            labels of the data, which is neither: `"empirical"` with the gradient of each term of
            the loss, such as a position of a sequence; `"examples"` with that of all terms of an
            example together.
        generator: Source of drawn labels.

    Raises:
        ValueError: If the loss has no known likelihood, or `labels` is none of the above.
    """
    refuse_labels("fisher with ", labels)
    target = objective(model, loss, data)
    first = next(iter(target.data))[1]
    terms(target.loss, first)  # refuses a loss without a likelihood before anything is computed
    if labels == "exact":
        return _gauss_newton(model, target, _expected)
    if labels in ("empirical", "examples"):
        return _gauss_newton(model, target, partial(_empirical, labels == "empirical"))
    if generator is None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    own = tuple((inputs, targets.clone()) for inputs, targets in target.data)
    target = replace(target, data=own)  # kept, so that each batch keeps its labels
    return _gauss_newton(model, target, _Drawn(target, trainable(model), int(labels), generator))


class _Drawn:
    """`H u = mean_s g_s <g_s, u>` with gradients `(S, N, ...)` at labels that are drawn once."""

    def __init__(
        self,
        target: Objective,
        at: dict[str, Tensor],
        samples: int,
        generator: torch.Generator,
    ) -> None:
        self.gradients: dict[int, Tensor] = {}
        for inputs, targets, _ in target:
            f = target.outputs(at, inputs).detach()
            found = terms(target.loss, targets)
            self.gradients[id(targets)] = drawn_gradients(target.loss, f, found, samples, generator)

    def __call__(self, _loss: Loss, targets: Tensor, _outputs: Tensor, tangent: Tensor) -> Tensor:
        """Apply the outer products of one batch."""
        return _outer(self.gradients[id(targets)], tangent)


def _outer(gradients: Tensor, tangent: Tensor) -> Tensor:
    """`mean_s g_s <g_s, u>`, with an inner product for each example."""
    g = gradients.reshape(*gradients.shape[:2], -1)
    along = (g * tangent.reshape(len(tangent), -1)).sum(-1, keepdim=True)
    return (g * along).mean(0).view_as(tangent)


def _gauss_newton(
    model: nn.Module, target: Objective, curvature: OutputCurvature
) -> GaussNewtonMatrix:
    """The matrix at the parameters of the model."""
    at = trainable(model)
    return GaussNewtonMatrix(tuple(at.values()), tuple(at), target, curvature)


def _loss_hessian(loss: Loss, targets: Tensor, outputs: Tensor, tangent: Tensor) -> Tensor:
    """The Hessian of the loss in the outputs."""
    _, pull = vjp(grad(lambda f: loss(f, targets)), outputs)  # pyright: ignore[reportAssignmentType]
    return pull(tangent)[0]


def _expected(loss: Loss, targets: Tensor, outputs: Tensor, tangent: Tensor) -> Tensor:
    """The closed form of the likelihood."""
    found = terms(loss, targets)
    weighted = tangent if found.weights is None else found.weights.to(tangent) * tangent
    return output_curvature(loss, outputs, weighted) / found.divisor


def _empirical(
    apart: bool, loss: Loss, targets: Tensor, outputs: Tensor, tangent: Tensor
) -> Tensor:
    """The outer products of the gradients at the labels of the data, of terms or of examples."""
    g = empirical_gradient(loss, outputs.detach(), targets, terms(loss, targets))
    if not apart:
        return _outer(g[None], tangent)
    axis = term_axis(loss, g.ndim)
    return g * (g * tangent if axis == 0 else (g * tangent).sum(axis, keepdim=True))
