"""How far each optimiser gets in the same number of steps, on dense and on structured layers.

`python -m benchmarks.optimizer_quality --out runs/optimizers` trains digits, and CIFAR-100 where
its files are, with every optimiser of the library at the same number of learning rates and seeds;
`--write` turns what is there into `docs/results/optimizers/`. It resumes like any study.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from matrigami.optim import OPTIMIZERS
from matrigami.studies import (
    RunConfig,
    Snapshot,
    Study,
    plan_study,
    run_study,
    write_atomic,
)

PAGE = Path(__file__).parent.parent / "docs" / "results" / "optimizers"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")

COMMAND = "python -m benchmarks.optimizer_quality; python -m benchmarks.optimizer_quality --write"

OPTIONS = {"soap": "soap(max_dim=1024)", "shampoo": "shampoo(block_size=256)"}
"""The 3072 inputs of CIFAR's first layer are cut or left alone; all else is at its default."""

METHODS = ("adamw", *[OPTIONS.get(name, name) for name in sorted(OPTIMIZERS)])
NATURAL = ("kfac",)
"""Methods whose learning rates are of another kind: ten times these."""

STRUCTURES = {"dense": 64, "btt(rank=1)": 64, "monarch(blocks=4)": 64}
"""Width of the model of each structure."""

Point = tuple[float, float, float, float]
"""Steps, CPU seconds, train loss, test error."""


@dataclass(frozen=True)
class Setting:
    """A data set and its budget, the same for every method; `options` are those of some methods."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    depth: int
    examples: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.examples // self.batch_size)

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, with the options that this data set asks for."""
        given = dict(self.options)
        return tuple(given.get(name, name) for name in METHODS)


SETTINGS = {
    "digits": Setting((3e-3, 1e-2, 3e-2, 1e-1), (0, 1), 20, 128, 1, 1442),
    "cifar100": Setting(
        (3e-3, 1e-2, 3e-2), (0,), 3, 256, 1, 50_000, (("kfac", "kfac(frequency=100)"),)
    ),
}


@dataclass(frozen=True)
class Curve:
    """The runs of one method at one learning rate, averaged over seeds (losses geometrically)."""

    dataset: str
    structure: str
    optimizer: str
    lr: float
    points: tuple[Point, ...]

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Steps and seconds to a train loss, interpolated between epochs; None: never."""
        before: Point | None = None
        for point in self.points:
            if point[2] <= loss:
                if before is None:
                    return point[0], point[1]
                a = (math.log(before[2]) - math.log(loss)) / math.log(before[2] / point[2])
                steps, seconds = (
                    x + a * (y - x) for x, y in zip(before[:2], point[:2], strict=True)
                )
                return steps, seconds
            before = point
        return None


def configs(dataset: str) -> Iterator[RunConfig]:
    """All runs of a data set."""
    s = SETTINGS[dataset]
    for structure, width in STRUCTURES.items():
        for method in s.methods:
            scale = 10.0 if method.partition("(")[0] in NATURAL else 1.0
            for lr in s.rates:
                for seed in s.seeds:
                    yield RunConfig(
                        dataset,
                        "mlp",
                        structure,
                        width,
                        seed,
                        lr * scale,
                        s.epochs,
                        s.batch_size,
                        depth=s.depth,
                        optimizer=method,
                    )


def curves(dataset: str, out: Path) -> list[Curve]:
    """What was trained so far, averaged over seeds; an unfinished or failed run has no curve."""
    found: dict[tuple[str, str, float], list[list[Point]]] = {}
    s = SETTINGS[dataset]
    for c in configs(dataset):
        path = out / "runs" / c.id / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        if len(entries) == s.epochs and (path.parent / "status.json").exists():
            record = json.loads((path.parent / "status.json").read_text())["record"]
            share = record["cpu_seconds"] / record["seconds"]  # the machine may do other work, too
            points = [
                (e["epoch"] * s.steps, share * e["seconds"], e["train_loss"], e["test_error"])
                for e in entries
            ]
            found.setdefault((c.structure, c.optimizer, c.lr), []).append(points)
    return [
        Curve(dataset, *key, tuple(_mean(at) for at in zip(*runs, strict=True)))
        for key, runs in found.items()
        if len(runs) == len(s.seeds)
    ]


def _mean(points: Sequence[Point]) -> Point:
    """The same epoch of all seeds."""
    steps, seconds, losses, errors = zip(*points, strict=True)
    loss = math.exp(fmean(math.log(x) for x in losses))
    return steps[0], fmean(seconds), loss, fmean(errors)


def best(found: list[Curve]) -> dict[tuple[str, str, str], Curve]:
    """For each data set, structure and method the curve with the lowest final train loss."""
    chosen: dict[tuple[str, str, str], Curve] = {}
    for curve in found:
        key = (curve.dataset, curve.structure, curve.optimizer)
        if key not in chosen or curve.points[-1][2] < chosen[key].points[-1][2]:
            chosen[key] = curve
    return chosen


def table(chosen: dict[tuple[str, str, str], Curve], dataset: str) -> str:
    """Rows by structure and method."""
    head = ("structure", "optimiser", "best lr", "final train loss", "final test error %")
    head += ("steps to AdamW's loss", "CPU s to it", "CPU ms a step")
    rows = []
    for structure in STRUCTURES:
        baseline = chosen.get((dataset, structure, "adamw"))
        for method in SETTINGS[dataset].methods:
            curve = chosen.get((dataset, structure, method))
            if curve is None or baseline is None:
                continue
            steps, seconds, loss, error = curve.points[-1]
            when = curve.reaches(baseline.points[-1][2])
            share = "never" if when is None else f"{when[0]:.0f} ({when[0] / steps:.0%})"
            spent = "" if when is None else f"{when[1]:.1f}"
            edge = "*" if _at_the_edge(curve) else ""
            cells = (structure, method, f"{curve.lr:g}{edge}", f"{loss:.3g}", f"{error:.1f}")
            rows.append((*cells, share, spent, f"{1e3 * seconds / steps:.1f}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *rows))


def _at_the_edge(curve: Curve) -> bool:
    """Whether the best rate is the smallest or largest that was tried."""
    scale = 10.0 if curve.optimizer.partition("(")[0] in NATURAL else 1.0
    rates = SETTINGS[curve.dataset].rates
    return any(math.isclose(curve.lr, scale * rate) for rate in (rates[0], rates[-1]))


def figure(chosen: dict[tuple[str, str, str], Curve], datasets: Sequence[str]) -> Figure:
    """Train loss against steps, a panel for each data set and structure."""
    drawn = Figure(figsize=(10.5, 3.2 * len(datasets)), dpi=130, layout="constrained")
    axes = drawn.subplots(len(datasets), len(STRUCTURES), squeeze=False)
    for row, dataset in zip(axes, datasets, strict=True):
        for ax, structure in zip(row, STRUCTURES, strict=True):
            for i, method in enumerate(SETTINGS[dataset].methods):
                curve = chosen.get((dataset, structure, method))
                if curve is not None:
                    x, _, y, _ = zip(*curve.points, strict=True)
                    color = "black" if i == 0 else f"C{i - 1}"
                    name = method.partition("(")[0]
                    ax.semilogy(x, y, ".-", color=color, lw=1.4, ms=4, label=name)
            ax.set_title(f"{dataset}: {structure}", fontsize=10)
            ax.grid(alpha=0.3, which="both", lw=0.5)
            ax.set_xlabel("steps")
        row[0].set_ylabel("train loss")
    axes[0][0].legend(fontsize=8)
    return drawn


def write(found: list[Curve], command: str) -> None:
    """Table, figure and curves of everything there is."""
    datasets = [d for d in SETTINGS if any(c.dataset == d for c in found)]
    chosen = best(found)
    (PAGE / "fig").mkdir(parents=True, exist_ok=True)
    drawn = figure(chosen, datasets)
    FigureCanvasAgg(drawn)
    drawn.savefig(PAGE / "fig" / "loss.png")
    with (PAGE / "curves.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(
            ["dataset", "structure", "optimizer", "lr", "steps", "seconds", "train_loss", "error"]
        )
        for c in found:
            for steps, *rest in c.points:
                numbers = [f"{x:.6g}" for x in rest]
                out.writerow([c.dataset, c.structure, c.optimizer, c.lr, steps, *numbers])
    parts = [f"### {dataset}\n\n{table(chosen, dataset)}" for dataset in datasets]
    parts.append(f"Command: `{command}`. Versions and processor: [env.json](env.json).")
    page = PAGE / "README.md"
    before, after = page.read_text("utf-8").split(MARKS[0])[0], page.read_text("utf-8")
    after = after.split(MARKS[1])[1]
    body = "\n\n".join(parts)
    write_atomic(page, f"{before}{MARKS[0]}\n\n{body}\n\n{MARKS[1]}{after}")


class _Show:
    """A line on stderr whenever a run has ended."""

    finished = -1

    def __call__(self, now: Snapshot) -> None:
        """Called twice a second."""
        if now.finished > self.finished:
            self.finished = now.finished
            print(now.line(), file=sys.stderr, flush=True)


def _write_environment(files: Sequence[Path]) -> None:
    """Where the curves of the page were made: the last of the files that are there."""
    for path in filter(Path.exists, files):
        PAGE.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text("utf-8")) | {"command": COMMAND}
        write_atomic(PAGE / "env.json", json.dumps(found, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizer_quality", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--data-dir", type=Path, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--write", action="store_true", help="renew the page; train nothing")
    options = parser.parse_args(arguments)
    if not options.write:
        for dataset in options.only:
            plan = plan_study(Study(f"optimizers_{dataset}", tuple(configs(dataset))))
            out, folder = options.out / dataset, options.data_dir
            run_study(plan, out, workers=1, threads=1, data_dir=folder, report=_Show())
    found = [c for d in options.only for c in curves(d, options.out / d)]
    if options.write:
        _write_environment([options.out / dataset / "env.json" for dataset in options.only])
        write(found, COMMAND)
    print("\n\n".join(table(best(found), d) for d in options.only))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
