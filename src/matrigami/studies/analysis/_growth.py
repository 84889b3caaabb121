"""How ranks grow with blocks: `rank ~ size^alpha`.

0 for smooth kernels of blocks that are apart and for points on a line, 1/2 and 2/3 for
neighbouring blocks of points in two and three dimensions, 1 where there is no structure.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.studies.analysis._partitions import Partition

ACCURACIES = (1e-1, 1e-2, 1e-4)
"""Relative errors of a block in the Frobenius norm."""

SMALLEST = 8
"""Smaller blocks say nothing."""


def growth(A: Float[Tensor, "m n"], part: Partition) -> dict[str, float | None]:
    """The exponent of the mean rank of the far blocks, by accuracy; None from one size alone."""
    stacks = [
        torch.linalg.svdvals(stack)
        for stack, far in zip(part.blocks(A), part.far, strict=True)
        if far and min(stack.shape[1:]) >= SMALLEST
    ]
    found: dict[str, float | None] = {}
    for accuracy in ACCURACIES:
        ranks = [float(_ranks(values, accuracy).mean()) for values in stacks]
        found[f"{accuracy:g}"] = _slope([v.shape[1] for v in stacks], ranks)
    return found


def _ranks(values: Float[Tensor, "b r"], accuracy: float) -> Float[Tensor, " b"]:
    """The least rank of each block with this relative error, at least 1."""
    tails = values.square().flip(1).cumsum(1).flip(1)
    return (tails > accuracy**2 * tails[:, :1]).sum(1).clamp(1).to(values)


def _slope(sizes: Sequence[int], ranks: Sequence[float]) -> float | None:
    """Of the logarithms."""
    if len(set(sizes)) < 2:
        return None
    x = np.array([math.log(size) for size in sizes])
    y = np.array([math.log(rank) for rank in ranks])
    return float(np.polyfit(x, y, 1)[0])
