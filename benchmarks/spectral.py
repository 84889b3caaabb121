"""At which learning rates Muon trains without a spike, with and without the bound on products.

`python -m benchmarks.spectral docs/results/optimizers/spectral` trains an MLP 64-128-128-128-10 on
digits (batch 64, no warm-up, no weight decay, three seeds) at every rate of a ladder, with dense,
low-rank, block-tensor-train and Monarch layers, plain and with `bound=True`, at `scale=spectral`.
Only the head, which takes Adam, keeps one rate. A spike is a loss above the mean of the ten before
by more than half of the first loss.
"""

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks._report import table
from benchmarks._timing import Progress, machine, one_thread
from matrigami import BlockTensorTrain, LowRank, Monarch
from matrigami.nn import StructuredLinear
from matrigami.operators import Structure
from matrigami.optim import Muon, plan, spectral
from matrigami.studies import write_atomic
from matrigami.studies.tasks._datasets import load_images

STRUCTURES: dict[str, Structure | None] = {
    "dense": None,
    "low rank": LowRank(rank=16),
    "BTT": BlockTensorTrain(rank=2),
    "Monarch": Monarch(blocks=4),
}
"""The three hidden layers; None is `nn.Linear`."""

RATES = tuple(0.0025 * 2**k for k in range(10))
SEEDS = (0, 1, 2)
SIZES = (64, 128, 128, 128)
STEPS, BATCH, HEAD_RATE = 200, 64, 3e-3
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
COMMAND = "Command: `python -m benchmarks.spectral docs/results/optimizers/spectral`"
WINDOW, SHARE = 10, 0.5
"""A spike rises above the mean of so many losses by more than this share of the first."""


@dataclass(frozen=True)
class Run:
    """One training run: its losses, and whether one of them was a spike."""

    structure: str
    bound: bool
    rate: float
    seed: int
    spikes: int
    final: float

    @property
    def name(self) -> str:
        """What its column is called."""
        return f"{self.structure}, bound" if self.bound else self.structure


def network(structure: Structure | None, seed: int) -> nn.Sequential:
    """The MLP; the same initial head for all structures."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(SIZES):
        hidden = nn.Linear(n, m) if structure is None else StructuredLinear(n, m, structure)
        layers += [hidden, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(SIZES[-1], 10))


def trained(name: str, bound: bool, rate: float, seed: int, data: tuple[Tensor, Tensor]) -> Run:
    """One run."""
    model = network(STRUCTURES[name], seed)
    groups: list[dict[str, Any]] = plan(model, partial(Muon, bound=bound)).groups()
    for group in groups:
        group["lr"] = HEAD_RATE if group["views"][0] is None else rate
    optimizer = Muon(groups, bound=bound, scale=spectral, weight_decay=0.0)
    generator, (x, y) = torch.Generator().manual_seed(seed), data
    losses: list[float] = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    with torch.no_grad():
        final = nn.functional.cross_entropy(model(x), y).item()
    return Run(name, bound, rate, seed, spikes(losses), final)


def spikes(losses: Sequence[float]) -> int:
    """How many losses are spikes; what is not finite is one."""
    high = [
        not loss - fmean(losses[max(0, t - WINDOW) : t]) <= SHARE * losses[0]
        for t, loss in enumerate(losses)
        if t
    ]
    return sum(high)


def digits() -> tuple[Tensor, Tensor]:
    """The training images, of mean 0 and variance 1, and their classes."""
    pixels, labels = load_images("digits").train
    x = pixels.flatten(1).float()
    return (x - x.mean()) / x.std(), labels


def runs() -> Iterator[Run]:
    """All of them."""
    data = digits()
    progress = Progress((2 * len(STRUCTURES) - 1) * len(RATES) * len(SEEDS))
    for name, structure in STRUCTURES.items():
        for bound in (False, True) if structure else (False,):
            for rate in RATES:
                for seed in SEEDS:
                    yield trained(name, bound, rate, seed, data)
                    progress.advance(1, f"{name}, lr {rate:g}")


def summary(found: Sequence[Run]) -> str:
    """For each structure the rates without a spike, and what they reach."""
    names = dict.fromkeys(run.name for run in found)
    body = [(name, *_reached([run for run in found if run.name == name])) for name in names]
    rates = " ".join(f"{r:g}" for r in RATES)
    head = ("layers", "no spike up to", "best rate", "its train loss", "worst seed")
    return table((*head, f"seeds with a spike, at {rates}"), body)


def _reached(runs: Sequence[Run]) -> tuple[str, ...]:
    """Of one structure."""
    finals = {r: [run.final for run in runs if run.rate == r] for r in RATES}
    spiky = {r: sum(run.spikes > 0 for run in runs if run.rate == r) for r in RATES}
    calm = [*takewhile(lambda r: not spiky[r], RATES)]
    best = min(RATES, key=lambda r: _mean(finals[r]))
    return (
        f"{calm[-1]:g}" if calm else "none",
        f"{best:g}",
        f"{_mean(finals[best]):.2g}",
        f"{max(finals[best]):.2g}",
        " ".join(map(str, spiky.values())),
    )


def _mean(losses: Sequence[float]) -> float:
    """Over seeds, geometrically; infinite if one is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    return math.exp(fmean(math.log(max(x, 1e-12)) for x in losses))


def figure(found: Sequence[Run]) -> Figure:
    """Final loss against the rate; runs with a spike are hollow."""
    drawn = Figure(figsize=(11, 3.2), dpi=130, layout="constrained")
    for ax, name in zip(drawn.subplots(1, len(STRUCTURES), sharey=True), STRUCTURES, strict=True):
        for bound, color in ((False, "C3"), (True, "C0")):
            mine = [r for r in found if r.structure == name and r.bound == bound]
            if mine:
                _draw(ax, mine, color, "bound" if bound else "plain")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("learning rate")
        ax.grid(alpha=0.3, which="both", lw=0.5)
        ax.legend(fontsize=7)
    drawn.axes[0].set_ylabel("train loss at the end")
    return drawn


def _draw(ax: Axes, runs: Sequence[Run], color: str, label: str) -> None:
    """The mean at each rate, and all runs."""
    ends = [[r.final for r in runs if r.rate == s] for s in RATES]
    ax.loglog(RATES, list(map(_mean, ends)), color=color, lw=1)
    for calm in (True, False):
        those = [(r.rate, r.final) for r in runs if (r.spikes == 0) == calm]
        look: dict[str, Any] = {"ms": 4, "mec": color, "mfc": color if calm else "white"}
        rates, finals = zip(*those, strict=True) if those else ((), ())
        ax.plot(rates, finals, "o", label=label + ("" if calm else ", spikes"), **look)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, and write the table into the page of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the page, its numbers and its figure")
    out: Path = parser.parse_args(arguments).out
    setting = one_thread()
    found = list(runs())
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["structure", "bound", "lr", "seed", "spikes", "train_loss"])
        rows.writerows(
            [r.structure, r.bound, f"{r.rate:g}", r.seed, r.spikes, f"{r.final:.6g}"] for r in found
        )
    drawn = figure(found)
    FigureCanvasAgg(drawn)
    drawn.savefig(out / "rates.png")
    about = "; ".join(f"{k}: {v}" for k, v in ({"setting": setting} | machine()).items())
    text = f"{summary(found)}\n\n![Train loss against the rate](rates.png)\n\n{COMMAND}; {about}."
    print(text)
    before, rest = (out / "README.md").read_text("utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    write_atomic(out / "README.md", f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
