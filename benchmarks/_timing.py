"""CPU time on a machine with other users: interleaved rounds, medians, one thread."""

import ctypes
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from matrigami.cli._terminal import ProgressLine

Call = Callable[[], object]

VISIT = 0.03
"""Least seconds for which one implementation is repeated in one round."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's `mallopt`."""


@dataclass
class Progress:
    """The line of the commands, in units of work that the caller chooses."""

    total: float
    done: float = 0.0
    line: ProgressLine = field(default_factory=lambda: ProgressLine(10.0))

    def advance(self, work: float, what: str) -> None:
        """Count work and show it."""
        self.done += work
        share = min(self.done / self.total, 1.0)
        self.line.show(f"{what} · {share:.0%}", share=share, done=share >= 1.0)
        if share >= 1.0:
            self.line.end()


def interleaved(calls: dict[str, Call], rounds: int, tick: Call = lambda: None) -> dict[str, float]:
    """Median CPU seconds of each call.

    In every round each call has its turn: once unmeasured, so that none pays for the caches that
    the last one left, then at least `VISIT` seconds measured. What else runs on the machine falls
    on all of them.

    Args:
        calls: What to time, by name.
        rounds: Number of turns of each; the median over them is returned.
        tick: Called after each round.
    """
    repeats = {
        name: max(1, round(VISIT / max(_seconds(call, 1), 1e-7))) for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats[name]))
        tick()
    return {name: median(times) for name, times in seconds.items()}


def _seconds(call: Call, repeats: int) -> float:
    """CPU seconds of one call, after one that is not measured."""
    call()
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def one_thread(*, keep_memory: bool = True) -> str:
    """Use one thread, and keep freed memory in the process; returns what was done.

    By default glibc hands large blocks back to the kernel at once, and each new tensor of some
    megabytes then pays for page faults, several times what it costs to fill it. That would be a
    benchmark of the kernel. It cannot be undone: measure the defaults in another process.

    Args:
        keep_memory: Whether to; without, the allocator stays as the system has it.
    """
    torch.set_num_threads(1)
    if not keep_memory:
        return "one thread, the system's allocator"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return "one thread"
    largest = 2**31 - 1
    kept = all(
        mallopt(*option)
        for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, largest), (M_TOP_PAD, 2**26))
    )
    return "one thread, freed memory kept by the process" if kept else "one thread"


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or "unknown"
