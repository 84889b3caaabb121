"""Dense: no structure. Storage and cost per vector: `m n`.

Shapes: m = rows, n = columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    DenseMatrix,
    Fan,
    Metric,
    Structure,
    draw,
    fans,
    inverse,
    metric_project,
    project,
)


@dataclass(frozen=True)
class Dense(Structure):
    """Every matrix.

    Examples:
        >>> Dense().init(3, 4)
        DenseMatrix(3x4, 12 parameters)
    """

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DenseMatrix:
        """Draw a Gaussian matrix."""
        return draw(DenseMatrix(torch.empty(m, n, dtype=dtype, device=device)), generator)


@fans.register
def _(A: DenseMatrix) -> tuple[Fan, ...]:
    return (Fan(A.shape[-1], A.shape[-2], last=True),)


@inverse.register
def _(A: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(torch.linalg.inv(A.entries))


@project.register
def _(recipe: Dense, W: Inexact[Tensor, "*batch m n"]) -> DenseMatrix:
    return DenseMatrix(W.clone())


@metric_project.register
def _(recipe: Dense, W: Tensor, start: DenseMatrix, metric: Metric) -> DenseMatrix:
    return start
