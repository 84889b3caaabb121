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
from pathlib import Path
from statistics import fmean, median

import torch
from torch import nn

from benchmarks._timing import Progress, machine, one_thread
from benchmarks.optimizer_peers import Make, contestants, muon_steps, versions
from matrigami.optim import KFAC, SOAP, Muon, Shampoo
from matrigami.studies import write_atomic

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- optimizers: begin -->", "<!-- optimizers: end -->"

CONTESTANTS: dict[str, Make] = {
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "torch AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "SOAP": SOAP,
    "SOAP, all at once": partial(SOAP, stagger=False),
    "SOAP, statistics every 2": partial(SOAP, statistics_every=2),
    "SOAP, one-sided": partial(SOAP, one_sided=True),
    "Shampoo": Shampoo,
    "Muon": Muon,
    "K-FAC": lambda model: KFAC(model, nn.CrossEntropyLoss()),
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
    return Row(name, taken[warmup:], median(units), _bytes(dict(optimizer.state)))


def _bytes(value: object) -> int:
    """Size of all tensors in nested containers, each once."""
    sizes: dict[int, int] = {}

    def visit(x: object) -> None:
        if isinstance(x, torch.Tensor):
            sizes[id(x)] = x.nbytes
        elif isinstance(x, dict):
            for y in x.values():
                visit(y)
        elif isinstance(x, list | tuple):
            for y in x:
                visit(y)

    visit(value)
    return sum(sizes.values())


def seconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps that count; cycles are of 10")
    peers, missing = contestants()
    everyone = CONTESTANTS | peers
    parser.add_argument("--only", nargs="+", default=list(everyone), choices=list(everyone))
    parser.add_argument("--write", action="store_true", help="renew the table of README.md")
    options = parser.parse_args(arguments)
    setting = one_thread()
    progress = Progress(len(options.only) * (options.steps + 10))
    rows = [
        timed(name, everyone[name], options.steps, 10, partial(progress.advance, 1, name))
        for name in options.only
    ]
    head = ("optimiser", "median ms", "mean ms", "worst ms", "mean, units", "worst / median", "MB")
    lines = [head, ["---"] * len(head), *[row.cells() for row in rows]]
    about = {"setting": setting} | machine() | versions()
    about |= {"unit": f"{1e3 * median(row.unit for row in rows):.1f} ms"}
    notes = [
        f"One step on matrices of 256 x 256, {muon_steps(1)}; {muon_steps(8)}.",
        "; ".join(f"{k}: {v}" for k, v in about.items()) + ".",
        *missing,
    ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = "\n\n".join([text, *notes])
    print(text)
    if options.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        write_atomic(PAGE, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
