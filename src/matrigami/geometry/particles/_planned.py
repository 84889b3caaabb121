"""Blocks at known places whose numbers are computed when they are asked for.

What a process does not own it needs to know the places of, for messages, but never the numbers.

Shapes: o = blocks of p x q, k = chosen blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from matrigami.geometry.particles._points import check_memory
from matrigami.operators import Places
from matrigami.structures import PlacedBlocksMatrix

Make = Callable[[Int[Tensor, " k"]], Tensor]
"""From the numbers of blocks to their entries."""


@dataclass(frozen=True, eq=False, repr=False)
class PlannedBlocksMatrix(PlacedBlocksMatrix):
    """Placed blocks that take no memory; `blocks` has their shape and type alone.

    Args:
        make: Computes some of them.
    """

    make: Make

    def chosen(self, kept: Int[Tensor, " k"]) -> Inexact[Tensor, "k p q"]:
        """The entries of some blocks.

        Raises:
            ValueError: If they do not fit into the memory.
        """
        p, q = self.blocks.shape[-2:]
        check_memory(f"the blocks of {len(kept)} leaves", 1.2 * len(kept) * p * q, self.blocks)
        return self.make(kept)

    def matmat(self, X: Inexact[Tensor, "n r"]) -> Inexact[Tensor, "m r"]:
        """All of them, for this product."""
        every = torch.arange(len(self.blocks), device=self.blocks.device)
        blocks = self.chosen(every)
        return PlacedBlocksMatrix(blocks, self.rows, self.columns, self.size).matmat(X)

    @property
    def T(self) -> "PlannedBlocksMatrix":
        """The same plan, for transposed blocks."""
        size = (self.size[1], self.size[0])
        return PlannedBlocksMatrix(
            self.blocks.mT, self.columns, self.rows, size, lambda kept: self.make(kept).mT
        )


def placed(
    make: Make,
    rows: Int[Tensor, "o p"],
    columns: Int[Tensor, "o ..."],
    size: tuple[int, int],
    width: int,
    like: Float[Tensor, "..."],
    planned: bool,
) -> PlacedBlocksMatrix:
    """Blocks of so many columns, computed now or planned."""
    at = Places(rows[:, None]), Places(columns[:, None])
    if planned:
        return PlannedBlocksMatrix(like.new_zeros(()).expand(*rows.shape, width), *at, size, make)
    return PlacedBlocksMatrix(make(torch.arange(len(rows), device=rows.device)), *at, size)
