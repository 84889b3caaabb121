"""The matrix stored as itself: the value to which every default rule falls back.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, add, compose, power, scale
from matrigami.operators._convert import as_tensor, inexact
from matrigami.operators._functions import inverse, pinv, shift
from matrigami.operators._kernels import lu_inverse, matrix_power
from matrigami.operators._memory import dense, finite


@dataclass(frozen=True, eq=False, repr=False)
class DenseMatrix(LinearOperator):
    """A matrix stored as itself.

    Args:
        entries: A tensor with two axes or more; also an array, or nested lists of numbers.

    Examples:
        >>> A = DenseMatrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> A @ torch.ones(2, dtype=A.dtype), [1, 1] @ A
        (tensor([3., 7.]), tensor([4., 6.]))
    """

    entries: Inexact[Tensor, "*batch m n"]

    def __post_init__(self) -> None:
        """Take any matrix of numbers; a compiler builds values of its own stand-ins for them."""
        if isinstance(self.entries, torch.fx.Proxy):
            return
        if isinstance(self.entries, Tensor) and inexact(self.entries) and self.entries.ndim > 1:
            return
        t = as_tensor(self.entries, torch.empty(0))
        if t.ndim < 2:
            raise ValueError(
                f"DenseMatrix(entries): its shape is {tuple(t.shape)}; a matrix has two axes.\n"
                "Write v[:, None] for a column, v[None] for a row, or DiagonalMatrix(v)."
            )
        object.__setattr__(self, "entries", t)

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return tuple(self.entries.shape)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply a block of vectors."""
        return self.entries @ X

    @property
    def T(self) -> "DenseMatrix":
        """The transpose."""
        return DenseMatrix(self.entries.mT)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.entries


def operator(A: Any) -> LinearOperator:
    """A matrix of numbers as a value; a value as itself."""
    return A if isinstance(A, LinearOperator) else DenseMatrix(as_tensor(A, torch.empty(0)))


def times(F: Tensor, G: Tensor) -> Tensor:
    """The product of two tensors in the type to which both promote."""
    kind = torch.promote_types(F.dtype, G.dtype)
    return F.to(kind) @ G.to(kind)


@add.register
def _(A: LinearOperator, B: Tensor) -> LinearOperator:
    return add(A, DenseMatrix(B))


@add.register
def _(A: DenseMatrix, B: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(A.entries + B.entries)


@compose.register
def _(A: DenseMatrix, B: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(times(A.entries, B.entries))


@scale.register
def _(A: DenseMatrix, factor: Tensor) -> DenseMatrix:
    return DenseMatrix(A.entries * factor[..., None, None])


@shift.register
def _(A: DenseMatrix, amount: Tensor) -> DenseMatrix:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return DenseMatrix(A.entries + amount[..., None, None] * eye)


@inverse.register
def _(A: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(lu_inverse(A.entries))


@pinv.register
def _(A: LinearOperator) -> DenseMatrix:
    return DenseMatrix(torch.linalg.pinv(finite(A, "pinv")))


@power.register(where=lambda A, p: float(p).is_integer())
def _(A: LinearOperator, p: float) -> DenseMatrix:
    return DenseMatrix(matrix_power(dense(A, "power"), int(p)))
