"""A line of the tables of `benchmarks.hpc`, its clock, and other libraries."""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement.

    Attributes:
        work: What is done.
        by: By whom.
        seconds: CPU seconds of each part, by name.
        accuracy: What it reached.
        goal: Seconds, of all parts together; None for another library, or where there is none.
    """

    work: str
    by: str
    seconds: dict[str, float]
    accuracy: str
    goal: float | None = None

    def cells(self) -> list[str]:
        """As a line of the table."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items())
        share = "" if self.goal is None else f"{self.goal:g} s: {total / self.goal:.2f} of it"
        return [self.work, self.by, f"{total:.2f}", parts, self.accuracy, share]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The answer, and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def peer(name: str) -> Any:
    """Another library, or None."""
    try:
        return import_module(name)
    except ImportError:
        return None
