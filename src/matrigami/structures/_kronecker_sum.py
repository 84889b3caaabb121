"""Kronecker sum: `A = L (x) I + I (x) R`, e.g. a Laplacian on a grid.

Storage `n1^2 + n2^2`; cost per vector `n (n1 + n2)`. Its exponential is a Kronecker product.
Symmetric factors give eigenvalues `l_i + r_j` and an exact solve by two small eigendecompositions
(fast diagonalisation: Lynch, Rice and Thomas 1964). Projection: partial traces, the best; the
split of the identity between the factors is free and shared evenly.

Shapes: n1 x n1 = left term, n2 x n2 = right term, n = n1 n2 rows and columns, k = right-hand sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.krylov import implicit_solve
from matrigami.operators import (
    Contraction,
    Cost,
    DenseMatrix,
    Eigh,
    Fan,
    LinearOperator,
    SpectralMatrix,
    Structure,
    Svd,
    add,
    as_array,
    contractions,
    cost,
    diagonal,
    differentiated,
    eigh,
    entries,
    example,
    exp,
    fans,
    hermitian,
    is_big,
    is_frobenius,
    kron_sum,
    largest,
    norm,
    operator,
    power,
    project,
    root_of_squares,
    scale,
    shift,
    slogdet,
    solve,
    svd,
    svdvals,
    sylvester,
    trace,
)
from matrigami.structures._kronecker import KroneckerMatrix, beside

__all__ = ["KroneckerSum", "KroneckerSumMatrix"]


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
        along_left = (L @ Y.flatten(-2, -1)).unflatten(-1, Y.shape[-2:])
        along_right = (R @ tall.flatten(-2, -1)).unflatten(-1, tall.shape[-2:]).movedim(-2, -3)
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
        grid = torch.einsum("...ab,cd->...acbd", L.dense().to(self.dtype), eye2)
        grid = grid + torch.einsum("ab,...cd->...acbd", eye1, R.dense().to(self.dtype))
        return grid.flatten(-4, -3).flatten(-2, -1)


@example("kronecker_sum")
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

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> KroneckerSumMatrix:
        """The tensors of a member.

        Raises:
            ValueError: If `m != n`, or the sizes do not multiply to `n`.
        """
        blanks = [empty(size, size) for size in self._sizes(m, n)]
        return KroneckerSumMatrix(*blanks)

    def _sizes(self, m: int, n: int) -> tuple[int, int]:
        """The sizes of the two terms."""
        low = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        n1, n2 = (low, n // low) if self.factors is None else self.factors
        if m != n or n1 * n2 != n:
            raise ValueError(
                f"{self} cannot be {m}x{n}: it is square, and {n1} * {n2} = {n1 * n2}.\n"
                "Give a square size and two sizes that multiply to it."
            )
        return n1, n2


@kron_sum.register
def _(*terms: LinearOperator | Tensor) -> KroneckerSumMatrix:
    left, *rest = terms
    return KroneckerSumMatrix(left, rest[0] if len(rest) == 1 else kron_sum(*rest))


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
def _(A: KroneckerSumMatrix, factor: Tensor) -> KroneckerSumMatrix:
    return KroneckerSumMatrix(*[scale(F, factor) for F in A.terms])


@diagonal.register
def _(A: KroneckerSumMatrix) -> Inexact[Tensor, "*batch n"]:
    d1, d2 = map(diagonal, A.terms)
    return (d1[..., :, None] + d2[..., None, :]).flatten(-2, -1)


@trace.register
def _(A: KroneckerSumMatrix) -> Inexact[Tensor, "*batch"]:
    L, R = A.terms
    return R.shape[-1] * trace(L) + L.shape[-1] * trace(R)


@shift.register
def _(A: KroneckerSumMatrix, amount: Tensor) -> KroneckerSumMatrix:
    """The multiple of the identity goes into one term."""
    left = shift(operator(A.left), amount)
    return KroneckerSumMatrix(left.entries if isinstance(left, DenseMatrix) else left, A.right)


@add.register(where=lambda A, B: [F.shape for F in A.terms] == [F.shape for F in B.terms])
def _(A: KroneckerSumMatrix, B: KroneckerSumMatrix) -> KroneckerSumMatrix:
    return KroneckerSumMatrix(*[F + G for F, G in zip(A.terms, B.terms, strict=True)])


@hermitian.register
def _hermitian(A: KroneckerSumMatrix, *_: Any, **__: Any) -> bool:
    """Whether both terms equal their adjoints."""
    return all(map(hermitian, A.terms))


@eigh.register(where=_hermitian)
def _(A: KroneckerSumMatrix, k: int | None = None) -> Eigh:
    (v1, Q1), (v2, Q2) = map(eigh, A.terms)
    pairs = Eigh((v1[..., :, None] + v2[..., None, :]).flatten(-2, -1), KroneckerMatrix(Q1, Q2))
    return pairs if k is None else largest(pairs, k)


def _spectral(A: KroneckerSumMatrix) -> SpectralMatrix:
    """By eigenpairs, which are those of the terms."""
    return SpectralMatrix(*eigh(A))


@solve.register
def _(A: KroneckerSumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """`L Y + Y R.T = F`: by eigenvectors if the terms are Hermitian, else by their Schur forms.

    The derivative is that of the equation, so that repeated eigenvalues do not matter.
    """
    return implicit_solve(A, B, _separated)


def _separated(A: KroneckerSumMatrix, B: Tensor) -> Tensor:
    """Fast diagonalisation (Lynch, Rice and Thomas 1964), or Bartels and Stewart (1972).

    The latter on the CPU, one right-hand side after the other.
    """
    if _hermitian(A):
        return solve(_spectral(A), B)
    L, R = (F.dense().to(B.dtype) for F in A.terms)
    batch = torch.broadcast_shapes(L.shape[:-2], R.shape[:-2], B.shape[:-2])
    L, R, B = (t.expand(*batch, *t.shape[-2:]).detach() for t in (L, R, B))
    if not B.numel():
        return B
    flat = zip(*[as_array(t.reshape(-1, *t.shape[-2:])) for t in (L, R, B)], strict=True)
    solved = [torch.as_tensor(sylvester(*matrices)) for matrices in flat]
    return torch.stack(solved).to(B).reshape(B.shape)


@slogdet.register(where=lambda A: is_big(A) or not differentiated(A))
def _(A: KroneckerSumMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """The product of all sums of two eigenvalues; a small one that is differentiated goes by LU."""
    values = _eigenvalues(A)
    sign, log = values.sgn().prod(-1), values.abs().log().sum(-1)
    return (sign if A.dtype.is_complex else sign.real.sgn()).to(A.dtype), log


def _eigenvalues(A: LinearOperator) -> Inexact[Tensor, "*batch n"]:
    """All sums of eigenvalues of the terms, of sums among these too."""
    if isinstance(A, KroneckerSumMatrix):
        v1, v2 = map(_eigenvalues, A.terms)
        return (v1[..., :, None] + v2[..., None, :]).flatten(-2, -1)
    return eigh(A).values if hermitian(A) else torch.linalg.eigvals(A.dense())


@norm.register(where=is_frobenius)
def _(A: KroneckerSumMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """`||A||^2 = n2 ||L||^2 + n1 ||R||^2 + 2 Re(tr(L) conj(tr(R)))`."""
    (L, R), (n1, n2) = A.terms, (F.shape[-1] for F in A.terms)
    mean = trace(R) / n2  # moved to the left term, so that nothing cancels
    left, right = (shift(F, amount).dense() for F, amount in ((L, mean), (R, -mean)))
    sums = [(D * D.conj()).real.sum((-2, -1)) for D in (left, right)]
    squares = n2 * sums[0] + n1 * sums[1]
    return root_of_squares(squares)


@svdvals.register(where=lambda A: _hermitian(A) and (is_big(A) or not differentiated(A)))
def _(A: KroneckerSumMatrix) -> Float[Tensor, "*batch n"]:
    return svdvals(_spectral(A))


@svd.register(where=_hermitian)
def _(A: KroneckerSumMatrix) -> Svd:
    return svd(_spectral(A))


@power.register(
    where=lambda A, p: (
        (not float(p).is_integer() or p < 0) and _hermitian(A) and not differentiated(A)
    )
)
def _(A: KroneckerSumMatrix, p: float) -> LinearOperator:
    return power(_spectral(A), p)


@exp.register
def _(A: KroneckerSumMatrix) -> KroneckerMatrix:
    """The terms commute, so their exponentials multiply."""
    return KroneckerMatrix(*map(exp, A.terms))


@entries.register
def _(A: KroneckerSumMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    (L, R), n2 = A.terms, A.right.shape[-1]
    (i, a), (j, b) = ((x // n2, x % n2) for x in (rows, columns))
    return entries(L, i, j) * (a == b) + entries(R, a, b) * (i == j)


@project.register
def _(recipe: KroneckerSum, W: Inexact[Tensor, "*batch m n"]) -> KroneckerSumMatrix:
    n1, n2 = recipe._sizes(*W.shape[-2:])
    grid = W.unflatten(-2, (n1, n2)).unflatten(-1, (n1, n2))
    L, R = torch.einsum("...acbc->...ab", grid) / n2, torch.einsum("...abac->...bc", grid) / n1
    mean = torch.diagonal(W, dim1=-2, dim2=-1).mean(-1)[..., None, None] / 2
    eye1, eye2 = (torch.eye(size, dtype=W.dtype, device=W.device) for size in (n1, n2))
    return KroneckerSumMatrix(L - mean * eye1, R - mean * eye2)
