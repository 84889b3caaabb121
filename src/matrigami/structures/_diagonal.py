"""Diagonal: `A = diag(d)`. Storage and cost per vector: `n`. Projection: the diagonal.

The value stands in `matrigami.operators`, for multiples of the identity are added as such.

Shapes: n = rows = columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DiagonalMatrix,
    Fan,
    LinearOperator,
    Structure,
    chained,
    contraction,
    contractions,
    diagonal,
    example,
    fans,
    hadamard,
    operator,
    project,
)

__all__ = ["Diagonal"]


@example("diagonal")
@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices.

    Examples:
        >>> Diagonal().init(3, 3)
        DiagonalMatrix(3x3, 3 parameters)
    """

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> DiagonalMatrix:
        """The numbers on the diagonal.

        Raises:
            ValueError: If `m != n`.
        """
        if m != n:
            raise ValueError(
                f"Diagonal() cannot be {m}x{n}: a diagonal matrix is square.\n"
                "Use LowRank or Monarch for rectangles."
            )
        return DiagonalMatrix(empty(n))


@hadamard.register(where=lambda A, B: A.shape[-2:] == B.shape[-2:])
def _(A: DiagonalMatrix, B: LinearOperator | Tensor) -> LinearOperator:
    return DiagonalMatrix(A.diagonal * diagonal(operator(B)))


@fans.register
def _(A: DiagonalMatrix) -> tuple[Fan, ...]:
    return (Fan(1, 1, last=True),)


@contractions.register
def _(A: DiagonalMatrix) -> tuple[Contraction, ...]:
    return chained(contraction(A.diagonal, "n", "n", "n", n=A.shape[-1]))


@project.register
def _(recipe: Diagonal, W: Inexact[Tensor, "*batch m n"]) -> DiagonalMatrix:
    recipe.blank(W.shape[-2], W.shape[-1], W.new_empty)  # refuses rectangles
    return DiagonalMatrix(torch.diagonal(W, dim1=-2, dim2=-1).clone())
