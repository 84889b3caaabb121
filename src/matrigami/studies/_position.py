"""Where a run stands, and the time that its steps take."""

import time
from dataclasses import dataclass, field
from typing import Any

REPORT_SECONDS = 1.0


@dataclass
class Position:
    """How far a run has come, beyond its tensors.

    Args:
        epoch: Finished epochs.
        start: Examples of the current epoch that are done.
        loss_sum: Sum of their losses.
        error_sum: Sum of their errors.
        seconds: Time spent in training steps, without evaluation and files.
        cpu_seconds: Processor time of the same.
        history: Metrics of each finished epoch.
    """

    epoch: int = 0
    start: int = 0
    loss_sum: float = 0.0
    error_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class StepClock:
    """Time of the training steps, added to a position, and what is due at intervals."""

    def __init__(self, position: Position, checkpoint_seconds: float) -> None:
        self.position, self.checkpoint_seconds = position, checkpoint_seconds
        self.reported = self.saved = time.monotonic()
        self.skip()

    def lap(self) -> None:
        """Add the time since the last call."""
        wall, cpu = self.started
        self.skip()
        self.position.seconds += self.started[0] - wall
        self.position.cpu_seconds += self.started[1] - cpu

    def skip(self) -> None:
        """Leave out the time since the last call."""
        self.started = (time.perf_counter(), time.process_time())

    def report_due(self) -> bool:
        """Whether to report now; if so, the interval begins again."""
        due = time.monotonic() - self.reported >= REPORT_SECONDS
        self.reported = time.monotonic() if due else self.reported
        return due

    def save_due(self) -> bool:
        """Whether to write a checkpoint now; if so, the interval begins again."""
        due = time.monotonic() - self.saved >= self.checkpoint_seconds
        self.saved = time.monotonic() if due else self.saved
        return due
