"""How much memory is free, and a refusal before it is asked for."""

import os
import resource
from pathlib import Path

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator

BIG = 2**22
"""Entries up to which a Frobenius norm is taken entry by entry, which loses no digits."""

COPIES = 3
"""Dense matrices that a question about one holds at once: itself, its factors, a work space."""


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still allocate on a device; a large number where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 2**62
    return min(_available(), _under_limit())


def is_big(A: LinearOperator, order: float | None = None) -> bool:
    """Whether a matrix has so many entries that a sum of squares is not taken over them all."""
    return order is None and torch.Size(A.shape).numel() > BIG


def dense(A: LinearOperator, name: str) -> Inexact[Tensor, "*batch m n"]:
    """`A.dense()`, if that and the work of a function on it fit into the free memory.

    Raises:
        ValueError: If they do not.
    """
    numbers = torch.Size(A.shape).numel()
    wanted = COPIES * numbers * A.dtype.itemsize
    if numbers > 2**20 and wanted > free_memory(A.device):
        raise ValueError(
            f"{name}(A): A, a {A!r}, has no closed form for it, and dense it would take "
            f"{wanted / 2**30:.0f} GiB.\n"
            f"About {free_memory(A.device) / 2**30:.0f} GiB are free.\n"
            "Estimates and iterations by products alone are in matrigami.krylov."
        )
    return A.dense()


def _available() -> int:
    """What the operating system and the container say is free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
    free = sizes.get("MemAvailable", 2**62)
    for limit, used in (("memory.max", "memory.current"),):
        try:
            top = Path("/sys/fs/cgroup", limit).read_text().strip()
            now = Path("/sys/fs/cgroup", used).read_text().strip()
        except OSError:
            continue
        free = min(free, int(top) - int(now)) if top.isdigit() else free
    return free


def _under_limit() -> int:
    """What is left under the limit of this process's address space."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return 2**62
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limit - pages * os.sysconf("SC_PAGE_SIZE")
