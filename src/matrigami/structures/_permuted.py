"""Permuted: `A[i, j] = M[rows[i], columns[j]]`, a structure after a reordering of rows and columns.

A geometric order or a perfect shuffle is what makes many matrices hierarchical or block low rank.
With one permutation for both sides `A` is similar to `M`, and shares its diagonal and trace.

Storage: that of `M`, and the permutations as indices. Cost per vector: that of `M`.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Inexact, Int
from torch import Tensor

from matrigami.operators import (
    Cost,
    DiagonalMatrix,
    LinearOperator,
    Places,
    add,
    compose,
    cost,
    diagonal,
    entries,
    inverse,
    norm,
    scale,
    shift,
    slogdet,
    solve,
    svdvals,
    trace,
)

__all__ = ["PermutedMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class PermutedMatrix(LinearOperator):
    """The matrix `M[rows][:, columns]`.

    Args:
        matrix: The matrix `M`.
        rows: A permutation of the rows.
        columns: A permutation of the columns; None for that of the rows.

    Examples:
        >>> import torch
        >>> M = DiagonalMatrix(torch.tensor([1.0, 2.0]))
        >>> PermutedMatrix(M, Places(torch.tensor([1, 0]))).dense()
        tensor([[2., 0.],
                [0., 1.]])
    """

    matrix: LinearOperator
    rows: Places
    columns: Places | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return self.matrix.shape

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Reorder, multiply, reorder."""
        return self.matrix.matmat(X[..., _columns(self).argsort(), :])[..., _rows(self), :]

    @property
    def T(self) -> "PermutedMatrix":
        """The transpose; the permutations change places."""
        if self.columns is None:
            return PermutedMatrix(self.matrix.T, self.rows)
        return PermutedMatrix(self.matrix.T, self.columns, self.rows)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.matrix.dense()[..., _rows(self)[:, None], _columns(self)]


def _rows(A: PermutedMatrix) -> Int[Tensor, " m"]:
    """The permutation of the rows."""
    return A.rows.on(A.device)


def _columns(A: PermutedMatrix) -> Int[Tensor, " n"]:
    """The permutation of the columns."""
    return (A.rows if A.columns is None else A.columns).on(A.device)


def _similar(A: PermutedMatrix, *_: Any) -> bool:
    """Whether one permutation is for rows and columns."""
    return A.columns is None


def _parity(places: Places) -> int:
    """The sign of a permutation: minus one to the size less its cycles."""
    import numpy as np  # noqa: PLC0415
    from scipy.sparse import csr_array  # noqa: PLC0415 - heavy, and rarely needed
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    n, order = len(places.index), places.index.cpu().numpy()
    graph = csr_array((np.ones(n), (np.arange(n), order)), shape=(n, n))
    cycles = connected_components(graph, directed=False, return_labels=False)
    return 1 - 2 * ((n - cycles) % 2)


@add.register(where=_similar)
def _(A: PermutedMatrix, B: DiagonalMatrix) -> PermutedMatrix:
    d = B.diagonal[..., _rows(A).argsort()]
    return PermutedMatrix(add(A.matrix, DiagonalMatrix(d)), A.rows)


@add.register(where=lambda A, B: _similar(B))
def _(A: DiagonalMatrix, B: PermutedMatrix) -> LinearOperator:
    return add(B, A)


@add.register(where=lambda A, B: A.rows == B.rows and A.columns == B.columns)
def _(A: PermutedMatrix, B: PermutedMatrix) -> PermutedMatrix:
    return PermutedMatrix(add(A.matrix, B.matrix), A.rows, A.columns)


@compose.register(where=lambda A, B: A.rows == B.rows and _similar(A) and _similar(B))
def _(A: PermutedMatrix, B: PermutedMatrix) -> PermutedMatrix:
    return PermutedMatrix(compose(A.matrix, B.matrix), A.rows)


@scale.register
def _(A: PermutedMatrix, factor: Tensor) -> PermutedMatrix:
    return PermutedMatrix(scale(A.matrix, factor), A.rows, A.columns)


@shift.register(where=_similar)
def _(A: PermutedMatrix, amount: Tensor) -> PermutedMatrix:
    return PermutedMatrix(shift(A.matrix, amount), A.rows)


@solve.register
def _(A: PermutedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve(A.matrix, B[..., _rows(A).argsort(), :])[..., _columns(A), :]


@inverse.register
def _(A: PermutedMatrix) -> PermutedMatrix:
    if A.columns is None:
        return PermutedMatrix(inverse(A.matrix), A.rows)
    return PermutedMatrix(inverse(A.matrix), A.columns, A.rows)


@slogdet.register
def _(A: PermutedMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    sign, log = slogdet(A.matrix)
    return (sign if A.columns is None else sign * _parity(A.rows) * _parity(A.columns)), log


@entries.register
def _(A: PermutedMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return entries(A.matrix, _rows(A)[rows], _columns(A)[columns])


@diagonal.register
def _(A: PermutedMatrix) -> Inexact[Tensor, "*batch d"]:
    if A.columns is None:
        return diagonal(A.matrix)[..., _rows(A)]
    d = min(A.shape[-2:])
    return entries(A.matrix, _rows(A)[:d], _columns(A)[:d])


@trace.register(where=_similar)
def _(A: PermutedMatrix) -> Inexact[Tensor, "*batch"]:
    return trace(A.matrix)


@norm.register
def _(A: PermutedMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return norm(A.matrix, order)


@svdvals.register
def _(A: PermutedMatrix) -> Float[Tensor, "*batch d"]:
    return svdvals(A.matrix)


@cost.register
def _(A: PermutedMatrix) -> Cost:
    return cost(A.matrix)
