"""Dense: no structure. Storage and cost per vector: `m n`.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    DenseMatrix,
    Fan,
    Search,
    Structure,
    example,
    fans,
    metric_project,
    project,
)

__all__ = ["Dense"]


@example("dense")
@dataclass(frozen=True)
class Dense(Structure):
    """Every matrix.

    Examples:
        >>> Dense().init(3, 4)
        DenseMatrix(3x4, 12 parameters)
    """

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> DenseMatrix:
        """The tensors of a member."""
        return DenseMatrix(empty(m, n))


@fans.register
def _(A: DenseMatrix) -> tuple[Fan, ...]:
    return (Fan(A.shape[-1], A.shape[-2], last=True),)


@project.register
def _(recipe: Dense, W: Inexact[Tensor, "*batch m n"]) -> DenseMatrix:
    return DenseMatrix(W.clone())


@metric_project.register
def _(recipe: Dense, W: Tensor, search: Search) -> DenseMatrix:
    return DenseMatrix(W.clone())
