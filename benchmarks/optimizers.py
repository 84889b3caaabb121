"""Time of an optimiser's step, in units of a product of two 1024 x 1024 matrices.

`python -m benchmarks.optimizers` trains an MLP 512-1024-1024-100 on random data (batch 256, single
precision, one thread, CPU time) and times the steps alone, with a product between them: what else
runs on the machine falls on both. Whole refresh cycles are counted, after one of warm-up.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median

import torch
from torch import nn

from benchmarks._timing import Progress, machine, one_thread
from matrigami.optim import SOAP, Muon, Shampoo

Make = Callable[[nn.Module], torch.optim.Optimizer]

CONTESTANTS: dict[str, Make] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "SOAP": SOAP,
    "SOAP, all at once": partial(SOAP, stagger=False),
    "SOAP, statistics every 2": partial(SOAP, statistics_every=2),
    "SOAP, one-sided": partial(SOAP, one_sided=True),
    "Shampoo": Shampoo,
    "Muon": Muon,
}


@dataclass(frozen=True)
class Row:
    """One optimiser: its steps in seconds, the unit in seconds, and the bytes of its state."""

    name: str
    steps: list[float]
    unit: float
    bytes: int

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        mean, middle, worst = fmean(self.steps), median(self.steps), max(self.steps)
        numbers = [f"{1e3 * t:.1f}" for t in (middle, mean, worst)]
        numbers += [f"{mean / self.unit:.2f}", f"{worst / middle:.2f}", f"{self.bytes / 1e6:.1f}"]
        return (self.name, *numbers)


def network() -> nn.Module:
    """The MLP."""
    sizes = (512, 1024, 1024, 100)
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def timed(name: str, make: Make, steps: int, warmup: int, tick: Callable[[], object]) -> Row:
    """The steps of one optimiser."""
    torch.manual_seed(0)
    model, A = network(), torch.randn(1024, 1024)
    optimizer, product = make(model), partial(torch.mm, A, A)
    taken: list[float] = []
    units: list[float] = []
    for _ in range(warmup + steps):
        x, y = torch.randn(256, 512), torch.randint(100, (256,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        taken.append(seconds(optimizer.step))
        units.append(seconds(product))
        tick()
    tensors = [t for entry in optimizer.state.values() for t in entry.values()]
    return Row(name, taken[warmup:], median(units), sum(t.nbytes for t in tensors))


def seconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps that count; cycles are of 10")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    options = parser.parse_args(arguments)
    setting = one_thread()
    progress = Progress(len(options.only) * (options.steps + 10))
    rows = [
        timed(name, CONTESTANTS[name], options.steps, 10, partial(progress.advance, 1, name))
        for name in options.only
    ]
    head = ("optimiser", "median ms", "mean ms", "worst ms", "mean, units", "worst / median", "MB")
    lines = [head, ["---"] * len(head), *[row.cells() for row in rows]]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    print("\n".join(f"{k}: {v}" for k, v in ({"setting": setting} | machine()).items()))
    print(f"unit: {1e3 * median(row.unit for row in rows):.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
