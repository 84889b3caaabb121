"""Runs of a study that are one batch, against the same runs one after the other.

    python -m benchmarks.stacked [--seeds 4] [--steps 300] [--write]

Each row trains 8 runs of the digits: seeds and two learning rates, an MLP with two residual blocks,
AdamW, in one process of one thread, through the worker of `matrigami study run`. Processor time of
everything that the worker does: batches, steps, tests, checkpoints. One by one, half of the runs
are timed. Of the same step, the matrix products alone say what could be gained if all else took no
time.
By wall clock, with the command on all cores: `benchmarks.stacked_whole`.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._report import table, write
from benchmarks._timing import Progress, interleaved, machine, one_thread
from matrigami.studies import Study, plan_study
from matrigami.studies._config import RunConfig
from matrigami.studies._run import StudyPlan, collect, prepare
from matrigami.studies._stacked import Stack
from matrigami.studies._train import Run
from matrigami.studies._worker import Job, work
from matrigami.studies.tasks import load_task

ROWS = tuple(
    (structure, width, batch)
    for structure in ("dense", "btt(rank=1)", "lowrank")
    for width in (32, 64, 128)
    for batch in (32, 128)
)


EXAMPLES = 1437
"""Digits for training."""

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class Products(TorchDispatchMode):
    """Takes down the matrix products that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call it."""
        if func in PRODUCTS:
            self.calls.append((func, args))
        return func(*args, **kwargs or {})

    @torch.no_grad()
    def again(self) -> float:
        """Seconds of all of them."""
        before = time.process_time()
        for func, args in self.calls:
            func(*args)
        return time.process_time() - before


def runs(structure: str, width: int, batch: int, seeds: int, steps: int) -> list[RunConfig]:
    """Seeds times two rates, of so many steps at least."""
    epochs = -(-steps // (EXAMPLES // batch))
    base = RunConfig("digits", "mlp", structure, width, 0, 3e-3, epochs, batch, depth=2)
    return [replace(base, seed=seed, lr=lr) for seed in range(seeds) for lr in (1e-3, 3e-3)]


def trained(plan: StudyPlan, together: int) -> tuple[float, dict[str, float], bool]:
    """Seconds, the test loss of each run, and whether the runs were one batch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(plan, out)
        before = time.process_time()
        work(Job(out, plan.configs, together=together), lambda: False)
        seconds = time.process_time() - before
        records = collect(plan, out).records
    return seconds, {r["id"]: r["test_loss"] for r in records}, bool(records[0].get("stacked"))


def products(configs: Sequence[RunConfig]) -> float:
    """Seconds that the matrix products of a step of all runs take."""
    stack, task, device = Stack(), load_task(configs[0]), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        every = [Run(config, Path(folder), task, device, stack=stack) for config in configs]
        trainings = [run.train(lambda *_: None, lambda: False) for run in every]
        for _ in range(2):  # the first is of each alone, and the second makes them one batch
            _advance(trainings)
        with Products() as seen:
            _advance(trainings)
        return median(seen.again() for _ in range(15))


def _advance(trainings: Sequence[Iterator[object]]) -> None:
    """A step of all."""
    for training in trainings:
        next(training)


def measured(configs: Sequence[RunConfig], say: Callable[[], None]) -> list[object]:
    """One row of the table."""
    plan, half = (plan_study(Study("stacked", tuple(part))) for part in (configs, configs[::2]))
    alone, stacked = trained(half, 1), trained(plan, len(configs))
    say()
    config, count = configs[0], len(configs)
    one, every = count / len(half.configs) * alone[0], stacked[0]
    error = max(abs(alone[1][name] / stacked[1][name] - 1) for name in alone[1])
    row: list[object] = [config.structure, config.width, config.batch_size]
    macs = plan.sizes[config.id].macs
    row += [f"{macs * config.batch_size:.1e}", "yes" if stacked[2] else "no"]
    row += [f"{3600 * count / one:.0f}", f"{3600 * count / every:.0f}", f"{one / every:.1f}x"]
    work = 6 * macs * config.epochs * EXAMPLES * count  # forward, and twice that back
    steps = config.epochs * EXAMPLES / config.batch_size
    row += [f"{work / seconds / 1e9:.1f}" for seconds in (one, every, steps * products(configs))]
    return [*row, f"{error:.0e}"]


def peak() -> float:
    """Of a product of two 1024 x 1024 matrices, floating-point operations a second."""
    A = torch.randn(1024, 1024)
    return 2 * 1024**3 / interleaved({"product": lambda: A @ A}, 5)["product"]


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
    head += ["GFLOP/s, one by one", "side by side", "its products alone"]
    head += ["difference of test losses"]
    told = f"{2 * args.seeds} runs of {args.steps} steps; {how}; " + ", ".join(machine().values())
    told += f"; load {os.getloadavg()[1]:.1f}; 1024 x 1024 product: {peak() / 1e9:.0f} GFLOP/s"
    report = f"{told}\n\n{table(head, rows)}"
    print(report)
    if args.write:
        write(report, "stacked")


if __name__ == "__main__":
    main()
