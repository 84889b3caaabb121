"""Who owns what of an H2 matrix, and which coefficients travel.

Every process owns runs of cells along the curve: below the level where there are enough cells for
all, whole subtrees; above it, a cell goes to the owner of its first child. Points belong to the
owner of their leaf. A block is computed by the owner of its rows; what it reads of others is its
*halo*, which comes in one message for each pair of processes and part.

Shapes: u = units of q rows, k = vectors, e = places of a block, w = processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Inexact, Int
from torch import Tensor

from matrigami.geometry.particles._planned import PlannedBlocksMatrix
from matrigami.operators import Cost, LinearOperator, Places, cost
from matrigami.structures import H2Matrix, PlacedBlocksMatrix, summed_products

Group = dist.ProcessGroup | None
"""Processes; None for all."""

ENOUGH = 8
"""Cells for each process, of the level that is dealt out."""


@dataclass(frozen=True, eq=False)
class Halo:
    """What a process sends and receives, in units of `q` rows.

    Attributes:
        own: Units of its own.
        sent: Which of these it sends, receiver by receiver.
        outgoing: How many to each process.
        incoming: How many from each.
        group: The processes.
        busy: Whether any process reads of another one.
    """

    own: int
    sent: Int[Tensor, " e"]
    outgoing: list[int]
    incoming: list[int]
    group: Group
    busy: bool

    def extended(self, X: Inexact[Tensor, "... n k"], q: int) -> Inexact[Tensor, "... _ k"]:
        """The rows of a process, and behind them those of others that it reads."""
        if not self.busy:
            return X
        return _Exchange.apply(X, self, q, False)  # pyright: ignore[reportReturnType]

    def reduced(self, X: Inexact[Tensor, "... n k"], q: int) -> Inexact[Tensor, "... _ k"]:
        """The adjoint: what was computed for others goes to them, and is added there."""
        if not self.busy:
            return X
        return _Exchange.apply(X, self, q, True)  # pyright: ignore[reportReturnType]

    def extend(self, X: Tensor, q: int) -> Tensor:
        """`extended`, without its derivative."""
        units = X.unflatten(-2, (self.own, q)).movedim(-3, 0)
        halo = self._exchange(units[self.sent], self.outgoing, self.incoming)
        return torch.cat([units, halo]).movedim(0, -3).flatten(-3, -2)

    def reduce(self, X: Tensor, q: int) -> Tensor:
        """`reduced`, without its derivative."""
        units = X.unflatten(-2, (self.own + sum(self.incoming), q)).movedim(-3, 0)
        back = self._exchange(units[self.own :], self.incoming, self.outgoing)
        return units[: self.own].index_add(0, self.sent, back).movedim(0, -3).flatten(-3, -2)

    def _exchange(self, units: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        """One message to and from every process."""
        units = units.contiguous()
        found = units.new_empty(sum(incoming), *units.shape[1:])
        dist.all_to_all_single(found, units, incoming, outgoing, group=self.group)
        return found


class _Exchange(torch.autograd.Function):
    """Extension and reduction are each other's derivative."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, halo: Halo, q: int, back: bool) -> Tensor:
        """Exchange."""
        ctx.halo, ctx.q, ctx.back = halo, q, back
        return halo.reduce(X, q) if back else halo.extend(X, q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Exchange the other way."""
        call = ctx.halo.extended if ctx.back else ctx.halo.reduced
        return call(grads[0], ctx.q), None, None, None


@dataclass(frozen=True, eq=False, repr=False)
class SharedBlocksMatrix(LinearOperator):
    """The blocks in the rows of one process, of which several read the same columns.

    Args:
        parts: From the columns of this process, and those of others behind them, to its rows.
        halo: What is read of others.
        unit: Columns of a unit of the halo.
        size: Rows and columns of this process.
        transposed: Whether this is the transpose, which delivers what it computes for others.
    """

    parts: tuple[PlacedBlocksMatrix, ...]
    halo: Halo
    unit: int
    size: tuple[int, int]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of this process."""
        return self.size

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Fetch and multiply; or multiply, deliver and add up."""
        if self.transposed:
            rows = self.size[0] + sum(self.halo.incoming) * self.unit
            return self.halo.reduced(summed_products(self.parts, X, rows), self.unit)
        return summed_products(self.parts, self.halo.extended(X, self.unit), self.size[0])

    @property
    def T(self) -> "SharedBlocksMatrix":
        """The other direction."""
        parts = tuple([B.T for B in self.parts])
        return SharedBlocksMatrix(
            parts, self.halo, self.unit, (self.size[1], self.size[0]), not self.transposed
        )

    def dense(self) -> Inexact[Tensor, "m n"]:
        """The rows and columns of this process."""
        return self.matmat(torch.eye(self.size[1], dtype=self.dtype, device=self.device))


@cost.register
def _(A: SharedBlocksMatrix) -> Cost:
    """Of this process."""
    return sum((cost(B) for B in A.parts), Cost(0, 0, 0))


class Owners(NamedTuple):
    """The owner of each row: of targets, of sources, and of the coefficients of each level."""

    targets: Int[Tensor, " m"]
    sources: Int[Tensor, " n"]
    levels: list[Int[Tensor, " _"]]


def owners(A: H2Matrix, processes: int) -> Owners:
    """Deal out the cells of a level with enough of them, by the points below; the rest follows."""
    couplings: tuple[Any, ...] = A.couplings
    transfers: tuple[Any, ...] = A.up
    widths = [C.blocks.shape[-1] for C in couplings]
    cells = [C.shape[0] // w for C, w in zip(couplings, widths, strict=True)]
    parents = [
        B.rows.index[0] * B.blocks.shape[-2] // w for B, w in zip(transfers, widths, strict=False)
    ]
    owned = _dealt(_weights(A, cells, widths, parents), parents, processes)
    levels = [c.repeat_interleave(w) for c, w in zip(owned, widths, strict=True)]
    right = [[B.T for B in level] for level in A.right]
    return Owners(
        _points(A.size[0], A.left, levels, A.near, processes),
        _points(A.size[1], right, levels, [B.T for B in A.near], processes),
        levels,
    )


def _weights(
    A: Any, cells: list[int], widths: list[int], parents: list[Tensor]
) -> list[Int[Tensor, " _"]]:
    """The points below each cell of each level."""
    weights = [torch.zeros(count, dtype=torch.long) for count in cells]
    for weight, level, width in zip(weights, A.left, widths, strict=True):
        for B in level:
            cell = B.columns.index[:, 0] * B.blocks.shape[-1] // width
            weight.index_add_(0, cell, (B.rows.index < A.size[0]).sum((1, 2)))
    for level in range(len(parents) - 1, -1, -1):
        weights[level].index_add_(0, parents[level], weights[level + 1])
    return weights


def _dealt(
    weights: list[Int[Tensor, " _"]], parents: list[Tensor], processes: int
) -> list[Int[Tensor, " _"]]:
    """The owner of each cell of each level."""
    enough = (i for i, w in enumerate(weights) if len(w) >= ENOUGH * processes)
    top = next(enough, len(weights) - 1)
    owned = [torch.full_like(w, -1) for w in weights]
    for level, weight in enumerate(weights):
        if level == top:
            middle = weight.cumsum(0) - weight / 2
            owned[level] = (middle * processes / weight.sum().clamp(min=1)).long()
        elif level > top:
            owned[level] = owned[level - 1][parents[level - 1]]
    for level in range(top - 1, -1, -1):
        first = parents[level].flip(0)  # the last one written is the first child
        owned[level][first] = owned[level + 1].flip(0)
        owned[level] = owned[level].cummax(0).values.clamp(min=0)  # along the curve they ascend
    return owned


def _points(
    size: int,
    bases: Iterable[Iterable[Any]],
    levels: list[Tensor],
    near: Iterable[Any],
    processes: int,
) -> Int[Tensor, " m"]:
    """The owner of each point: of its leaf; leaves without a far field are dealt out in order."""
    owned = torch.full((size + 1,), -1)
    for level, owner in zip(bases, levels, strict=True):
        for B in level:
            first = owner[B.columns.index[:, 0] * B.blocks.shape[-1]]
            owned[B.rows.index[:, 0]] = first[:, None]
    for B in near:
        points = B.rows.index.reshape(len(B.rows.index), -1)
        alone = points[owned[points[:, 0]] < 0]
        owned[alone] = (torch.arange(len(alone)) * processes // max(len(alone), 1))[:, None]
    return owned[:size].clamp(min=0)


def share(A: H2Matrix, owned: Owners, rank: int, group: Group) -> H2Matrix:
    """The rows of a matrix that one process owns, by blocks that fetch what they read."""
    processes = dist.get_world_size(group)

    def of(parts: Sequence[Any], rows: Tensor, columns: Tensor) -> tuple[SharedBlocksMatrix, ...]:
        """The share of parts that are added."""
        return (_share(parts, rows, columns, rank, processes, group),) if parts else ()

    levels, fine = owned.levels, owned.levels[1:]
    near = of(A.near, owned.targets, owned.sources)
    left = [of(B, owned.targets, o) for B, o in zip(A.left, levels, strict=True)]
    right = [of(B, o, owned.sources) for B, o in zip(A.right, levels, strict=True)]
    couplings = [of([B], o, o)[0] for B, o in zip(A.couplings, levels, strict=True)]
    down = [of([B], f, o)[0] for B, o, f in zip(A.down, levels, fine, strict=False)]
    up = [of([B], o, f)[0] for B, o, f in zip(A.up, levels, fine, strict=False)]
    size = int((owned.targets == rank).sum()), int((owned.sources == rank).sum())
    return H2Matrix(near, tuple(left), tuple(couplings), tuple(right), tuple(down), tuple(up), size)


def _share(
    parts: Sequence[Any],
    rows: Int[Tensor, " m"],
    columns: Int[Tensor, " n"],
    rank: int,
    processes: int,
    group: Group,
) -> SharedBlocksMatrix:
    """The blocks in the rows of a process, and its halo."""
    size = int((rows == rank).sum()), int((columns == rank).sum())
    unit = parts[0].blocks.shape[-1] if parts[0].columns.index.ndim == 2 else 1
    columns = columns[::unit]
    owned = [_block_owners(B, rows) for B in parts]
    used = [
        torch.cat([B.columns.index[o == j].flatten() for B, o in zip(parts, owned, strict=True)])
        for j in range(processes)
    ]
    halo, read = _halo(used, columns, rank, group)
    local = torch.cat([(columns == rank).nonzero()[:, 0], read])
    shared = []
    for B, owner in zip(parts, owned, strict=True):
        p = B.blocks.shape[-2] if B.rows.index.ndim == 2 else 1
        units = rows[::p]
        kept, order, found = _kept(owner == rank)
        r, c = (places.index[kept[:, None], order] for places in (B.rows, B.columns))
        own = (units == rank).nonzero()[:, 0]
        places = (
            Places(_renumbered(r, own, len(units), found)),
            Places(_renumbered(c, local, len(columns), found)),
        )
        total = (size[0], len(local) * unit)
        shared.append(PlacedBlocksMatrix(_blocks(B, kept), *places, total))
    return SharedBlocksMatrix(tuple(shared), halo, unit, size)


def _blocks(B: PlacedBlocksMatrix, kept: Int[Tensor, " k"]) -> Inexact[Tensor, "*batch k p q"]:
    """Some blocks; where they are all, which levels may have in common, no copy."""
    if isinstance(B, PlannedBlocksMatrix):
        return B.chosen(kept)
    return B.blocks if len(kept) == B.blocks.shape[-3] else B.blocks[..., kept, :, :]


def _block_owners(B: PlacedBlocksMatrix, rows: Int[Tensor, " m"]) -> Int[Tensor, "o e"]:
    """The owner of each place of each block, minus one for nowhere."""
    index, p = B.rows.index, B.blocks.shape[-2]
    units = rows[::p] if index.ndim == 2 else rows
    first = index if index.ndim == 2 else index[..., 0]
    return torch.cat([units, units.new_full((1,), -1)])[first]


def _halo(
    used: list[Tensor], owner: Int[Tensor, " u"], rank: int, group: Group
) -> tuple[Halo, Int[Tensor, " e"]]:
    """The messages, and which units this process receives: those of one sender after another."""
    need = []
    for j, index in enumerate(used):
        unit = index.unique()
        unit = unit[unit < len(owner)]
        foreign = unit[owner[unit] != j]
        need.append(foreign[owner[foreign].argsort(stable=True)])
    own = torch.full((len(owner),), -1)
    mine = (owner == rank).nonzero()[:, 0]
    own[mine] = torch.arange(len(mine))
    asked = [units[owner[units] == rank] for units in need]
    incoming = torch.bincount(owner[need[rank]], minlength=len(used)).tolist()
    sent, outgoing = own[torch.cat(asked)], [len(units) for units in asked]
    busy = any(len(units) for units in need)
    return Halo(len(mine), sent, outgoing, incoming, group, busy), need[rank]


def _kept(here: Bool[Tensor, "o e"]) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks with a place here, their places, moved to the front, and which of these are filled."""
    kept = here.any(1).nonzero()[:, 0]
    here = here[kept]
    most = max(int(here.sum(1).max()), 1) if len(kept) else 1
    order = (~here).long().argsort(stable=True, dim=1)[:, :most]
    return kept, order, here.gather(1, order)


def _renumbered(
    index: Int[Tensor, "o e ..."], own: Int[Tensor, " u"], units: int, found: Bool[Tensor, "o e"]
) -> Int[Tensor, "o e ..."]:
    """Indices among the units of a process; what is nowhere is one past the last."""
    local = torch.full((units + 1,), len(own))
    local[own] = torch.arange(len(own))
    inside = found if index.ndim == 2 else found[..., None]
    return torch.where(inside, local[index], len(own))
