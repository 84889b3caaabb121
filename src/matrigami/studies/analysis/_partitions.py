"""Partitions: the entries of a matrix as stacks of blocks, each of which is to have low rank.

Low rank itself is one block; block low rank a grid of tiles; HODLR and H matrices tiles of all
sizes, chosen by weak and by strong admissibility; a sum of Kronecker products the one block of Van
Loan and Pitsianis (1993); Monarch a grid of tiles after a perfect shuffle. A size that blocks do
not divide is padded: those places point behind the last entry, at a zero.

Shapes: b = blocks of a stack, p = their rows, q = their columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAF = 8
"""Least rows of the smallest blocks."""


@dataclass(frozen=True)
class Partition:
    """Stacks of blocks of one matrix.

    Args:
        size: Rows and columns of the matrix.
        places: For each stack the flat places of its blocks' entries; `m n` for a zero.
        far: For each stack whether its blocks lie off the diagonal ones, and grow with the level.
    """

    size: tuple[int, int]
    places: tuple[Int[Tensor, "_ _ _"], ...]
    far: tuple[bool, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the blocks of each stack."""
        return [(p.shape[1], p.shape[2]) for p in self.places]

    def blocks(self, A: Float[Tensor, "m n"]) -> list[Float[Tensor, "_ _ _"]]:
        """The stacks."""
        entries = torch.cat([A.flatten(), A.new_zeros(1)])
        return [entries[p] for p in self.places]

    def matrix(self, blocks: Sequence[Float[Tensor, "_ _ _"]]) -> Float[Tensor, "m n"]:
        """The matrix of the blocks."""
        m, n = self.size
        entries = blocks[0].new_zeros(m * n + 1)
        for places, block in zip(self.places, blocks, strict=True):
            entries[places.flatten()] = block.flatten()
        return entries[:-1].reshape(m, n)


def whole(m: int, n: int) -> Partition:
    """One block."""
    return Partition((m, n), (torch.arange(m * n).reshape(1, m, n),))


def tiles(m: int, n: int, rows: int, columns: int) -> Partition:
    """A grid of `rows x columns` tiles."""
    grid = _join(_split(m, rows)[:, None], _split(n, columns)[None], m, n)
    return Partition((m, n), (grid.flatten(0, 1),))


def shuffled_tiles(m: int, n: int, rows: int, columns: int) -> Partition:
    """A grid of tiles, the rows of each as far apart as there are row blocks: Monarch matrices."""
    shuffled = torch.arange(math.ceil(m / rows) * rows).reshape(-1, rows).T
    grid = _join(shuffled[:, None], _split(n, columns)[None], m, n)
    return Partition((m, n), (grid.flatten(0, 1),))


def kronecker(m: int, n: int, rows: int, columns: int) -> Partition:
    """The rearrangement in which a product with a `rows x columns` factor has rank one."""
    tiled = _join(_split(m, rows)[:, None], _split(n, columns)[None], m, n)
    return Partition((m, n), (tiled.flatten(2).flatten(0, 1)[None],))


def weak(m: int, n: int) -> Partition:
    """HODLR: siblings of all levels, and the leaves on the diagonal."""
    return _hierarchy(m, n, [~torch.eye(len(mask), dtype=torch.bool) for mask in apart(m, n)])


def strong(m: int, n: int, admissible: Sequence[Bool[Tensor, "_ _"]] | None = None) -> Partition:
    """H matrices: the largest blocks of clusters that are apart, and the near ones of the leaves.

    Args:
        m: Rows.
        n: Columns.
        admissible: For each level the pairs of clusters that are apart; None for those that are not
            next to each other in the order.
    """
    return _hierarchy(m, n, apart(m, n) if admissible is None else admissible)


def apart(m: int, n: int) -> list[Bool[Tensor, "_ _"]]:
    """Pairs of clusters that are not neighbours in the order, for each level."""
    counts = [torch.arange(2 ** (level + 1)) for level in range(depth(m, n))]
    return [(i[:, None] - i).abs() > 1 for i in counts]


def apart_in_space(
    m: int, n: int, rows: Float[Tensor, "m d"], columns: Float[Tensor, "n d"], eta: float = 1.0
) -> list[Bool[Tensor, "_ _"]]:
    """Pairs of clusters whose boxes have `min(diameter) <= eta distance` (Hackbusch), by level."""
    masks = []
    for level in range(depth(m, n)):
        (a, b), (c, d) = (_boxes(X, level, depth(m, n)) for X in (rows, columns))
        gap = torch.maximum(a[:, None] - d, c - b[:, None]).clamp(0).square().sum(-1).sqrt()
        diameters = torch.minimum((b - a).norm(dim=-1)[:, None], (d - c).norm(dim=-1))
        masks.append((diameters <= eta * gap) & (gap > 0))
    return masks


def depth(m: int, n: int) -> int:
    """Halvings of the whole matrix."""
    most = max(min(m, n), 1)
    return max(int(math.log2(most / max(LEAF, most / 32))), 0)


def _hierarchy(m: int, n: int, admissible: Sequence[Bool[Tensor, "_ _"]]) -> Partition:
    """The largest admissible blocks, and what remains of the last level."""
    open_ = torch.ones(1, 1, dtype=torch.bool)
    rows, columns = torch.arange(m)[None], torch.arange(n)[None]
    places, far = [], []
    for level, mask in enumerate(admissible):
        open_ = open_.repeat_interleave(2, 0).repeat_interleave(2, 1)
        rows, columns = (_clusters(size, level, len(admissible)) for size in (m, n))
        if (open_ & mask).any():
            places.append(_places(m, n, rows, columns, (open_ & mask).nonzero()))
            far.append(True)
        open_ = open_ & ~mask
    if open_.any():
        places.append(_places(m, n, rows, columns, open_.nonzero()))
        far.append(False)
    return Partition((m, n), tuple(places), tuple(far))


def _places(
    m: int, n: int, rows: Int[Tensor, "c p"], columns: Int[Tensor, "d q"], pairs: Int[Tensor, "b 2"]
) -> Int[Tensor, "b p q"]:
    """The places of pairs of clusters."""
    return _join(rows[pairs[:, 0]], columns[pairs[:, 1]], m, n)


def _split(n: int, blocks: int) -> Int[Tensor, "c p"]:
    """Indices in clusters of one size; those beyond `n` are padding."""
    return torch.arange(math.ceil(n / blocks) * blocks).reshape(blocks, -1)


def _clusters(n: int, level: int, levels: int) -> Int[Tensor, "c p"]:
    """Indices in the clusters of a level, each made of two of the next."""
    return _split(n, 2**levels).reshape(2 ** (level + 1), -1)


def _join(
    rows: Int[Tensor, "*b p"], columns: Int[Tensor, "*c q"], m: int, n: int
) -> Int[Tensor, "*d p q"]:
    """Flat places of all pairs of rows and columns; those of padding are `m n`."""
    inside = (rows < m)[..., :, None] & (columns < n)[..., None, :]
    return torch.where(inside, rows[..., :, None] * n + columns[..., None, :], m * n)


def _boxes(X: Float[Tensor, "n d"], level: int, levels: int) -> tuple[Tensor, Tensor]:
    """The corners of the boxes around the clusters of a level."""
    places = _clusters(len(X), level, levels).clamp(max=len(X) - 1)
    return X[places].amin(1), X[places].amax(1)


def factor_sizes(m: int, n: int) -> list[tuple[int, int]]:
    """Sizes of a left factor: its share of `m` and of `n` is the same, by logarithms.

    Shares are those of powers of two, and those of the divisors of the shorter side: a layer of 16
    inputs and 24 outputs has curvature of size 384, and factors of these sizes.
    """
    least = max(min(m, n), 2)
    most = max(int(math.log2(least)), 2)
    divisors = [math.log(d) / math.log(least) for d in range(2, least) if least % d == 0]
    shares = [*(i / most for i in range(1, most)), *divisors]
    pairs = [(_divisor(m, m**share), _divisor(n, n**share)) for share in shares]
    return list(dict.fromkeys(pair for pair in pairs if pair not in {(1, 1), (m, n)}))


def _divisor(n: int, near: float) -> int:
    """The divisor nearest to a number by its ratio; if none is within a factor of 2, the number."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    best = min(divisors, key=lambda d: abs(math.log(d / near)))
    return best if abs(math.log(best / near)) <= math.log(2) + 1e-9 else round(near)
