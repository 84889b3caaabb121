"""Sizes and clock of the measurements on a card."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]
"""One line of a table."""

Attempt = tuple[str, Callable[[], Row]]
"""What is measured, and how."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a device, or dry."""

    device: torch.device
    dims: tuple[int, ...]
    tokens: tuple[int, ...]
    width: int
    points: tuple[int, ...]
    examples: int
    seconds: float

    @classmethod
    def of(cls, dry: bool) -> "Sizes":
        """The sizes."""
        if dry:
            return cls(torch.device("cpu"), (64,), (32,), 64, (3000,), 64, 1e-3)
        dims, tokens = (1024, 2048, 4096, 8192), (4096, 16384, 65536)
        return cls(torch.device("cuda"), dims, tokens, 2048, (100_000, 400_000), 20_480, 0.03)


class Clock:
    """Seconds of a call on a device."""

    def __init__(self, sizes: Sizes) -> None:
        self.cuda, self.least = sizes.device.type == "cuda", sizes.seconds

    def __call__(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Median over rounds, each long enough to be measured."""
        call()
        repeats = max(1, math.ceil(self.least / max(self._round(call, 1), 1e-6)))
        return median(self._round(call, repeats) for _ in range(rounds)) / repeats

    def replayed(self, call: Callable[[], object]) -> float:
        """The same of a recorded graph: without what the host needs to launch the kernels."""
        if not self.cuda:
            return self(call)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self(graph.replay)

    def _round(self, call: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            start = time.process_time()
            for _ in range(repeats):
                call()
            return time.process_time() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Two products (0), or one kernel of Triton wherever it fits (1)."""
    before = os.environ.get("MATRIGAMI_TRITON")
    os.environ["MATRIGAMI_TRITON"] = mode
    try:
        yield
    finally:
        del os.environ["MATRIGAMI_TRITON"]
        if before is not None:
            os.environ["MATRIGAMI_TRITON"] = before
