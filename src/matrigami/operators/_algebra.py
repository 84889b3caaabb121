"""Sum, product, multiple, transpose, inverse and crop, where no narrower structure holds them.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, add, compose, scale
from matrigami.operators._dense import times
from matrigami.operators._diagonal import DiagonalMatrix
from matrigami.operators._functions import (
    Cost,
    Fan,
    cost,
    diagonal,
    fans,
    inverse,
    pinv,
    shift,
    slogdet,
    solve,
    trace,
)
from matrigami.operators._kernels import lu_inverse
from matrigami.operators._triangular import refuse_zeros


@dataclass(frozen=True, eq=False, repr=False)
class SumMatrix(LinearOperator):
    """`A_1 + ... + A_t`."""

    terms: tuple[LinearOperator, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(*[A.shape[:-2] for A in self.terms])
        return (*batch, *self.terms[0].shape[-2:])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply by each term and add."""
        Y = self.terms[0] @ X
        for A in self.terms[1:]:
            Y = Y + A @ X
        return Y

    @property
    def T(self) -> "SumMatrix":
        """The sum of the transposes."""
        return SumMatrix(tuple(A.T for A in self.terms))

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        D = self.terms[0].dense()
        for A in self.terms[1:]:
            D = D + A.dense()
        return D


@dataclass(frozen=True, eq=False, repr=False)
class ProductMatrix(LinearOperator):
    """`A_1 @ ... @ A_t`."""

    factors: tuple[LinearOperator, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(*[A.shape[:-2] for A in self.factors])
        return (*batch, self.factors[0].shape[-2], self.factors[-1].shape[-1])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply right to left."""
        for A in reversed(self.factors):
            X = A @ X
        return X

    @property
    def T(self) -> "ProductMatrix":
        """The transposes in reverse order."""
        return ProductMatrix(tuple(A.T for A in reversed(self.factors)))

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        D = self.factors[0].dense()
        for A in self.factors[1:]:
            D = times(D, A.dense())
        return D


@dataclass(frozen=True, eq=False, repr=False)
class ScaledMatrix(LinearOperator):
    """`factor * A`, with one factor for each matrix of a stack."""

    operator: LinearOperator
    factor: Inexact[Tensor, "*#batch"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(self.operator.shape[:-2], self.factor.shape)
        return (*batch, *self.operator.shape[-2:])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply, then scale."""
        return self.factor[..., None, None] * (self.operator @ X)

    @property
    def T(self) -> "ScaledMatrix":
        """The transpose, scaled."""
        return ScaledMatrix(self.operator.T, self.factor)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.factor[..., None, None] * self.operator.dense()


@dataclass(frozen=True, eq=False, repr=False)
class TransposedMatrix(LinearOperator):
    """The transpose of a value that knows `A @ X` only, by a vector-Jacobian product."""

    operator: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        *batch, m, n = self.operator.shape
        return (*batch, n, m)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Pull `X` back through the product with the operator: that is the adjoint."""
        batch = torch.broadcast_shapes(self.shape[:-2], X.shape[:-2])
        point = X.new_zeros(*batch, self.shape[-2], X.shape[-1])
        _, pull = torch.func.vjp(self.operator.matmat, point)  # pyright: ignore[reportAssignmentType]
        return pull(X.conj().expand(*batch, *X.shape[-2:]))[0].conj()

    @property
    def T(self) -> LinearOperator:
        """The operator itself."""
        return self.operator

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.operator.dense().mT


@dataclass(frozen=True, eq=False, repr=False)
class InverseMatrix(LinearOperator):
    """The inverse of a square operator, applied by `solve`."""

    operator: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return self.operator.shape

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Solve with the operator."""
        return solve(self.operator, X)

    @property
    def T(self) -> "InverseMatrix":
        """The inverse of the transpose."""
        return InverseMatrix(self.operator.T)

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return lu_inverse(self.operator.dense())


@dataclass(frozen=True, eq=False, repr=False)
class CroppedMatrix(LinearOperator):
    """The leading corner of a larger matrix: how a size that does not factor is padded.

    The padding is real: `cost` counts the arithmetic of the larger matrix.
    """

    padded: LinearOperator
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.padded.shape[:-2], self.rows, self.columns)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Append zeros, multiply, drop the surplus."""
        surplus = self.padded.shape[-1] - self.columns
        X = torch.nn.functional.pad(X, (0, 0, 0, surplus)) if surplus else X
        return self.padded.matmat(X)[..., : self.rows, :]

    @property
    def T(self) -> "CroppedMatrix":
        """The corner of the transpose."""
        return CroppedMatrix(self.padded.T, self.columns, self.rows)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.padded.dense()[..., : self.rows, : self.columns]


def cropped(A: LinearOperator, m: int, n: int) -> LinearOperator:
    """The leading `m x n` corner of `A`: `A` itself where nothing is cut."""
    return A if A.shape[-2:] == (m, n) else CroppedMatrix(A, m, n)


@add.register
def _(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    return SumMatrix((A, B))


@add.register
def _(A: LinearOperator, B: SumMatrix) -> LinearOperator:
    return add(B, A)


@add.register
def _(A: SumMatrix, B: LinearOperator) -> LinearOperator:
    """Keep sums flat, and join two terms of one kind where their sum is of that kind."""
    for i, term in enumerate(A.terms):
        joined = add(term, B) if type(term) is type(B) else B
        if type(joined) is type(term):
            return SumMatrix((*A.terms[:i], joined, *A.terms[i + 1 :]))
    return SumMatrix((*A.terms, B))


@add.register
def _(A: SumMatrix, B: SumMatrix) -> LinearOperator:
    return reduce(add, B.terms, A)


@compose.register
def _(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """Keep products flat."""
    left = A.factors if isinstance(A, ProductMatrix) else (A,)
    right = B.factors if isinstance(B, ProductMatrix) else (B,)
    return ProductMatrix((*left, *right))


@scale.register
def _(A: LinearOperator, factor: Tensor) -> LinearOperator:
    return ScaledMatrix(A, factor)


@scale.register
def _(A: ScaledMatrix, factor: Tensor) -> LinearOperator:
    return ScaledMatrix(A.operator, A.factor * factor)


@scale.register
def _(A: SumMatrix, factor: Tensor) -> LinearOperator:
    return SumMatrix(tuple(scale(term, factor) for term in A.terms))


@shift.register
def _(A: LinearOperator, amount: Tensor) -> LinearOperator:
    return add(A, DiagonalMatrix(amount[..., None].expand(*amount.shape, A.shape[-1])))


def _square_factors(A: ProductMatrix, *_: Any) -> bool:
    """Whether every factor is square, so that the product can be taken apart."""
    return all(F.shape[-2] == F.shape[-1] for F in A.factors)


@solve.register(where=_square_factors)
def _(A: ProductMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    for F in A.factors:
        B = solve(F, B)
    return B


@solve.register
def _(A: ScaledMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    refuse_zeros(A.factor)
    return solve(A.operator, B) / A.factor[..., None, None]


@solve.register
def _(A: InverseMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return A.operator @ B


@inverse.register
def _(A: LinearOperator) -> LinearOperator:
    return InverseMatrix(A)


@inverse.register
def _(A: InverseMatrix) -> LinearOperator:
    return A.operator


@pinv.register
def _(A: InverseMatrix) -> LinearOperator:
    return A.operator


@slogdet.register(where=_square_factors)
def _(A: ProductMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    signs, logs = zip(*map(slogdet, A.factors), strict=True)
    return multiplied(signs), summed(logs)


def summed(parts: Iterable[Tensor]) -> Tensor:
    """Add tensors of which some may lack batch axes."""
    return reduce(torch.add, parts)


def multiplied(parts: Iterable[Tensor]) -> Tensor:
    """Multiply tensors of which some may lack batch axes."""
    return reduce(torch.mul, parts)


@slogdet.register
def _(A: ScaledMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    n = A.shape[-1]
    sign, log = slogdet(A.operator)
    return sign * A.factor.sgn() ** n, log + n * A.factor.abs().log()


@slogdet.register
def _(A: InverseMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    sign, log = slogdet(A.operator)
    return sign.conj(), -log


@trace.register
def _(A: SumMatrix) -> Inexact[Tensor, "*batch"]:
    return summed(map(trace, A.terms))


@trace.register
def _(A: ScaledMatrix) -> Inexact[Tensor, "*batch"]:
    return A.factor * trace(A.operator)


@diagonal.register
def _(A: SumMatrix) -> Inexact[Tensor, "*batch n"]:
    return summed(map(diagonal, A.terms))


@diagonal.register
def _(A: ScaledMatrix) -> Inexact[Tensor, "*batch n"]:
    return A.factor[..., None] * diagonal(A.operator)


@diagonal.register
def _(A: TransposedMatrix) -> Inexact[Tensor, "*batch n"]:
    return diagonal(A.operator)


@diagonal.register
def _(A: CroppedMatrix) -> Inexact[Tensor, "*batch n"]:
    return diagonal(A.padded)[..., : min(A.rows, A.columns)]


@cost.register
def _(A: SumMatrix) -> Cost:
    return sum(map(cost, A.terms), Cost(0, 0, 0))


@cost.register
def _(A: ProductMatrix) -> Cost:
    return sum(map(cost, A.factors), Cost(0, 0, 0))


@cost.register
def _(A: ScaledMatrix) -> Cost:
    return cost(A.operator) + Cost(A.factor.numel(), math.prod(A.shape[:-1]), A.factor.nbytes)


@cost.register
def _(A: TransposedMatrix) -> Cost:
    params, macs, stored = cost(A.operator)
    return Cost(params, 2 * macs, stored)  # the product, and its pullback


@fans.register
def _(A: CroppedMatrix) -> tuple[Fan, ...]:
    return fans(A.padded)


@cost.register
def _(A: CroppedMatrix) -> Cost:
    return cost(A.padded)
