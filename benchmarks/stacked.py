"""Runs of a study that are one batch, against the same runs one after the other.

    python -m benchmarks.stacked [--seeds 4] [--steps 300] [--write]

Each row trains 8 runs of the digits: seeds and two learning rates, an MLP with two residual blocks,
AdamW, in one process of one thread, through the worker of `matrigami study run`. Processor time of
everything that the worker does: batches, steps, tests, checkpoints. Two workers on two cores do
twice as much in both columns: the ratio is that of `--workers 2` with and without `--together`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks._report import table, write
from benchmarks._timing import Progress, machine, one_thread
from matrigami.studies import Study, plan_study
from matrigami.studies._config import RunConfig
from matrigami.studies._run import StudyPlan, collect, prepare
from matrigami.studies._worker import Job, work

ROWS = tuple(
    (structure, width, batch)
    for structure in ("dense", "btt(rank=1)", "lowrank")
    for width in (32, 64, 128)
    for batch in (32, 128)
)


EXAMPLES = 1437
"""Digits for training."""


def runs(structure: str, width: int, batch: int, seeds: int, steps: int) -> list[RunConfig]:
    """Seeds times two rates, of so many steps at least."""
    epochs = -(-steps // (EXAMPLES // batch))
    base = RunConfig("digits", "mlp", structure, width, 0, 3e-3, epochs, batch, depth=2)
    return [replace(base, seed=seed, lr=lr) for seed in range(seeds) for lr in (1e-3, 3e-3)]


def trained(plan: StudyPlan, together: int) -> tuple[float, list[float], bool]:
    """Seconds, test losses, and whether the runs were one batch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(plan, out)
        before = time.process_time()
        work(Job(out, plan.configs, together=together), lambda: False)
        seconds = time.process_time() - before
        records = collect(plan, out).records
    return seconds, [r["test_loss"] for r in records], bool(records[0].get("stacked"))


def measured(configs: Sequence[RunConfig], say: Callable[[], None]) -> list[object]:
    """One row of the table."""
    plan = plan_study(Study("stacked", tuple(configs)))
    alone, stacked = trained(plan, 1), trained(plan, len(configs))
    say()
    one, every = alone[0], stacked[0]
    error = max(abs(a - b) / a for a, b in zip(alone[1], stacked[1], strict=True))
    config, count = configs[0], len(configs)
    row: list[object] = [config.structure, config.width, config.batch_size]
    macs = plan.sizes[config.id].macs
    row += [f"{macs * config.batch_size:.1e}", "yes" if stacked[2] else "no"]
    row += [f"{3600 * count / one:.0f}", f"{3600 * count / every:.0f}", f"{one / every:.1f}x"]
    work = 6 * macs * config.epochs * EXAMPLES * count  # forward, and twice that back
    return [*row, f"{work / one / 1e9:.1f}", f"{work / every / 1e9:.1f}", f"{error:.0e}"]


def main() -> None:
    """Measure and print, or write into the README."""
    parser = argparse.ArgumentParser(description="Runs of a study as one batch.")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="renew benchmarks/README.md")
    args = parser.parse_args()
    how = one_thread()
    progress = Progress(len(ROWS))
    measured(runs("btt(rank=1)", 8, 128, args.seeds, 300), lambda: None)  # imports, once
    rows = [
        measured(runs(*row, args.seeds, args.steps), lambda: progress.advance(1, "rows"))
        for row in ROWS
    ]
    head = ["structure", "width", "batch", "MACs of a step", "one batch"]
    head += ["runs an hour, one by one", "side by side", "faster"]
    head += ["GFLOP/s, one by one", "GFLOP/s, side by side"]
    head += ["difference of test losses"]
    told = f"{2 * args.seeds} runs of {args.steps} steps; {how}; " + ", ".join(machine().values())
    report = f"{told}\n\n{table(head, rows)}"
    print(report)
    if args.write:
        write(report, "stacked")


if __name__ == "__main__":
    main()
