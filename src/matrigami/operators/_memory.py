"""How many bytes can still be had: what cannot fit is refused before it is tried."""

import resource
from pathlib import Path

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator
from matrigami.operators._kernels import is_concrete

SMALL = 2**20
"""Entries up to which the free memory is not asked for."""

BIG = 2**22
"""Entries up to which a Frobenius norm is taken entry by entry, which loses no digits."""

COPIES = 3
"""Dense matrices that a question about one holds at once: itself, its factors, a work space."""

UNKNOWN = 1 << 62
"""The answer where nothing is known: enough for anything."""


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that an allocation on this device could still get.

    On a CPU the least of the available memory of the machine, what the limit of the address space
    leaves, and what the control group leaves; on CUDA what the driver reports, and the cache of
    the allocator.

    Args:
        device: Where the memory would be.

    Returns:
        Bytes; `2^62` where nothing is known.

    Examples:
        >>> free_memory("cpu") > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return UNKNOWN
    return max(min(_available(), _address_space(), _control_group()), 0)


def is_big(A: LinearOperator, order: float | None = None) -> bool:
    """Whether a matrix has so many entries that a sum of squares is not taken over them all."""
    return order is None and torch.Size(A.shape).numel() > BIG


def fits_dense(A: LinearOperator) -> bool:
    """Whether the dense matrix, and the work of a function on it, fit into the free memory."""
    numbers = torch.Size(A.shape).numel()
    return numbers <= SMALL or COPIES * numbers * A.dtype.itemsize <= free_memory(A.device)


def dense(A: LinearOperator, name: str) -> Inexact[Tensor, "*batch m n"]:
    """`A.dense()`, if that and the work of a function on it fit into the free memory.

    Raises:
        ValueError: If they do not.
    """
    if not fits_dense(A):
        wanted = COPIES * torch.Size(A.shape).numel() * A.dtype.itemsize
        raise ValueError(
            f"{name}(A): A, a {A!r}, has no closed form for it, and dense it would take "
            f"{wanted / 2**30:.0f} GiB.\n"
            f"About {free_memory(A.device) / 2**30:.0f} GiB are free.\n"
            "Estimates and iterations by products alone are in matrigami.krylov."
        )
    return A.dense()


def finite(A: LinearOperator, name: str) -> Inexact[Tensor, "*batch m n"]:
    """`dense(A, name)`, for a factorisation.

    Raises:
        ValueError: If an entry is not finite, or they do not fit.
    """
    D = dense(A, name)
    if is_concrete(D) and not D.isfinite().all():
        raise ValueError(f"{name}(A): A, a {A!r}, has NaN or infinite entries.\nIt has no factors.")
    return D


def _available() -> int:
    """`MemAvailable` of the kernel, what it could free without swapping."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return UNKNOWN


def _address_space() -> int:
    """What RLIMIT_AS leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(Path("/proc/self/statm")).split()
    if limit == resource.RLIM_INFINITY or not pages:
        return UNKNOWN
    return limit - int(pages[0]) * resource.getpagesize()


def _control_group() -> int:
    """What the limit of the control group (version 2 or 1) leaves, with its page cache freed."""
    root = Path("/sys/fs/cgroup")
    for limit, used, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        most, now = _read(root / limit).strip(), _read(root / used).strip()
        if most.isdigit() and now.isdigit():
            lines = [line.split() for line in _read(root / statistics).splitlines()]
            freed = sum(int(parts[1]) for parts in lines if parts[0] == cache)
            return int(most) - int(now) + freed
    return UNKNOWN


def _read(path: Path) -> str:
    """The text of a file of the kernel, or nothing."""
    try:
        return path.read_text()
    except OSError:
        return ""
