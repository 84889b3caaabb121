"""Processes that share parameters, and where in a mesh the parts of a tensor are.

Nothing here sends a message, except for torch's own redistribution of a tensor that several axes of
a mesh cut.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from matrigami.optim._collectives import Cut, Group


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
