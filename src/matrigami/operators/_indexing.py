"""Members of a stack, rows and single entries of a matrix, without the rest of it.

Shapes: m = rows, n = columns, e = entries or rows that are asked for, batch = a stack of matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.operators._algebra import CroppedMatrix, ScaledMatrix, SumMatrix, TransposedMatrix
from matrigami.operators._base import LinearOperator, indexed
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._diagonal import DiagonalMatrix
from matrigami.operators._functions import entries, take_rows
from matrigami.operators._tree import over_stack

CHUNK = 256
"""Unit vectors that are multiplied at a time."""


@indexed.register
def _(A: LinearOperator, index: Any) -> Any:
    stack = len(A.shape) - 2
    parts = _spelled(index if isinstance(index, tuple) else (index,), A.ndim)
    if all(isinstance(part, slice) and part == slice(None) for part in parts[stack:]):
        return over_stack(A, lambda t: t[tuple(parts[:stack])]) if stack else A
    if stack:
        A = over_stack(A, lambda t: t[tuple(parts[:stack])])
    return _picked(A, *parts[stack:])


def _spelled(index: tuple[Any, ...], ndim: int) -> list[Any]:
    """One part for each axis: `...` and missing ones as full slices."""
    if any(part is None for part in index):
        raise TypeError("A[index]: None makes an axis, and a matrix has its axes.\nUse A[i, j].")
    dots = [i for i, part in enumerate(index) if part is Ellipsis]
    missing = ndim - len(index) + len(dots)
    if missing < 0 or len(dots) > 1:
        raise IndexError(f"A[index]: {len(index)} indices for a value with {ndim} axes.")
    at = dots[0] if dots else len(index)
    return [*index[:at], *[slice(None)] * missing, *index[at + len(dots) :]]


def _picked(A: LinearOperator, row: Any, column: Any) -> Tensor:
    """`A.dense()[..., row, column]` from the rows, or the entries, that it needs."""
    rows, columns = (
        _positions(p, size, A) for p, size in zip((row, column), A.shape[-2:], strict=True)
    )
    if not isinstance(row, slice) and not isinstance(column, slice):
        rows, columns = torch.broadcast_tensors(rows, columns)
        return _shaped(entries(A, rows.reshape(-1), columns.reshape(-1)), rows, -1)
    if isinstance(column, slice):
        found = take_rows(A, rows.reshape(-1))[..., columns]
        return _shaped(found, rows, -2)
    found = take_rows(A.T, columns.reshape(-1))[..., rows].mT
    return _shaped(found, columns, -1)


def _shaped(found: Tensor, positions: Tensor, axis: int) -> Tensor:
    """The picked axis in the shape of the index: none for a number."""
    return found.squeeze(axis) if positions.ndim == 0 else found.unflatten(axis, positions.shape)


def _positions(part: Any, size: int, A: LinearOperator) -> Int[Tensor, "..."]:
    """What an index picks, by its positions from zero."""
    return torch.arange(size, device=A.device)[part]


@entries.register
def _(A: LinearOperator, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """Columns by products with unit vectors."""
    found = []
    for i, j in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True):
        picked = (A @ _unit_vectors(A, A.shape[-1], j))[
            ..., i, torch.arange(len(i), device=i.device)
        ]
        found.append(picked)
    return torch.cat(found, -1)


@take_rows.register
def _(A: LinearOperator, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    """Rows by products of the transpose with unit vectors."""
    parts = [(A.T @ _unit_vectors(A, A.shape[-2], i)).mT for i in index.split(CHUNK)]
    return torch.cat(parts, -2)


def _unit_vectors(A: LinearOperator, size: int, index: Tensor) -> Tensor:
    """The columns `index` of the identity, in the type of `A`."""
    E = torch.zeros(size, len(index), dtype=A.dtype, device=A.device)
    E[index, torch.arange(len(index), device=A.device)] = 1
    return E


def diagonal_by_entries(A: LinearOperator) -> Inexact[Tensor, "*batch d"]:
    """The main diagonal where single entries are cheap."""
    d = torch.arange(min(A.shape[-2:]), device=A.device)
    return entries(A, d, d)


def raveled(digits: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> Tensor:
    """The position of digits in a mixed radix, slowest first; zero for none."""
    total = torch.zeros_like(like)
    for digit, size in zip(digits, sizes, strict=True):
        total = total * size + digit
    return total


@entries.register
def _(A: DenseMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return A.entries[..., rows, columns]


@take_rows.register
def _(A: DenseMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    return A.entries[..., index, :]


@entries.register
def _(A: DiagonalMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return A.diagonal[..., rows] * (rows == columns)


@entries.register
def _(A: SumMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return sum(entries(term, rows, columns) for term in A.terms)  # pyright: ignore[reportReturnType]


@take_rows.register
def _(A: SumMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    return sum(take_rows(term, index) for term in A.terms)  # pyright: ignore[reportReturnType]


@entries.register
def _(A: ScaledMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return A.factor[..., None] * entries(A.operator, rows, columns)


@take_rows.register
def _(A: ScaledMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    return A.factor[..., None, None] * take_rows(A.operator, index)


@entries.register
def _(A: TransposedMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return entries(A.operator, columns, rows)


@entries.register
def _(A: CroppedMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return entries(A.padded, rows, columns)


@take_rows.register
def _(A: CroppedMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    return take_rows(A.padded, index)[..., : A.columns]
