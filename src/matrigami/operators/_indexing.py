"""Members of a stack, rows and single entries of a matrix, without the rest of it.

Shapes: m = rows, n = columns, e = entries or rows that are asked for, batch = a stack of matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.operators._algebra import CroppedMatrix, ScaledMatrix, SumMatrix, TransposedMatrix
from matrigami.operators._base import LinearOperator, indexed, require
from matrigami.operators._convert import as_positions
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._diagonal import DiagonalMatrix
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._tree import over_stack

CHUNK = 256
"""Unit vectors that are multiplied at a time."""


def _at(function: OpenFunction, A: Any, *indices: Any) -> Any:
    """Answer for positions on the axes, checked where numbers can be looked at."""
    require(function.name, A)
    places = [as_positions(i, n, A) for i, n in zip(indices, A.shape[-2:], strict=False)]
    if any(place.shape != places[0].shape or place.ndim != 1 for place in places):
        raise ValueError(
            f"{function.name}(A, ...): indices have shapes {[tuple(p.shape) for p in places]}.\n"
            "Give vectors of one length."
        )
    return function.answer(A, *places)


@lambda default: OpenFunction(default, around=_at)
def entries(
    A: LinearOperator, rows: Int[Tensor, " e"], columns: Int[Tensor, " e"]
) -> Inexact[Tensor, "*batch e"]:
    """The entries `A[rows[i], columns[i]]`, without the others; negative indices from the end.

    Raises:
        IndexError: If an index is beyond its axis.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> entries(DenseMatrix(torch.eye(3)), torch.tensor([0, 1]), torch.tensor([0, 2]))
        tensor([1., 0.])
    """
    found = []
    for i, j in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True):
        picked = (A @ _unit_vectors(A, A.shape[-1], j))[
            ..., i, torch.arange(len(i), device=i.device)
        ]
        found.append(picked)
    return torch.cat(found, -1)


@lambda default: OpenFunction(default, around=_at)
def take_rows(A: LinearOperator, index: Int[Tensor, " e"]) -> Inexact[Tensor, "*batch e n"]:
    """The rows `A[index]`, as dense numbers: what an embedding with a structured table looks up.

    Raises:
        IndexError: If an index is beyond its axis.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> take_rows(DenseMatrix(torch.eye(2)), torch.tensor([1, 1]))
        tensor([[0., 1.],
                [0., 1.]])
    """
    parts = [(A.T @ _unit_vectors(A, A.shape[-2], i)).mT for i in index.split(CHUNK)]
    return torch.cat(parts, -2)


@indexed.register
def _(A: LinearOperator, index: Any) -> Any:
    try:
        return _found(A, index)
    except (IndexError, TypeError) as error:
        raise type(error)(
            f"A[index]: {str(error).splitlines()[0]}\n"
            f"A is a {A!r}; an index is a number, a slice, or a list or tensor of numbers or flags."
        ) from error


def _found(A: LinearOperator, index: Any) -> Any:
    """Members of a stack as values, rows and entries as tensors."""
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
        raise TypeError("None makes an axis, and a matrix has its axes.")
    dots = [i for i, part in enumerate(index) if part is Ellipsis]
    missing = ndim - len(index) + len(dots)
    if missing < 0 or len(dots) > 1:
        raise IndexError(f"{len(index)} indices for a value with {ndim} axes.")
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
    part = list(part) if isinstance(part, range) else part
    part = torch.as_tensor(part) if isinstance(part, list) and part else part
    return torch.arange(size, device=A.device)[part]


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
