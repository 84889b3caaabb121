"""Error against storage: what a structure costs for every error, for all budgets at once.

The error of the best member with at most `s m n` numbers is `E(s) = min ||A - B||_F / ||A||_F`.
Where a structure is "low rank after a rearrangement into blocks", the best members follow from the
singular values of the blocks, which compete by the squared error that they remove for each stored
number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FLOOR = 1e-12
"""Relative errors below are rounding."""


@dataclass(frozen=True)
class Curve:
    """Relative error against storage, a step function.

    Args:
        storage: Stored numbers as a fraction of those of the dense matrix, increasing.
        error: Relative Frobenius error with that much storage, decreasing.

    Examples:
        >>> curve = Curve(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.0]))
        >>> curve.at(0.05), round(curve.at(0.3), 3), curve.reach(0.0)
        (1.0, 0.2, 0.5)
    """

    storage: Float[Tensor, " k"]
    error: Float[Tensor, " k"]

    def at(self, storage: float) -> float:
        """The error with at most this storage; 1, that of nothing, where no member is so small."""
        i = int(torch.searchsorted(self.storage, storage * (1 + 1e-6), right=True))
        return max(float(self.error[i - 1]), FLOOR) if i else 1.0

    def reach(self, error: float) -> float:
        """The least storage with at most this error; infinite where no member is so near."""
        good = (self.error <= max(error, FLOOR)).nonzero()
        return float(self.storage[good[0, 0]]) if len(good) else float("inf")

    def thinned(self, points: int = 60) -> "Curve":
        """At most so many of its points, evenly by the logarithm of the storage."""
        if len(self.storage) <= points:
            return self
        low, high = float(self.storage[0]), float(self.storage[-1])
        wanted = torch.logspace(
            0, 1, points, base=max(high / max(low, 1e-12), 1), dtype=self.storage.dtype
        )
        chosen = (
            torch.searchsorted(self.storage, low * wanted * (1 + 1e-9), right=True) - 1
        ).clamp(0)
        chosen = torch.unique(torch.cat([chosen, torch.tensor([len(self.storage) - 1])]))
        return Curve(self.storage[chosen], self.error[chosen])


def lowest(curves: Sequence[Curve]) -> Curve:
    """The best of several curves at every storage."""
    storage, order = torch.cat([c.storage for c in curves]).sort(stable=True)
    error = torch.cat([c.error for c in curves])[order].cummin(0).values
    better = torch.cat([torch.ones(1, dtype=torch.bool), error[1:] < error[:-1]])
    return Curve(storage[better], error[better])


def from_steps(costs: Float[Tensor, " k"], gains: Float[Tensor, " k"], size: int) -> Curve:
    """The curve of steps taken one after the other.

    Args:
        costs: The numbers that each step stores.
        gains: The squared error that it removes; all steps together remove all of it.
        size: Numbers of the dense matrix.
    """
    total = gains.sum()
    left = gains.flip(0).cumsum(0).flip(0)  # from the end, so that no small rest is cancelled
    left = torch.cat([left[1:], left.new_zeros(1)])
    error = (left / total).clamp(0, 1).sqrt() if total > 0 else torch.zeros_like(left)
    return Curve(costs.cumsum(0) / size, error)


@dataclass(frozen=True)
class Steps:
    """The order in which the singular values of several stacks of blocks are taken.

    Rank one after the other, each costs `p + q` numbers for a block of `p x q`; where factors would
    cost more than the block, the last step stores it as it is.

    Args:
        costs: Numbers of each step, in the order in which they are taken.
        gains: Squared error that each removes.
        stack: The stack of each step's block.
        block: The block in that stack.
        counts: The number of blocks of each stack.
        most: The steps of one block of each stack.
    """

    costs: Float[Tensor, " k"]
    gains: Float[Tensor, " k"]
    stack: Int[Tensor, " k"]
    block: Int[Tensor, " k"]
    counts: tuple[int, ...]
    most: tuple[int, ...]

    def ranks(self, numbers: float) -> list[Int[Tensor, " _"]]:
        """The steps of each block that are taken with so many numbers."""
        taken = self.costs.cumsum(0) <= numbers * (1 + 1e-6)
        return [
            torch.bincount(self.block[taken & (self.stack == s)], minlength=count)
            for s, count in enumerate(self.counts)
        ]


def competing(values: Sequence[Float[Tensor, "_ _"]], shapes: Sequence[tuple[int, int]]) -> Steps:
    """The steps of blocks whose singular values compete: the best ranks for every storage.

    Args:
        values: For each stack its blocks' singular values, a row for each block.
        shapes: Rows and columns of the blocks of each stack.
    """
    parts = [_steps(v.square(), p, q) for v, (p, q) in zip(values, shapes, strict=True)]
    rows = [_one_by_one(s, *part) for s, part in enumerate(parts)]
    worth, *columns = (torch.cat(column) for column in zip(*rows, strict=True))
    order = worth.sort(descending=True, stable=True).indices
    costs, gains, stack, block = (column[order] for column in columns)
    most = tuple([g.shape[1] for _, _, g in parts])
    return Steps(costs, gains, stack, block, tuple(map(len, values)), most)


def _one_by_one(s: int, worth: Tensor, costs: Tensor, gains: Tensor) -> tuple[Tensor, ...]:
    """Worth, cost, gain, stack and block of each step of a stack."""
    blocks = torch.arange(len(gains))[:, None].expand_as(gains)
    stacks = torch.full((gains.numel(),), s)
    found = (worth, costs.expand_as(gains), gains, stacks, blocks)
    return tuple([column.flatten() for column in found])


def _steps(energy: Float[Tensor, "b r"], p: int, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Worth, costs and gains of the steps of blocks of one shape."""
    full = -(-p * q // (p + q))  # factors of this rank would cost as much as the block
    gains = torch.cat([energy[:, : full - 1], energy[:, full - 1 :].sum(1, keepdim=True)], 1)
    costs = torch.full((full,), float(p + q), dtype=energy.dtype)
    costs[-1] = p * q - (full - 1) * (p + q)
    worth = (gains / costs).cummin(1).values  # a step is not taken before those that it builds on
    return worth, costs, gains


def equal_ranks(
    values: Sequence[Float[Tensor, "_ _"]], shapes: Sequence[tuple[int, int]], size: int
) -> Curve:
    """The curve of members whose blocks all have one rank.

    Args:
        values: For each stack its blocks' singular values, a row for each block.
        shapes: Rows and columns of the blocks of each stack.
        size: Numbers of the dense matrix.
    """
    gains = torch.zeros(max(v.shape[1] for v in values), dtype=values[0].dtype)
    for v in values:
        gains[: v.shape[1]] += v.square().sum(0)
    cost = sum(len(v) * (p + q) for v, (p, q) in zip(values, shapes, strict=True))
    return from_steps(torch.full_like(gains, cost), gains, size)
