"""Every message between processes: parts of tensors to their owners, wholes and parts back.

A tensor is whole on one process of a group, its owner, and cut along one axis over all of them. All
processes call these functions with the same cuts in the same order; tensors of one dtype travel
together, in one message for each pair of processes. A `Team` says who they are, and where in a mesh
the parts of a tensor lie.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Group = dist.ProcessGroup
"""Processes that share the work of some parameters."""


class Cut(NamedTuple):
    """How a tensor is spread over a group.

    Args:
        owner: Rank of the process that has all of it.
        shape: Shape of the whole.
        axis: The axis that is cut, as `torch.chunk` does; None: each process has a copy.
        dtype: Its type.
    """

    owner: int
    shape: tuple[int, ...]
    axis: int | None
    dtype: torch.dtype

    def lengths(self, count: int) -> list[int]:
        """Of each part along the axis; the last ones may be shorter, or empty.

        Examples:
            >>> Cut(0, (5, 2), 0, torch.float32).lengths(4)
            [2, 2, 1, 0]
        """
        total = self.shape[self.axis or 0]
        full = -(-total // count)
        return [max(0, min(full, total - r * full)) for r in range(count)]

    def part(self, rank: int, count: int) -> tuple[int, ...]:
        """Shape of one part."""
        if self.axis is None:
            return self.shape
        return (
            *self.shape[: self.axis],
            self.lengths(count)[rank],
            *self.shape[self.axis + 1 :],
        )

    def parts(self, whole: Tensor, count: int) -> Sequence[Tensor]:
        """The whole, cut."""
        if self.axis is None:
            return [whole] * count
        return whole.split(self.lengths(count), self.axis)


def by_owner(cuts: Sequence[Cut], those: Iterable[int], count: int) -> list[list[int]]:
    """The places of some tensors, for each process of those that it owns."""
    found: list[list[int]] = [[] for _ in range(count)]
    for i in those:
        found[cuts[i].owner].append(i)
    return found


def to_owners(
    parts: Sequence[Tensor], cuts: Sequence[Cut], group: Group, device: torch.device
) -> dict[int, Tensor]:
    """The wholes that this process owns, by their place in the list."""
    count, wholes = group.size(), {}
    for dtype, those in _by_dtype(cuts):
        owned = by_owner(cuts, those, count)
        mine = owned[group.rank()]
        outgoing = [[parts[i] for i in places] for places in owned]
        incoming = [[cuts[i].part(r, count) for i in mine] for r in range(count)]
        received = _exchanged(outgoing, incoming, dtype, device, group)
        for i, pieces in zip(mine, zip(*received, strict=True), strict=True):
            wholes[i] = torch.cat(pieces, cuts[i].axis or 0)
    return wholes


def from_owners(
    wholes: Mapping[int, Tensor], cuts: Sequence[Cut], group: Group, device: torch.device
) -> list[Tensor]:
    """The part of every tensor that this process has."""
    rank, count = group.rank(), group.size()
    parts: dict[int, Tensor] = {}
    for dtype, those in _by_dtype(cuts):
        owned = by_owner(cuts, those, count)
        outgoing = _parts(wholes, cuts, owned[rank], count)
        incoming = [[cuts[i].part(rank, count) for i in places] for places in owned]
        received = _exchanged(outgoing, incoming, dtype, device, group)
        for places, pieces in zip(owned, received, strict=True):
            parts |= zip(places, pieces, strict=True)
    return [parts[i] for i in range(len(cuts))]


def _parts(
    wholes: Mapping[int, Tensor], cuts: Sequence[Cut], those: Sequence[int], count: int
) -> list[list[Tensor]]:
    """Some tensors, cut: for each process its parts."""
    cut = [cuts[i].parts(wholes[i], count) for i in those]
    return [[pieces[r] for pieces in cut] for r in range(count)]


def copies(
    wholes: Mapping[int, Tensor], cuts: Sequence[Cut], group: Group, device: torch.device
) -> list[Tensor]:
    """Every tensor, whole, on every process: one broadcast for each owner."""
    found: dict[int, Tensor] = {}
    waiting: list[tuple[Any, Tensor, list[int]]] = []
    for _, those in _by_dtype(cuts):
        for owner, theirs in enumerate(by_owner(cuts, those, group.size())):
            if theirs:
                flat = _flat(wholes, cuts, theirs, owner == group.rank(), device)
                source = dist.get_global_rank(group, owner)
                work = dist.broadcast(flat, source, group=group, async_op=True)
                waiting.append((work, flat, theirs))
    for work, flat, theirs in waiting:
        work.wait()
        found |= zip(theirs, _cut_flat(flat, [cuts[i].shape for i in theirs]), strict=True)
    return [found[i] for i in range(len(cuts))]


def _flat(
    wholes: Mapping[int, Tensor],
    cuts: Sequence[Cut],
    those: Sequence[int],
    owned: bool,
    device: torch.device,
) -> Tensor:
    """Tensors of one type one after the other, or room for them."""
    dtype = cuts[those[0]].dtype
    if owned:
        return torch.cat([wholes[i].reshape(-1).to(dtype) for i in those])
    size = sum(_size(cuts[i].shape) for i in those)
    return torch.empty(size, dtype=dtype, device=device)


def summed(values: Float[Tensor, " n"], groups: Iterable[Group]) -> Float[Tensor, " n"]:
    """The sum over all processes of the groups."""
    for group in groups:
        dist.all_reduce(values, dist.ReduceOp.SUM, group=group)
    return values


def anywhere(flag: bool, groups: Iterable[Group], device: torch.device) -> bool:
    """Whether it holds on some process of the groups."""
    return bool(summed(torch.tensor([float(flag)], device=device), groups) > 0)


def all_known(known: list[Any], groups: Iterable[Group]) -> list[Any]:
    """Plain data of all processes of the groups."""
    for group in groups:
        everything: list[Any] = [None] * group.size()
        dist.all_gather_object(everything, known, group=group)
        known = [item for items in everything for item in items]
    return known


def _exchanged(
    outgoing: list[list[Tensor]],
    incoming: list[list[tuple[int, ...]]],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
) -> list[list[Tensor]]:
    """Lists of tensors to each process, in return for lists of known shapes from each."""
    flat = [t.reshape(-1).to(dtype) for tensors in outgoing for t in tensors]
    sent = torch.cat([torch.empty(0, dtype=dtype, device=device), *flat])
    sizes = [sum(map(_size, shapes)) for shapes in incoming]
    received = torch.empty(sum(sizes), dtype=dtype, device=device)
    counts = [sum(t.numel() for t in tensors) for tensors in outgoing]
    dist.all_to_all_single(received, sent, sizes, counts, group=group)
    return [
        _cut_flat(part, shapes)
        for part, shapes in zip(received.split(sizes), incoming, strict=True)
    ]


def _by_dtype(cuts: Sequence[Cut]) -> list[tuple[torch.dtype, list[int]]]:
    """The places of the tensors of each type, in one order everywhere."""
    kinds = list(dict.fromkeys(cut.dtype for cut in cuts))
    return [(kind, [i for i, cut in enumerate(cuts) if cut.dtype == kind]) for kind in kinds]


def _cut_flat(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors that were sent one after the other."""
    pieces = flat.split([_size(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _size(shape: tuple[int, ...]) -> int:
    """Number of entries."""
    return torch.Size(shape).numel()


@dataclass(frozen=True)
class Team:
    """Processes that share the work of some parameters.

    Args:
        group: The processes.
        device: Where their tensors are.
        mesh: The mesh of sharded parameters; None: each process has all of the parameters.
        axis: The axis of the mesh along which the group lies.
    """

    group: Group
    device: torch.device
    mesh: DeviceMesh | None = None
    axis: int = 0

    def cut(self, p: Tensor, owner: int, dtype: torch.dtype) -> Cut:
        """How a parameter is spread over the team."""
        axis = p.placements[self.axis].dim % p.ndim if isinstance(p, DTensor) else None  # pyright: ignore[reportAttributeAccessIssue]
        return Cut(owner, tuple(p.shape), axis, dtype)

    def line(self, axis: int) -> list[Any]:
        """Placements that cut an axis over this team, and copy it to other lines of the mesh."""
        count = 1 if self.mesh is None else self.mesh.ndim
        return [Shard(axis) if i == self.axis else Replicate() for i in range(count)]

    def part(self, T: DTensor, axis: int) -> Tensor:
        """What this process holds of a tensor that is cut over the team."""
        return T.redistribute(T.device_mesh, self.line(axis)).to_local().contiguous()

    def spread(self, part: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
        """The tensor of which this is a part; itself where each process has all of it."""
        return part if self.mesh is None else assembled(part, self.mesh, self.line(axis), shape)

    def restored(self, p: Tensor, part: Tensor, cut: Cut) -> Tensor:
        """What this process holds of an update, from its part in the team."""
        axis = cut.axis or 0
        if not isinstance(p, DTensor) or list(p.placements) == self.line(axis):
            return part
        whole = cast("DTensor", self.spread(part, cut.shape, axis))
        return whole.redistribute(p.device_mesh, p.placements).to_local()


def sharded_axes(p: DTensor) -> list[int]:
    """Axes of the mesh over which a parameter is cut."""
    axes = [i for i, place in enumerate(p.placements) if not place.is_replicate()]
    if any(p.placements[i].is_partial() for i in axes):
        raise ValueError(
            f"step(): the placements of a parameter are {p.placements}.\n"
            "The processes hold terms of a sum.\nRedistribute it to Shard or Replicate first."
        )
    return axes


def aligned(p: Tensor, G: Tensor) -> Tensor:
    """The gradient, placed as its parameter."""
    if isinstance(p, DTensor) and isinstance(G, DTensor) and G.placements != p.placements:
        return G.redistribute(p.device_mesh, p.placements)
    return G


def assembled(part: Tensor, mesh: DeviceMesh, placements: Any, shape: tuple[int, ...]) -> DTensor:
    """The tensor of which each process of a mesh has a part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
