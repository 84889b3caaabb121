"""What keeps sparse and banded matrices so: sums, products, elementwise products and powers.

Shapes: m = rows, n = columns, e = stored entries, or entries and rows that are asked for.
"""

from functools import reduce

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    DiagonalMatrix,
    LinearOperator,
    add,
    compose,
    entries,
    hadamard,
    is_frobenius,
    norm,
    power,
    root_of_squares,
    shift,
    take_rows,
)
from matrigami.structures._banded import BandedMatrix, coordinates
from matrigami.structures._sparse import SparseMatrix, assembled, coalesced


def _sparse(A: LinearOperator) -> SparseMatrix:
    """A diagonal or banded matrix by its entries."""
    if isinstance(A, DiagonalMatrix):
        d = torch.arange(A.shape[-1], device=A.device)
        return assembled(A.diagonal, d, d, (len(d), len(d)))
    if isinstance(A, BandedMatrix):
        return assembled(A.band, *coordinates(A, A.device), A.size)
    return A  # pyright: ignore[reportReturnType]


@add.register
def _(A: SparseMatrix, B: DiagonalMatrix | BandedMatrix) -> LinearOperator:
    return add(A, _sparse(B))


@add.register
def _(A: DiagonalMatrix | BandedMatrix, B: SparseMatrix) -> LinearOperator:
    return add(B, A)


@shift.register
def _(A: SparseMatrix, amount: Tensor) -> LinearOperator:
    d = amount[..., None].expand(*amount.shape, A.size[0])
    return add(A, DiagonalMatrix(d))


@compose.register
def _(A: SparseMatrix, B: SparseMatrix) -> SparseMatrix:
    """Each entry of `A` meets a row of `B` (Gustavson 1978)."""
    counts = B.pointers.diff()[A.columns]
    left = torch.arange(len(counts), device=A.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts  # products made by the entries in front
    right = torch.arange(len(left), device=A.device) + (B.pointers[A.columns] - before)[left]
    kind = torch.promote_types(A.dtype, B.dtype)
    products = A.entries.to(kind)[..., left] * B.entries.to(kind)[..., right]
    return assembled(products, A.rows[left], B.columns[right], (A.size[0], B.size[1]))


@compose.register
def _(A: SparseMatrix, B: BandedMatrix) -> LinearOperator:
    return compose(A, _sparse(B))


@compose.register
def _(A: BandedMatrix, B: SparseMatrix) -> LinearOperator:
    return compose(_sparse(A), B)


@compose.register
def _(A: DiagonalMatrix, B: SparseMatrix) -> SparseMatrix:
    """The rows, multiplied."""
    return SparseMatrix(A.diagonal[..., B.rows] * B.entries, B.columns, B.pointers, B.size)


@compose.register
def _(A: SparseMatrix, B: DiagonalMatrix) -> SparseMatrix:
    """The columns, multiplied."""
    return SparseMatrix(A.entries * B.diagonal[..., A.columns], A.columns, A.pointers, A.size)


@compose.register
def _(A: BandedMatrix, B: DiagonalMatrix) -> LinearOperator:
    return compose(A, BandedMatrix(B.diagonal, 0, 0, B.shape[-2:]))  # pyright: ignore[reportArgumentType]


@compose.register
def _(A: DiagonalMatrix, B: BandedMatrix) -> LinearOperator:
    return compose(BandedMatrix(A.diagonal, 0, 0, A.shape[-2:]), B)  # pyright: ignore[reportArgumentType]


@power.register(where=lambda A, p: float(p).is_integer() and p > 0)
def _(A: SparseMatrix, p: float) -> LinearOperator:
    return reduce(compose, [A] * int(p))


@entries.register
def _(A: SparseMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """Found by bisection among the stored ones."""
    stored = coalesced(A)
    if not stored.columns.numel():
        return A.entries.new_zeros(*A.shape[:-2], len(rows))
    places, asked = stored.rows * A.size[1] + stored.columns, rows * A.size[1] + columns
    at = torch.searchsorted(places, asked).clamp(max=len(places) - 1)
    return stored.entries[..., at] * (places[at] == asked)


@take_rows.register
def _(A: SparseMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    pointers = torch.arange(len(index) + 1, device=A.device)
    ones = torch.ones(len(index), dtype=A.dtype, device=A.device)
    return compose(SparseMatrix(ones, index, pointers, (len(index), A.size[0])), A).dense()


@hadamard.register
def _(A: SparseMatrix, B: LinearOperator) -> SparseMatrix:
    """Where there are entries, for products with numbers add up as they do."""
    kind = torch.promote_types(A.dtype, B.dtype)
    products = A.entries.to(kind) * entries(B, A.rows, A.columns)
    return SparseMatrix(products, A.columns, A.pointers, A.size)


@hadamard.register
def _(A: LinearOperator, B: SparseMatrix) -> LinearOperator:
    return hadamard(B, A)


@norm.register(where=is_frobenius)
def _(A: SparseMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return root_of_squares(coalesced(A).entries.abs().square().sum(-1))
