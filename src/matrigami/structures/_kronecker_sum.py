"""Kronecker sum: `A = L (x) I + I (x) R`, e.g. a Laplacian on a grid.

Storage `n1^2 + n2^2`; cost per vector `n (n1 + n2)`. Its exponential is a Kronecker product.
Symmetric factors give eigenvalues `l_i + r_j` and an exact solve by two small eigendecompositions
(fast diagonalisation: Lynch, Rice and Thomas 1964). Projection: partial traces, the best; the
split of the identity between the factors is free and shared evenly.

Shapes: n1 x n1 = left term, n2 x n2 = right term, n = n1 n2 rows and columns, k = right-hand sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    Eigh,
    Fan,
    LinearOperator,
    Structure,
    contractions,
    cost,
    diagonal,
    draw,
    eigh,
    fans,
    kron_sum,
    largest,
    operator,
    project,
    scale,
    solve,
    trace,
)
from matrigami.structures._kronecker import KroneckerMatrix, beside


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSumMatrix(LinearOperator):
    """The matrix `left (x) I + I (x) right`; each term is a square tensor or value.

    Examples:
        >>> import torch
        >>> second_difference = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
        >>> KroneckerSumMatrix(second_difference, second_difference).dense()
        tensor([[ 4., -1., -1., -0.],
                [-1.,  4., -0., -1.],
                [-1., -0.,  4., -1.],
                [-0., -1., -1.,  4.]])
    """

    left: Inexact[Tensor, "*batch n1 n1"] | LinearOperator
    right: Inexact[Tensor, "*batch n2 n2"] | LinearOperator

    @property
    def terms(self) -> tuple[LinearOperator, LinearOperator]:
        """Both terms as operators."""
        return operator(self.left), operator(self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        n = self.left.shape[-1] * self.right.shape[-1]
        return (*torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2]), n, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Each term along its own axis."""
        n1, n2 = self.left.shape[-1], self.right.shape[-1]
        L, R = self.terms
        Y = X.unflatten(-2, (n1, n2))
        tall = Y.movedim(-3, -2)  # ... n2 n1 k
        along_left = L.matmat(Y.flatten(-2, -1)).unflatten(-1, Y.shape[-2:])
        along_right = R.matmat(tall.flatten(-2, -1)).unflatten(-1, tall.shape[-2:]).movedim(-2, -3)
        return (along_left + along_right).flatten(-3, -2)

    @property
    def T(self) -> "KroneckerSumMatrix":
        """Transpose each term."""
        return KroneckerSumMatrix(
            *[F.mT if isinstance(F, Tensor) else F.T for F in (self.left, self.right)]
        )

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        L, R = self.terms
        eye1, eye2 = (torch.eye(F.shape[-1], dtype=self.dtype, device=self.device) for F in (L, R))
        grid = torch.einsum("...ab,cd->...acbd", L.dense(), eye2) + torch.einsum(
            "ab,...cd->...acbd", eye1, R.dense()
        )
        return grid.flatten(-4, -3).flatten(-2, -1)


@dataclass(frozen=True)
class KroneckerSum(Structure):
    """Kronecker sums of two square matrices.

    Args:
        factors: Their sizes `(n1, n2)`; by default balanced divisors of `n`.

    Examples:
        >>> KroneckerSum().init(12, 12)
        KroneckerSumMatrix(12x12, 25 parameters)
    """

    factors: Sequence[int] | None = None

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerSumMatrix:
        """Draw Gaussian terms.

        Raises:
            ValueError: If `m != n`, or the sizes do not multiply to `n`.
        """
        blanks = [torch.empty(size, size, dtype=dtype, device=device) for size in self._sizes(m, n)]
        return draw(KroneckerSumMatrix(*blanks), generator)

    def _sizes(self, m: int, n: int) -> tuple[int, int]:
        """The sizes of the two terms."""
        low = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        n1, n2 = (low, n // low) if self.factors is None else self.factors
        if m != n or n1 * n2 != n:
            raise ValueError(
                f"{self} was asked for a {m}x{n} matrix.\n"
                f"A Kronecker sum is square, and {n1} * {n2} = {n1 * n2}.\n"
                "Give a square size and two sizes that multiply to it."
            )
        return n1, n2


@kron_sum.register(Tensor)
@kron_sum.register(LinearOperator)
def _(A: LinearOperator | Tensor, B: LinearOperator | Tensor) -> KroneckerSumMatrix:
    for F in (A, B):
        if F.shape[-2] != F.shape[-1]:
            raise ValueError(
                f"kron_sum was asked for {tuple(A.shape)} and {tuple(B.shape)}.\n"
                "Both terms should be square."
            )
    return KroneckerSumMatrix(A, B)


@fans.register
def _(A: KroneckerSumMatrix) -> tuple[Fan, ...]:
    return tuple(fan for F in A.terms for fan in fans(F))


@contractions.register
def _(A: KroneckerSumMatrix) -> tuple[Contraction, ...]:
    n1, n2 = (F.shape[-1] for F in A.terms)
    return (*beside(A.left, n2, left=True)[0], *beside(A.right, n1, left=False)[0])


@cost.register
def _(A: KroneckerSumMatrix) -> Cost:
    (p1, m1, b1), (p2, m2, b2) = map(cost, A.terms)
    n1, n2 = (F.shape[-1] for F in A.terms)
    return Cost(p1 + p2, m1 * n2 + m2 * n1, b1 + b2)


@scale.register
def _(A: KroneckerSumMatrix, factor: float | Tensor) -> KroneckerSumMatrix:
    return KroneckerSumMatrix(*[scale(F, factor) for F in A.terms])


@diagonal.register
def _(A: KroneckerSumMatrix) -> Inexact[Tensor, "*batch n"]:
    d1, d2 = map(diagonal, A.terms)
    return (d1[..., :, None] + d2[..., None, :]).flatten(-2, -1)


@trace.register
def _(A: KroneckerSumMatrix) -> Inexact[Tensor, "*batch"]:
    L, R = A.terms
    return R.shape[-1] * trace(L) + L.shape[-1] * trace(R)


@eigh.register
def _(A: KroneckerSumMatrix, k: int | None = None) -> Eigh:
    (v1, Q1), (v2, Q2) = map(eigh, A.terms)
    pairs = Eigh((v1[..., :, None] + v2[..., None, :]).flatten(-2, -1), KroneckerMatrix(Q1, Q2))
    return pairs if k is None else largest(pairs, k)


@solve.register
def _(A: KroneckerSumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    if not all(_symmetric(F.dense()) for F in A.terms):
        return solve.dispatch(LinearOperator)(A, B)
    values, Q = eigh(A)
    return Q @ ((Q.T @ B) / values[..., None])


def _symmetric(D: Tensor) -> bool:
    """Whether a matrix equals its transpose exactly."""
    return torch.equal(D, D.mT)


@project.register
def _(recipe: KroneckerSum, W: Inexact[Tensor, "*batch m n"]) -> KroneckerSumMatrix:
    n1, n2 = recipe._sizes(*W.shape[-2:])
    grid = W.unflatten(-2, (n1, n2)).unflatten(-1, (n1, n2))
    L, R = torch.einsum("...acbc->...ab", grid) / n2, torch.einsum("...abac->...bc", grid) / n1
    mean = torch.diagonal(W, dim1=-2, dim2=-1).mean(-1)[..., None, None] / 2
    eye1, eye2 = (torch.eye(size, dtype=W.dtype, device=W.device) for size in (n1, n2))
    return KroneckerSumMatrix(L - mean * eye1, R - mean * eye2)
