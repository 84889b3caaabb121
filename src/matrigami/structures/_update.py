"""Low-rank updates: `A = B + U V.T` with a base `B` that is solved fast, e.g. a diagonal.

With `W = B^-1 U` and the capacitance `C = I + V.T W` of the size of the rank,
`A^-1 = B^-1 - W C^-1 V.T B^-1` (Woodbury 1950) and `det A = det B det C` (the determinant lemma).
A sum is taken apart so that all its low-rank terms are one update. A step of iterative refinement
gives back the digits that an ill-conditioned base costs. Of a dense sum the same goes by LU.

Shapes: n = rows = columns, r = rank of the update, k = right-hand sides.
"""

from functools import reduce
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov import implicit_solve, is_large, solve_iteratively
from matrigami.operators import (
    DenseMatrix,
    DiagonalMatrix,
    LinearOperator,
    SpectralMatrix,
    SumMatrix,
    add,
    dense,
    diagonal,
    differentiated,
    eigh,
    hermitian,
    inverse,
    is_big,
    is_concrete,
    lu_slogdet,
    lu_solve,
    norm,
    power,
    root_of_squares,
    shift,
    slogdet,
    solve,
    squared_norm,
    summed,
    times,
)
from matrigami.structures._kronecker import KroneckerMatrix
from matrigami.structures._low_rank import LowRankMatrix

SHARE = 4
"""The rank of an update is at most this share of the size; LU is as fast beyond it."""


def parted(A: SumMatrix) -> tuple[LinearOperator, LowRankMatrix] | None:
    """A sum as one base and one update of low rank, or None if it is none."""
    updates = [term for term in A.terms if isinstance(term, LowRankMatrix)]
    rest = [term for term in A.terms if not isinstance(term, LowRankMatrix | DenseMatrix)]
    if not updates or len(rest) != 1 or len(updates) + 1 != len(A.terms):
        return None
    update = reduce(add, updates)
    if isinstance(update, LowRankMatrix) and update.U.shape[-1] * SHARE <= A.shape[-1]:
        return rest[0], update
    return None


def _is_update(A: SumMatrix, *_: Any) -> bool:
    """Whether a square sum is a regular base with an update."""
    parts = parted(A) if A.shape[-1] == A.shape[-2] else None
    if parts is None:
        return False
    base = parts[0]
    if isinstance(base, DiagonalMatrix) and is_concrete(base.diagonal):
        return bool((base.diagonal != 0).all())
    return True


@solve.register(where=_is_update)
def _(A: SumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    base, update = parted(A)  # pyright: ignore[reportGeneralTypeIssues]
    W = solve(base, update.U)
    C = _capacitance(update, W)

    def woodbury(R: Tensor) -> Tensor:
        """Solve once."""
        Y = solve(base, R)
        return Y - times(W, lu_solve(C, times(update.V.mT, Y)))

    X = woodbury(B)
    return X + woodbury(B - A @ X)


def _capacitance(update: LowRankMatrix, W: Tensor) -> Tensor:
    """`I + V.T B^-1 U`."""
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return eye + times(update.V.mT, W)


@slogdet.register(where=_is_update)
def _(A: SumMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    base, update = parted(A)  # pyright: ignore[reportGeneralTypeIssues]
    sign, log = slogdet(base)
    inner = lu_slogdet(_capacitance(update, solve(base, update.U)))
    return sign * inner[0], log + inner[1]


@inverse.register(where=_is_update)
def _(A: SumMatrix) -> LinearOperator:
    """The inverse of the base, with an update of the same rank."""
    base, update = parted(A)  # pyright: ignore[reportGeneralTypeIssues]
    W = solve(base, update.U)
    adjoint = solve(base.T, update.V)
    return inverse(base) - LowRankMatrix(lu_solve(_capacitance(update, W).mT, W.mT).mT, adjoint)


def _separable(A: SumMatrix, order: float | None = None) -> bool:
    """Whether a large sum has at most one term that is neither diagonal nor of low rank."""
    other = [term for term in A.terms if not isinstance(term, DiagonalMatrix | LowRankMatrix)]
    return is_big(A, order) and len(other) <= 1


@norm.register(where=_separable)
def _(A: SumMatrix, order: float | None = None) -> Inexact[Tensor, "*batch"]:
    """`||A||^2` is the sum of the squares of the terms and of twice their inner products."""
    squares = summed(map(squared_norm, A.terms))
    pairs = summed(_inner(F, G) for F, G in combinations(A.terms, 2))
    return root_of_squares(squares + 2 * pairs.real)


def _inner(F: LinearOperator, G: LinearOperator) -> Tensor:
    """`tr(F.H G)`, or its conjugate, where one of both is diagonal or of low rank."""
    F, G = (F, G) if isinstance(F, DiagonalMatrix | LowRankMatrix) else (G, F)
    if isinstance(F, LowRankMatrix) and isinstance(G, DiagonalMatrix):
        F, G = G, F
    if isinstance(F, DiagonalMatrix):
        return (F.diagonal.conj() * diagonal(G)).sum(-1)
    U, V = F.U, F.V  # pyright: ignore[reportAttributeAccessIssue]
    return (U.conj() * (G @ V.conj())).sum((-2, -1))


def damped(A: SumMatrix) -> tuple[KroneckerMatrix, Tensor] | None:
    """A square Kronecker product and what is added to its diagonal, or None."""
    if len(A.terms) != 2:
        return None
    first, second = sorted(A.terms, key=lambda term: isinstance(term, DiagonalMatrix))
    if not isinstance(second, DiagonalMatrix) or not isinstance(first, KroneckerMatrix):
        return None
    d = second.diagonal
    square = all(F.shape[-1] == F.shape[-2] for F in first.factors)
    return (first, d[..., 0]) if square and is_uniform(d) else None


def is_uniform(d: Tensor) -> bool:
    """Whether all numbers of a diagonal are one."""
    return d.stride(-1) == 0 or (is_concrete(d) and bool((d == d[..., :1]).all()))


def _has_pairs(A: SumMatrix) -> bool:
    """Whether it is such a sum of Hermitian factors."""
    parts = damped(A)
    return parts is not None and all(map(hermitian, parts[0].factors))


def _spectral(A: SumMatrix) -> SpectralMatrix:
    """By the eigenpairs of the Hermitian factors."""
    product, amount = damped(A)  # pyright: ignore[reportGeneralTypeIssues]
    if amount.is_complex() and bool((amount.imag == 0).all()):
        amount = amount.real
    return shift(SpectralMatrix(*eigh(product)), amount)  # pyright: ignore[reportReturnType]


def _is_spectral(A: SumMatrix, *_: Any) -> bool:
    """Whether eigenpairs answer, and nobody wants a derivative that they might not have."""
    return not differentiated(A) and _has_pairs(A)


@solve.register(where=lambda A, B: damped(A) is not None)
def _(A: SumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """By eigenvectors; the derivative is that of the equation, repeated eigenvalues or not."""
    return implicit_solve(A, B, _by_eigenvectors)


def _by_eigenvectors(A: LinearOperator, B: Tensor) -> Tensor:
    """The solver of `implicit_solve`: it sees the sum, or its adjoint, without derivatives."""
    if _has_pairs(A):  # pyright: ignore[reportArgumentType]
        return solve(_spectral(A), B)  # pyright: ignore[reportArgumentType]
    return solve_iteratively(A, B) if is_large(A) else lu_solve(dense(A, "solve"), B)


@slogdet.register(where=_is_spectral)
def _(A: SumMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return slogdet(_spectral(A))


@power.register(where=_is_spectral)
def _(A: SumMatrix, p: float) -> LinearOperator:
    return power(_spectral(A), p)
