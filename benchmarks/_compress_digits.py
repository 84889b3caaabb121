"""A small network made smaller: the first two layers of a perceptron on scikit-learn's digits."""

import copy
import math
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks._loops import sparse_gpt
from benchmarks._report import table
from matrigami.compress import Grid, prune_, quantize_, unstructured

SEEDS = (0, 1, 2)

SHOTS = 20
"""Steps in which the same share goes, with moments of the model as it then is."""


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training images and labels, and images held out."""
    x, y = _digits()
    return x[:-500], y[:-500], x[-500:]


def _digits() -> tuple[Tensor, Tensor]:
    """All images and labels, in an order drawn once."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return x, torch.tensor(data.target)[order]


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """64-128-128-10, trained for 300 steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(300):
        at = torch.randint(len(x), (256,))
        opt.zero_grad()
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        opt.step()
    return net


def network() -> str:
    """KL of rounded networks."""
    rows = []
    for bits in (3, 2):
        grid = Grid(bits, None, symmetric=False)
        logs = zip(*(_log_kls(grid, seed) for seed in SEEDS), strict=True)
        kls = [math.exp(sum(log) / len(log)) for log in logs]
        told = [*(f"{kl:.2e}" for kl in kls), f"{kls[2] / kls[1]:.2f}", "" if bits == 3 else 0.35]
        rows.append([f"{bits} bits", *told])
    return table(["", "nearest", "inputs alone", "both moments", "both / inputs", "aim"], rows)


def _log_kls(grid: Grid, seed: int) -> list[float]:
    """Log divergence of a network that is rounded to the nearest, by one moment and by both."""
    x, y, held = digits()
    net = trained(x, y, seed)
    before = net(held).log_softmax(-1).detach()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    logs = []
    for two_sided in (None, False, True):
        net.load_state_dict(state)
        if two_sided is None:
            for weight in (net.get_parameter("0.weight"), net.get_parameter("2.weight")):
                weight.data.copy_(grid.round(weight.data).dense())
        else:
            quantize_(net, list(x.split(128)), grid, two_sided=two_sided)
        logs.append(math.log(_kl(before, net(held))))
    return logs


def _kl(before: Tensor, logits: Tensor) -> float:
    """From log-probabilities to those of other logits, in the mean."""
    after = logits.log_softmax(-1).detach()
    return float((before.exp() * (before - after)).sum(-1).mean())


def sparse_network() -> str:
    """Accuracy and KL of pruned networks."""
    rows = []
    for sparsity in (0.7, 0.8, 0.9):
        each = zip(*(_sparse(sparsity, seed) for seed in SEEDS), strict=True)
        cells = []
        for found in each:
            right, logs = zip(*found, strict=True)
            kl = "" if logs[0] is None else f", {math.exp(sum(logs) / len(logs)):.1e}"
            cells.append(f"{sum(right) / len(right):.1%}{kl}")
        rows.append([f"{sparsity:.0%}", *cells, "97 %" if sparsity == 0.9 else ""])
    return table(SPARSE, rows)


SPARSE = (
    "removed",
    "given",
    "SparseGPT",
    "inputs alone",
    "both moments",
    f"both, {SHOTS} shots",
    "aim",
)


def _sparse(sparsity: float, seed: int) -> list[tuple[float, float | None]]:
    """Share of right answers, log KL: as given, by SparseGPT, by one moment, by both, in shots."""
    x, y, held = digits()
    labels = _digits()[1][-len(held) :]
    given = trained(x, y, seed)
    before = given(held).log_softmax(-1).detach()
    nets = [copy.deepcopy(given) for _ in range(4)]
    _published(nets[0], x, sparsity)
    batches = list(x.split(128))
    prune_(nets[1], batches, unstructured(sparsity))
    prune_(nets[2], batches, unstructured(sparsity), two_sided=True)
    for shot in range(1, SHOTS + 1):
        prune_(nets[3], batches, unstructured(sparsity * shot / SHOTS), two_sided=True)

    def right(net: nn.Sequential) -> float:
        """Share of the images held out."""
        return float((net(held).argmax(-1) == labels).double().mean())

    told = [(right(net), math.log(_kl(before, net(held)))) for net in nets]
    return [(right(given), None), *told]


@torch.no_grad()
def _published(net: nn.Sequential, x: Tensor, sparsity: float) -> None:
    """SparseGPT on the first two layers, each behind those that are pruned."""
    for at in (0, 2):
        z, W = net[:at](x), net.get_parameter(f"{at}.weight")
        W.copy_(sparse_gpt(W, z.mT @ z / len(z), sparsity))
