"""The near field: for each leaf one dense block, of its points and of all points that touch it.

Leaves of about as many points, with about as many neighbours, make one stack of blocks.

Shapes: l = leaves of a stack, p = points of a leaf, q = points near it, d = dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matrigami.geometry.particles._octree import DEPTH, Cloud, Octree
from matrigami.geometry.particles._planned import placed
from matrigami.geometry.particles._points import check_memory
from matrigami.operators import is_differentiated
from matrigami.structures import PlacedBlocksMatrix

ROUND = 4
"""Points of leaves are padded to a multiple of this."""

STEP = 1.125
"""Points near a leaf are padded to a power of this."""

CHUNK = 2**19
"""Entries that are computed at a time: they stay in the cache."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Points of targets and sources to the entries of the kernel."""


@dataclass(frozen=True)
class Leaves:
    """Leaves of one level with about as many points.

    Attributes:
        level: Their level.
        codes: Their places on the curve.
        number: Their numbers among all leaves in the order of the curve.
        points: Their points; one past the last for none.
    """

    level: int
    codes: Int[Tensor, " l"]
    number: Int[Tensor, " l"]
    points: Int[Tensor, "l p"]


def ragged(
    start: Int[Tensor, " e"], count: Int[Tensor, " e"]
) -> tuple[Int[Tensor, " total"], Int[Tensor, " total"]]:
    """The members of ranges one after the other, and the range of each."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    first = count.cumsum(0) - count
    member = torch.arange(len(owner), device=count.device) - first[owner] + start[owner]
    return member, owner


def _firsts(tree: Octree) -> tuple[Int[Tensor, " L"], list[Int[Tensor, " N"]]]:
    """Where leaves begin on the curve, ascending, and the number of each cell if it is one."""
    d = len(tree.corner)
    begin = [
        (level.codes << (d * (DEPTH - i)))[~level.split] for i, level in enumerate(tree.levels)
    ]
    firsts = torch.cat(begin).sort().values
    numbers = [
        torch.searchsorted(firsts, level.codes << (d * (DEPTH - i)))
        for i, level in enumerate(tree.levels)
    ]
    return firsts, numbers


def gathered_leaves(tree: Octree, *, of_targets: bool) -> list[Leaves]:
    """Stacks of the leaves that hold points, by level and number of points."""
    cloud = tree.targets if of_targets else tree.sources
    _, numbers = _firsts(tree)
    stacks = []
    for depth, level in enumerate(tree.levels):
        start, count = level.targets if of_targets else level.sources
        size = (count + ROUND - 1) // ROUND * ROUND
        size = torch.where(level.split, 0, size)
        for p in size.unique().tolist():
            here = (size == p).nonzero()[:, 0]
            if not p:
                continue
            points = _padded(cloud, start[here], count[here], p)
            stacks.append(Leaves(depth, level.codes[here], numbers[depth][here], points))
    return stacks


def _padded(cloud: Cloud, start: Tensor, count: Tensor, p: int) -> Int[Tensor, "l p"]:
    """The points of ranges, one past the last for none."""
    place = torch.arange(p, device=start.device)
    index = (start[:, None] + place).clamp(max=len(cloud.order) - 1)
    return torch.where(place < count[:, None], cloud.order[index], len(cloud.order))


def _touching(tree: Octree) -> tuple[Tensor, Tensor, Tensor]:
    """All ranges of sources near a leaf: its number, the first source, how many."""
    firsts, numbers = _firsts(tree)
    d = len(tree.corner)
    found = []
    for depth, level in enumerate(tree.levels):
        cell, slot = (level.neighbours >= 0).nonzero(as_tuple=True)
        mate = level.neighbours[cell, slot]
        start, count = level.sources
        own = ~level.split[cell]
        found.append((numbers[depth][cell[own]], start[mate[own]], count[mate[own]]))
        above = level.split[cell] & ~level.split[mate]  # leaves below a cell, near a leaf
        shift = d * (DEPTH - depth)
        ends = torch.stack(
            [level.codes[cell[above]] << shift, (level.codes[cell[above]] + 1) << shift]
        )
        begin, stop = torch.searchsorted(firsts, ends)
        below, owner = ragged(begin, stop - begin)
        near = mate[above][owner]
        found.append((below, start[near], count[near]))
    leaf, start, count = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = leaf.argsort(stable=True)
    return leaf[order], start[order], count[order]


def near_field(
    tree: Octree,
    stacks: list[Leaves],
    targets: Float[Tensor, "m d"],
    sources: Float[Tensor, "n d"],
    entries: Entries,
    planned: bool = False,
) -> tuple[PlacedBlocksMatrix, ...]:
    """The blocks between leaves and what touches them, computed now or planned."""
    leaf, start, count = _touching(tree)
    members, _ = ragged(start, count)
    total = torch.zeros(int(leaf.max()) + 1, dtype=count.dtype, device=count.device)
    total = total.index_add(0, leaf, count)
    near = tree.sources.order[members]
    first = total.cumsum(0) - total
    wanted = sum(float(total[s.number].sum()) * s.points.shape[1] for s in stacks)
    check_memory("the near field of these points", 1.2 * wanted * (not planned), sources)
    X, Y = torch.cat([targets, targets[:1]]), torch.cat([sources, sources[:1]])
    found = []
    for stack in stacks:
        q = total[stack.number]
        step = torch.ceil(q.clamp(min=1).log() / torch.tensor(STEP).log())
        for s in step.unique():
            here = (step == s).nonzero()[:, 0]
            number = stack.number[here]
            width = int(q[here].max())
            place = torch.arange(width, device=q.device)
            index = (first[number][:, None] + place).clamp(max=len(near) - 1)
            columns = torch.where(place < total[number][:, None], near[index], len(sources))
            rows = stack.points[here]
            make = partial(_blocks, entries, X, rows, Y, columns)
            size = (len(targets), len(sources))
            found.append(placed(make, rows, columns, size, width, Y, planned))
    return tuple(found)


def _blocks(
    entries: Entries, X: Tensor, rows: Tensor, Y: Tensor, columns: Tensor, kept: Tensor
) -> Float[Tensor, "l p q"]:
    """The kernel of the points of some blocks, a few blocks at a time."""
    rows, columns = rows[kept], columns[kept]
    if is_differentiated(entries(X[rows[:1, :1]], Y[columns[:1, :1]])):  # in a parameter, too
        return entries(X[rows], Y[columns])
    at_a_time = max(CHUNK // max(rows.shape[1] * columns.shape[1], 1), 1)
    out = X.new_empty(*rows.shape, columns.shape[1])
    pieces = zip(rows.split(at_a_time), columns.split(at_a_time), out.split(at_a_time), strict=True)
    for r, c, block in pieces:
        block.copy_(entries(X[r], Y[c]))
    return out
