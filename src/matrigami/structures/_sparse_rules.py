"""Sums and products with diagonal matrices, and norms, that leave sparse matrices sparse."""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import (
    DiagonalMatrix,
    LinearOperator,
    add,
    compose,
    is_frobenius,
    norm,
    root_of_squares,
    shift,
)
from matrigami.structures._sparse import SparseMatrix, assembled


@add.register
def _(A: SparseMatrix, B: DiagonalMatrix) -> LinearOperator:
    d = torch.arange(A.size[0], device=A.device)
    return add(A, assembled(B.diagonal, d, d, A.size))


@add.register
def _(A: DiagonalMatrix, B: SparseMatrix) -> LinearOperator:
    return add(B, A)


@shift.register
def _(A: SparseMatrix, amount: Tensor) -> LinearOperator:
    d = amount[..., None].expand(*amount.shape, A.size[0])
    return add(A, DiagonalMatrix(d))


@compose.register
def _(A: DiagonalMatrix, B: SparseMatrix) -> SparseMatrix:
    """The rows, multiplied."""
    return SparseMatrix(A.diagonal[..., B.rows] * B.entries, B.columns, B.pointers, B.size)


@compose.register
def _(A: SparseMatrix, B: DiagonalMatrix) -> SparseMatrix:
    """The columns, multiplied."""
    return SparseMatrix(A.entries * B.diagonal[..., A.columns], A.columns, A.pointers, A.size)


@norm.register(where=is_frobenius)
def _(A: SparseMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """Of the entries, those of one place added up."""
    entries = assembled(A.entries, A.rows, A.columns, A.size).entries
    return root_of_squares(entries.abs().square().sum(-1))
