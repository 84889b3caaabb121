"""Runs an hour of a study on the whole machine, by wall clock.

    python -m benchmarks.stacked_whole [--seeds 8] [--steps 1000] [--repeats 2] [--write]

Runs like those of `benchmarks.stacked`, by `matrigami study run`, with one worker for each core,
which is the default, and with 8 runs of each as one batch. The clock starts when all workers have
finished an epoch, so that what they take to start is left out, and ends with the last run. The best
of the repeats counts: other users of a machine only take time.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._report import table, write
from benchmarks._timing import Progress, machine
from benchmarks.stacked import runs
from matrigami.studies import Study, plan_study, run_study
from matrigami.studies._run import StudyPlan

ROWS = (
    ("dense", 32, 32),
    ("dense", 64, 32),
    ("dense", 128, 32),
    ("btt(rank=1)", 64, 32),
)
"""Structure, width and batch."""

CORES = os.cpu_count() or 1

TOGETHER = (1, 8)
"""Runs that a worker trains at once."""


class Clock:
    """Runs an hour from the first epoch of all workers on.

    Args:
        out: Folder of the study.
        started: Runs that are trained at once.
        epochs: Of all runs.
    """

    def __init__(self, out: Path, started: int, epochs: int) -> None:
        self.out, self.started, self.epochs = out, started, epochs
        self.done, self.since = 0, 0.0

    def look(self, _: object) -> None:
        """Note how many epochs are done when all workers have begun."""
        files = list(self.out.glob("runs/*/metrics.jsonl"))
        if not self.done and len(files) >= self.started:
            self.since = time.perf_counter()
            self.done = sum(len(file.read_text().splitlines()) for file in files)

    def hourly(self, runs: int) -> float:
        """Now that all are done."""
        share = 1 - self.done / self.epochs
        return 3600 * runs * share / (time.perf_counter() - self.since)


def hourly(plan: StudyPlan, together: int) -> float:
    """Runs an hour of a study."""
    count = len(plan.configs)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(Path(folder), CORES * together, count * plan.configs[0].epochs)
        run_study(plan, Path(folder), workers=CORES, together=together, report=clock.look)
        return clock.hourly(count)


def measured(
    row: tuple[str, int, int], args: argparse.Namespace, say: Callable[[], None]
) -> list[object]:
    """A row of the table."""
    plan = plan_study(Study("whole", tuple(runs(*row, args.seeds, args.steps))))
    found: list[float] = []
    for together in TOGETHER:
        found.append(max(hourly(plan, together) for _ in range(args.repeats)))
        say()
    default, stacked = found
    numbers = [f"{default:.0f}", f"{stacked:.0f}", f"{stacked / default:.1f}x"]
    return [*row, *numbers, f"{os.getloadavg()[0]:.0f}"]


def main() -> None:
    """Measure and print, or write into the README."""
    parser = argparse.ArgumentParser(description="Runs of a study on the whole machine.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="renew benchmarks/README.md")
    args = parser.parse_args()
    progress = Progress(len(ROWS) * len(TOGETHER))
    rows = [measured(row, args, lambda: progress.advance(1, "ways")) for row in ROWS]
    head = ["structure", "width", "batch", f"runs an hour, --workers {CORES}"]
    head += [f"--workers {CORES} --together 8", "faster", "load"]
    told = f"{2 * args.seeds} runs of {args.steps} steps, best of {args.repeats}; "
    report = f"{told}{', '.join(machine().values())}\n\n{table(head, rows)}"
    print(report)
    if args.write:
        write(report, "stacked-whole")


if __name__ == "__main__":
    main()
