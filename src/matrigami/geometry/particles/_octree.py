"""Octrees (quadtrees, binary trees) of cells, adaptive, without recursion: one batch for a level.

Points are ordered along Morton's curve, so that every cell is a range of them. A cell with more
than `cap` points is split. Cells of one level that touch are neighbours. Targets and sources share
the tree.

Shapes: n = points, N = cells of a level, d = dimension, D = 3^d neighbours.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DEPTH = 20
"""Most levels: three coordinates of that many bits fit into an integer."""


@dataclass(frozen=True)
class Cloud:
    """Points in the order of their cells.

    Attributes:
        order: The point at each place of the order.
        codes: Its cell at the last level, ascending.
    """

    order: Int[Tensor, " n"]
    codes: Int[Tensor, " n"]

    def ranges(
        self, codes: Int[Tensor, " N"], level: int, d: int
    ) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """First point, and number of points, of each cell of a level."""
        shift = d * (DEPTH - level)
        ends = torch.stack([codes << shift, (codes + 1) << shift])
        start, stop = torch.searchsorted(self.codes, ends)
        return start, stop - start


@dataclass(frozen=True)
class Level:
    """The cells of one level that are not empty.

    Attributes:
        codes: Places on Morton's curve, ascending.
        split: Which have children.
        neighbours: For each offset in `offsets(d)` the index of that neighbour, or -1.
        targets: First point and number of points of each cell.
        sources: The same.
    """

    codes: Int[Tensor, " N"]
    split: Bool[Tensor, " N"]
    neighbours: Int[Tensor, "N D"]
    targets: tuple[Int[Tensor, " N"], Int[Tensor, " N"]]
    sources: tuple[Int[Tensor, " N"], Int[Tensor, " N"]]


@dataclass(frozen=True)
class Octree:
    """Levels from the root, which is the cube at `corner` with edges `side`."""

    levels: tuple[Level, ...]
    corner: Float[Tensor, " d"]
    side: float
    targets: Cloud
    sources: Cloud

    def centers(self, level: int, codes: Int[Tensor, " N"]) -> Float[Tensor, "N d"]:
        """The middle of cells."""
        d = len(self.corner)
        h = self.side / 2**level
        return self.corner + h * (decoded(codes, d).to(self.corner.dtype) + 0.5)


def offsets(d: int) -> Int[Tensor, "D d"]:
    """The places of the neighbours of a cell, itself in the middle."""
    return torch.tensor(list(product((-1, 0, 1), repeat=d)))


def encoded(cells: Int[Tensor, "... d"]) -> Int[Tensor, "..."]:
    """The place of cells on Morton's curve: the bits of their coordinates in turn."""
    d = cells.shape[-1]
    codes = torch.zeros_like(cells[..., 0])
    for bit in range(DEPTH):
        for axis in range(d):
            codes |= ((cells[..., axis] >> bit) & 1) << (d * bit + d - 1 - axis)
    return codes


def decoded(codes: Int[Tensor, "..."], d: int) -> Int[Tensor, "... d"]:
    """The coordinates of cells."""
    cells = torch.zeros(*codes.shape, d, dtype=codes.dtype, device=codes.device)
    for bit in range(DEPTH):
        for axis in range(d):
            cells[..., axis] |= ((codes >> (d * bit + d - 1 - axis)) & 1) << bit
    return cells


def octree(
    targets: Float[Tensor, "m d"], sources: Float[Tensor, "n d"], cap: int, occupancy: float
) -> Octree:
    """Split until no cell holds more than `cap` points.

    Args:
        targets: Where sums are evaluated.
        sources: What is summed; the same tensor for one cloud.
        cap: Most points of a cell that is not split.
        occupancy: Points that a cell of the last level would hold if they were uniform: the root is
            made larger than the points for that.
    """
    same = targets is sources
    both = sources if same else torch.cat([targets, sources])
    d = both.shape[1]
    low, high = both.amin(0), both.amax(0)
    extent = float((high - low).max()) * (1 + 1e-9) or 1.0
    across = _across(len(sources), occupancy, d)  # whole cells: no thin ones
    side = extent * 2 ** math.ceil(math.log2(across)) / across
    corner = low - 0.5e-9 * extent
    clouds = [_cloud(X, corner, side) for X in ([sources] if same else [targets, sources])]
    to, of = clouds[0], clouds[-1]
    levels, codes = [], torch.zeros(1, dtype=torch.int64, device=both.device)
    for level in range(DEPTH + 1):
        inside = [cloud.ranges(codes, level, d) for cloud in clouds]
        count = torch.stack([size for _, size in inside]).sum(0)
        keep = count > 0
        codes, count = codes[keep], count[keep]
        to_range, of_range = ((start[keep], size[keep]) for start, size in (inside[0], inside[-1]))
        apart = _differ(to, to_range) | _differ(of, of_range)
        split = (count > (cap if same else 2 * cap)) & (level < DEPTH) & apart
        levels.append(Level(codes, split, _neighbours(codes, level, d), to_range, of_range))
        if not split.any():
            break
        octants = torch.arange(2**d, device=codes.device)
        codes = (codes[split][:, None] * 2**d + octants).flatten()
    return Octree(tuple(levels), corner, side, to, of)


def _across(n: int, occupancy: float, d: int) -> int:
    """Cells along an edge for a near field of `3^d occupancy` points on the average.

    `G` cells have `3 - 2 / G` neighbours along an axis, for those at the surface have fewer: a
    small cube takes larger cells, and each of its points as many numbers as in a large one.
    """

    def excess(G: int) -> float:
        """How far the near field is from that."""
        return abs(math.log(max(n, 1) * ((3 - 2 / G) / (3 * G)) ** d / occupancy))

    most = max(math.ceil((n / occupancy) ** (1 / d)), 1)
    return min(range(max(most - 3, 1), most + 1), key=excess)


def _cloud(X: Float[Tensor, "n d"], corner: Tensor, side: float) -> Cloud:
    """Points along Morton's curve."""
    cells = ((X - corner) / side * 2**DEPTH).long().clamp(0, 2**DEPTH - 1)
    codes, order = encoded(cells).sort(stable=True)
    return Cloud(order, codes)


def _differ(cloud: Cloud, cells: tuple[Tensor, Tensor]) -> Bool[Tensor, " N"]:
    """Whether the points of a cell are not all in one place."""
    start, count = cells
    last = len(cloud.codes) - 1
    first, end = start.clamp(max=last), (start + count - 1).clamp(0, last)
    return cloud.codes[first] != cloud.codes[end]


def _neighbours(codes: Int[Tensor, " N"], level: int, d: int) -> Int[Tensor, "N D"]:
    """The cells of this level that touch each cell, and the cell itself."""
    cells = decoded(codes, d)[:, None, :] + offsets(d).to(codes.device)
    inside = ((cells >= 0) & (cells < 2**level)).all(-1)
    wanted = encoded(cells.clamp(min=0))
    place = torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)
    return torch.where(inside & (codes[place] == wanted), place, -1)
