"""Gauss quadrature of a Hermitian matrix by the Lanczos recurrence, without keeping its basis.

`z.H f(A) z = |z|^2 sum_i w_i f(theta_i)` with the eigenvalues `theta` of the tridiagonal matrix and
the squared first components `w` of its eigenvectors (Golub and Meurant 2010). The recurrence is not
reorthogonalised: in finite precision it is an exact one for a larger matrix whose eigenvalues lie
within round-off of those of `A` (Greenbaum 1989, Linear Algebra Appl. 113, 7-63), which costs
steps but no accuracy of the quadrature. Memory is a few blocks of vectors, however many steps.

Shapes: n = rows = columns, k = starting vectors, j = steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.krylov._pulled import unmapped
from matrigami.krylov._solution import dot, norms, safe
from matrigami.krylov._systems import ldexp, unit_product, with_precision
from matrigami.operators import LinearOperator

Function = Callable[[Tensor], Tensor]
"""A function of real numbers, entry by entry."""


class Quadrature:
    """The rule for each starting vector, in double precision; `grow` makes it finer."""

    def __init__(self, A: LinearOperator, Z: Tensor) -> None:
        dtype = torch.promote_types(A.dtype, torch.float64)
        A, self.Z = with_precision(A, dtype), Z.to(dtype)
        self.product, self.power = unit_product(lambda X: A @ X, self.Z)
        self.size = norms(self.Z)
        self.diagonal: list[Tensor] = []
        self.off: list[Tensor] = []
        self.walk = self._recurrence()

    def grow(self, steps: int) -> None:
        """Go on up to so many steps."""
        while len(self.diagonal) < steps:
            _, alpha, beta = next(self.walk)
            self.diagonal.append(alpha[..., 0, :])
            self.off.append(beta[..., 0, :])

    @property
    def exhausted(self) -> bool:
        """Whether every space is invariant: the rule is exact."""
        return bool((torch.stack(self.off) == 0).any(0).all())

    def nodes(self) -> tuple[Float[Tensor, "... k j"], Float[Tensor, "... k j"]]:
        """Ritz values and weights; where a space has ended the weight is zero."""
        theta, weights = _Nodes.apply(*self._tridiagonal())
        theta, weights = (t.reshape(*self._stack, -1) for t in (theta, weights))
        return ldexp(theta, self.power), weights * self.size.mT**2

    def times(self, function: Function) -> Tensor:
        """`f(A) Z`, by walking through the same recurrence once more."""
        scale = self.power.expand(*self._stack, 1).flatten()
        columns = []
        for (theta, V), power in zip(_eigh(*self._tridiagonal()), scale, strict=True):
            values = function(ldexp(theta, power.cpu()).to(self.size.device)).cpu()
            columns.append(_padded(V @ (values * V[0]), self.steps, 0.0))
        y = torch.stack(columns).reshape(*self._stack, -1).to(self.size.device)
        Y = torch.zeros_like(self.Z)
        for j, (q, _, _) in zip(range(self.steps), self._recurrence(), strict=False):
            Y = Y + q * y[..., None, :, j]
        return Y * self.size

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.diagonal)

    @property
    def _stack(self) -> tuple[int, ...]:
        """Batch axes and starting vectors."""
        return (*self.Z.shape[:-2], self.Z.shape[-1])

    def _recurrence(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The Lanczos vector, and what it adds to the tridiagonal matrix, step by step."""
        q, q_old = self.Z / safe(self.size), torch.zeros_like(self.Z)
        beta = torch.zeros_like(self.size)
        while True:
            w = self.product(q) - beta * q_old
            alpha = dot(w, q).real
            w = w - alpha * q
            scale = norms(w)
            ended = scale <= 10 * torch.finfo(w.dtype).eps * (alpha.abs() + beta)
            beta = torch.where(ended, 0, scale)
            yield q, alpha, beta
            q_old, q = q, torch.where(ended, 0, w / safe(scale))

    def _tridiagonal(self) -> tuple[Tensor, Tensor]:
        """Diagonal and what is below it, one row for each starting vector."""
        diagonal, off = (torch.stack(rows, -1).flatten(0, -2) for rows in (self.diagonal, self.off))
        return diagonal, off


class _Nodes(torch.autograd.Function):
    """Ritz values and weights: a function of its own, so that transforms show it plain tensors."""

    vmap = staticmethod(unmapped)

    @staticmethod
    def forward(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """Padded to one length."""
        j, pairs = diagonal.shape[-1], [(theta, V[0] ** 2) for theta, V in _eigh(diagonal, off)]
        theta = torch.stack([_padded(t, j, float(t[0])) for t, _ in pairs])
        weights = torch.stack([_padded(w, j, 0.0) for _, w in pairs])
        return theta.to(diagonal.device), weights.to(diagonal.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        """The derivative of an estimate is not taken through its nodes."""
        ctx.mark_non_differentiable(*output)


def _eigh(diagonal: Tensor, off: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of each tridiagonal matrix, up to where its space ends."""
    from scipy.linalg import eigh_tridiagonal  # noqa: PLC0415 - torch has none in O(j^2)

    for d, e in zip(diagonal.cpu().numpy(), off.cpu().numpy(), strict=True):
        ends = (e == 0).nonzero()[0]
        j = int(ends[0]) + 1 if len(ends) else len(d)
        theta, V = eigh_tridiagonal(d[:j], e[: j - 1])
        yield torch.from_numpy(theta), torch.from_numpy(V)


def _padded(t: Tensor, length: int, value: float) -> Tensor:
    """A vector with a value appended up to a length."""
    return torch.nn.functional.pad(t, (0, length - len(t)), value=value)
