"""How far a study is: one line, with the time that is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrigami._words import duration

OVERHEAD_MACS = 300_000
"""What an example costs besides the model (reading, augmentation, calls), in multiply-adds."""


@dataclass(frozen=True)
class Snapshot:
    """State of a study at one moment."""

    total: int
    finished: int
    failed: int
    running: int
    eta: float | None
    best: str

    def line(self) -> str:
        """One line for a person.

        Examples:
            >>> Snapshot(36, 12, 1, 2, 840.0, "btt(rank=1) 58.7 %@5.9e5 MACs").line()
            '12/36 runs · 1 failed · eta 14 min · best btt(rank=1) 58.7 %@5.9e5 MACs'
        """
        parts = [f"{self.finished}/{self.total} runs"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += (
            [f"eta {duration(self.eta)}"]
            if self.eta is not None and self.finished < self.total
            else []
        )
        parts += [f"best {self.best}"] if self.best else []
        return " · ".join(parts)


@dataclass
class Clock:
    """Estimates the time that is left from the work done since it was made.

    The work of a run is `examples * (MACs + overhead)`; the speed is measured.
    """

    work: Mapping[str, float]
    begun: Mapping[str, float]
    time: float

    def remaining(self, fractions: Mapping[str, float], now: float) -> float | None:
        """Seconds until all runs are finished; None before anything can be said.

        Args:
            fractions: Finished part of each run.
            now: The time, on the clock of `time`.

        Examples:
            >>> clock = Clock({"a": 100.0, "b": 300.0}, {"a": 0.0, "b": 0.0}, time=0.0)
            >>> clock.remaining({"a": 1.0, "b": 0.0}, now=10.0)
            30.0
        """
        done = sum(w * (fractions[run] - self.begun[run]) for run, w in self.work.items())
        left = sum(w * (1 - fractions[run]) for run, w in self.work.items())
        if done <= 0 or now <= self.time:
            return None
        return left * (now - self.time) / done


def best_of(records: Sequence[Mapping[str, Any]]) -> str:
    """The run with the lowest train error of each dataset."""
    best: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record.get("train_error") is None:
            continue
        dataset = str(record["dataset"])
        if dataset not in best or record["train_error"] < best[dataset]["train_error"]:
            best[dataset] = record
    several = len(best) > 1
    return ", ".join(
        f"{dataset + ': ' if several else ''}{r['structure']} {r['train_error']:.1f} "
        f"%@{compact(r['macs'])} MACs"
        for dataset, r in best.items()
    )


def compact(number: float) -> str:
    """Two digits and a power of ten.

    Examples:
        >>> compact(591872), compact(1e7)
        ('5.9e5', '1.0e7')
    """
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
