"""Rounding and removal beside the published loops: one layer, and a small network.

    python -m benchmarks.compress [--write]

The layer is 1024 x 1024, its inputs of a spectrum 1/i with channels of unequal size, ten of them
fifteen times as large; errors are `||(W - W') X||^2 / ||W X||^2` on 4096 vectors that were not
calibrated on. The network is a multi-layer perceptron on scikit-learn's digits, of which the first
two layers are rounded or pruned; KL is from the original on 500 images held out, the geometric mean
of three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks._compress_digits import network, sparse_network
from benchmarks._loops import gptq, sparse_gpt
from benchmarks._report import table, write
from benchmarks._timing import interleaved, machine, one_thread
from matrigami.compress import Grid, remove, round_ldl, round_waterfill, unstructured

SIZE, VECTORS, OUTLIERS = 1024, 4096, 10
GRIDS = ((4, 128, 3.3e-3), (3, 128, 1.55e-2), (2, 64, 6.7e-2))
"""Bits, groups, and the error that was aimed at."""

SPARSITIES = ((0.5, 0.79), (0.7, 0.75), (0.9, 0.68))
"""Shares that are removed, and the error that was aimed at, relative to SparseGPT."""

DAMPINGS = (0.001, 0.005, 0.02)
"""Of a quarter of the calibration each sparsity chooses one."""


@dataclass(frozen=True)
class Layer:
    """Weights, and second moments of inputs: to calibrate on, its parts, and to judge by."""

    W: Tensor
    A: Tensor
    parts: tuple[Tensor, Tensor]
    holdout: Tensor

    def error(self, V: Tensor) -> float:
        """The relative error of the outputs on held-out vectors."""
        H = self.holdout.double()
        E, W = (self.W - V).double(), self.W.double()
        return float((E @ H * E).sum() / (W @ H * W).sum())


def outlier_layer(seed: int = 0) -> Layer:
    """The layer of the table."""
    g = torch.Generator().manual_seed(seed)
    n = SIZE
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    channels = torch.randn(n, generator=g, dtype=torch.float64).exp()
    channels[torch.randperm(n, generator=g)[:OUTLIERS]] *= 15
    root = channels[:, None] * basis * torch.arange(1, n + 1, dtype=torch.float64).rsqrt()

    def moments() -> tuple[Tensor, Tensor]:
        """Of fresh vectors: three quarters of them, and the last one."""
        X = torch.randn(VECTORS, n, generator=g, dtype=torch.float64) @ root.mT
        first, last = X.split(VECTORS * 3 // 4)
        return first.mT @ first / len(first), last.mT @ last / len(last)

    W = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    seen, other = moments(), moments()
    whole = [0.75 * first + 0.25 * last for first, last in (seen, other)]
    return Layer(W.float(), whole[0].float(), (seen[0].float(), seen[1].float()), whole[1].float())


def rounding(layer: Layer) -> str:
    """Errors at fixed bits and at an entropy."""
    rows = []
    for bits, group, aim in GRIDS:
        grid = Grid(bits, group, symmetric=False)
        whole = Grid(bits, group, symmetric=False, fitted=False)
        calls: dict[str, Callable[[], Any]] = {
            "GPTQ": partial(gptq, layer.W, layer.A, grid),
            "no refit": partial(round_ldl, layer.W, layer.A, grid=grid, refit=False),
            "ours": partial(round_ldl, layer.W, layer.A, grid=grid),
        }
        seconds = interleaved(calls, 5)
        plain, ours = (calls[name]().value.dense() for name in ("no refit", "ours"))
        full = round_ldl(layer.W, layer.A, grid=whole).value.dense()
        made = whole.round(layer.W).dense(), calls["GPTQ"](), full, plain, ours
        ratios = [seconds[name] / seconds["GPTQ"] for name in ("no refit", "ours")]
        errors = [f"{layer.error(V):.2e}" for V in made]
        told = [*errors, f"{aim:.2e}", *(f"{ratio:.2f}" for ratio in ratios)]
        rows.append([f"{bits} bits, groups of {group}", *told])
    for bits in (3.0, 2.0, 1.0):
        found = round_waterfill(layer.W, layer.A, bits=bits, holdout=layer.holdout)
        aim = "8.00e-03" if bits == 2.0 else ""
        told = ["", "", "", "", f"{found.loss:.2e}", aim, "", ""]
        rows.append([f"{found.entropy:.2f} bits of entropy", *told])
    return table(ROUNDING, rows)


ROUNDING = (
    "",
    "nearest",
    "GPTQ",
    "ours, full range",
    "ours, no refit",
    "ours",
    "aim",
    "time / GPTQ, no refit",
    "with",
)


def removal(layer: Layer) -> str:
    """Errors of sparse weights."""
    rows = []
    for sparsity, aim in SPARSITIES:
        support = unstructured(sparsity)
        theirs = layer.error(sparse_gpt(layer.W, layer.A, sparsity))
        first, last = layer.parts
        damping = remove(layer.W, support, first, damping=DAMPINGS, holdout=last).damping
        ours = [
            layer.error(remove(layer.W, support, layer.A, damping=d).W) for d in (0.01, damping)
        ]
        magnitude = layer.error(layer.W * support(layer.W))
        cells = [f"{e:.2e}" for e in (magnitude, theirs, *ours)]
        ratios = [f"{error / theirs:.3f}" for error in ours]
        rows.append([f"{sparsity:.0%}", *cells, f"{damping}", *ratios, aim])
    return table(REMOVAL, rows)


REMOVAL = (
    "removed",
    "magnitude",
    "SparseGPT",
    "ours",
    "ours, damping chosen",
    "the damping",
    "ours / SparseGPT",
    "chosen / SparseGPT",
    "aim",
)


@click.command()
@click.option("--write", "write_", is_flag=True, help="Put the tables into benchmarks/README.md.")
def main(write_: bool) -> None:
    """Print the tables."""
    about = {"command": "python -m benchmarks.compress --write", "setting": one_thread()}
    layer = outlier_layer()
    report = "\n\n".join(
        [
            table(("", ""), list((about | machine()).items())),
            "### One layer, rounded",
            rounding(layer),
            "### One layer, pruned",
            removal(layer),
            "### Digits, two layers rounded",
            network(),
            "### Digits, two layers pruned",
            sparse_network(),
        ]
    )
    print(report)
    if write_:
        write(report, "compress")


if __name__ == "__main__":
    main()
