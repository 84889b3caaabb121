"""The processes that train one run together: each has its share of every batch.

A launcher such as torchrun says who they are. Gradients are averaged by DistributedDataParallel;
everything that is written, the first process writes. One process is a team, too, and asks nobody.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Team:
    """One process of a team.

    Args:
        rank: Which process this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the team."""
        return model if self.size == 1 else DistributedDataParallel(model, broadcast_buffers=False)

    def share(self, examples: int) -> tuple[slice, float]:
        """This process' part of a batch, and what its mean loss counts for.

        Every `size`-th example; the weights make the mean over the team that of the batch. A batch
        of fewer examples leaves some processes one that counts for nothing.

        Examples:
            >>> Team(1, 2).share(5), Team(2, 4).share(2)
            ((slice(1, None, 2), 0.8), (slice(0, 1, None), 0.0))
        """
        mine = len(range(self.rank, examples, self.size))
        if mine == 0:
            return slice(0, 1), 0.0
        return slice(self.rank, None, self.size), mine * self.size / examples

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, raised if any process raises it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def total(self, sums: Tensor) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return sums.tolist()
        together = sums.cpu().clone()
        dist.all_reduce(together)
        return together.tolist()


@contextmanager
def joined(device: str = "cpu") -> Iterator[tuple[Team, str]]:
    """The team that the launcher named in the environment, and the device of this process.

    Args:
        device: `cpu`, or `cuda` for one accelerator of each process.

    Raises:
        ValueError: If the environment names a team but not how to meet it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(), device
        return
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size}: the environment of {size} processes lacks {', '.join(missing)}.\n"
            "Start it with: torchrun --nproc-per-node N -m matrigami.cli train SPEC.toml ..."
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Team(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
