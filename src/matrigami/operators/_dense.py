"""The matrix stored as itself: the value to which every default rule falls back.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

from dataclasses import dataclass

from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, add, compose, scale


@dataclass(frozen=True, eq=False, repr=False)
class DenseMatrix(LinearOperator):
    """A matrix stored as itself.

    Examples:
        >>> import torch
        >>> A = DenseMatrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> A @ torch.ones(2, dtype=A.dtype)
        tensor([3., 7.])
    """

    entries: Inexact[Tensor, "*batch m n"]

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


def operator(A: LinearOperator | Tensor) -> LinearOperator:
    """A tensor as a value; a value as itself."""
    return A if isinstance(A, LinearOperator) else DenseMatrix(A)


@add.register
def _(A: DenseMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, DenseMatrix):
        return DenseMatrix(A.entries + B.entries)
    return add.dispatch(LinearOperator)(A, B)


@compose.register
def _(A: DenseMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, DenseMatrix):
        return DenseMatrix(A.entries @ B.entries)
    return compose.dispatch(LinearOperator)(A, B)


@scale.register
def _(A: DenseMatrix, factor: float | Tensor) -> DenseMatrix:
    return DenseMatrix(
        A.entries * (factor[..., None, None] if isinstance(factor, Tensor) else factor)
    )
