"""Ways to make a model smaller: ours, and the published loops that they are compared with.

Each takes a copy of a model and calibration batches. *nearest*, *magnitude* and *Frobenius* look at
the weights alone; *GPTQ* and *SparseGPT* are the published loops; *SVD-LLM* and *KFAC-SVD* the
published recipes of low rank in the moment of the inputs and in both; *inputs* and *both* are ours
with one moment and with two.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, eye, nn

from benchmarks._loops import gptq, sparse_gpt
from matrigami import BlockTensorTrain, LowRank, Monarch, cost, project
from matrigami.compress import (
    Grid,
    Report,
    allocate,
    compress_,
    gradient_moments,
    n_of_m,
    set_weight,
    unstructured,
    weight,
)
from matrigami.compress._calibration import block_by_block
from matrigami.nn import chosen, stand_in, swap, under_budget

GROUP = 32
"""Inputs that share a scale, of a model of width 64."""

SAMPLES = 4
"""Draws of labels for each batch."""

SHARES = (0.75, 0.5)
"""Of the multiply-adds, for structures."""


@dataclass(frozen=True)
class Made:
    """A compressed model, what its chosen layers store and multiply, and what is to be told."""

    model: nn.Module
    nbytes: float
    macs: float
    note: str = ""


def clock_of(model: nn.Module) -> Callable[[], float]:
    """Seconds: of the processor, or where a card works beside it those of the wall."""
    on_card = next(model.parameters()).is_cuda
    return time.perf_counter if on_card else time.process_time


@dataclass
class Calibration:
    """Batches, and the moments of the gradients of a model, which all ways of a draw share.

    Attributes:
        seed: Of the draw.
        batches: As `compress_` takes them.
        samples: Draws of labels for each batch.
        seconds: What the moments took.
        owed: The same, for a way that got those of another one.
    """

    seed: int
    batches: list[Any]
    samples: int = SAMPLES
    seconds: float = 0.0
    owed: float = 0.0
    known: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The moments, computed when they are first asked for."""
        if self.known:
            self.owed = self.seconds
            return self.known
        clock = clock_of(model)
        start = clock()
        self.known = gradient_moments(model, self.batches, samples=self.samples)
        self.seconds = clock() - start
        return self.known


@dataclass(frozen=True)
class Way:
    """One way to make a model smaller.

    Attributes:
        family: Bits, sparsity, structure or budget.
        setting: How much.
        name: By which method.
        make: Compresses a copy, given batches.
        seeded: Whether it looks at the calibration.
    """

    family: str
    setting: str
    name: str
    make: Callable[[nn.Module, Calibration], Made]
    seeded: bool = True


def ways(group: int = GROUP) -> Iterator[Way]:
    """Everything that is measured, but the budgets last."""
    for bits in (4, 3, 2):
        grid = Grid(bits, group, symmetric=False)
        told = ("bits", f"{bits} bits")
        yield Way(*told, "nearest", partial(plainly, nearest(grid)), seeded=False)
        yield Way(*told, "GPTQ", partial(by_core, rounded(grid)))
        yield Way(*told, "inputs", partial(ours, grid, two_sided=False))
        yield Way(*told, "both", partial(ours, grid, two_sided=True))
    for sparsity in (0.5, 0.7):
        support = unstructured(sparsity)
        told = ("sparsity", f"{sparsity:.0%} removed")
        yield Way(*told, "magnitude", partial(plainly, by_magnitude(support)), seeded=False)
        yield Way(*told, "SparseGPT", partial(by_core, pruned(sparsity)))
        yield Way(*told, "inputs", partial(ours, support, two_sided=False))
        yield Way(*told, "both", partial(ours, support, two_sided=True))
    two_of_four = n_of_m(2, 4)
    yield Way("sparsity", "2 of 4", "both", partial(ours, two_of_four, two_sided=True))
    for share in SHARES:
        yield from structures(share)
    grids = [Grid(bits, group, symmetric=False) for bits in (2, 3, 4, 8)]
    for budget in ("0.5x bytes", "0.12x bytes"):
        yield Way("budget", budget, "allocate", partial(allocated, budget, grids))


def structures(share: float) -> Iterator[Way]:
    """The structures at a share of the multiply-adds."""
    for name, kind in (("LowRank", low_rank), ("Monarch", monarch), ("BTT", train)):
        told = ("structure", f"{name}, {share}x MACs")
        yield Way(*told, "Frobenius", partial(projected, kind, share), seeded=False)
        if kind is low_rank:
            yield Way(*told, "SVD-LLM", partial(svd_llm, share))
            yield Way(*told, "KFAC-SVD", partial(kfac_svd, share))
            yield Way(*told, "inputs", partial(structured, kind, share, two_sided=False))
        yield Way(*told, "both", partial(structured, kind, share, two_sided=True))


def low_rank(m: int, n: int, share: float) -> Any:
    """Of the rank that the budget pays."""
    return LowRank(rank=max(int(share * m * n / (m + n)), 1))


def monarch(m: int, n: int, share: float) -> Any:
    """A few, of which the nearest is taken."""
    return tuple(s for s in under_budget(m, n, share, "macs") if isinstance(s, Monarch))


def train(m: int, n: int, share: float) -> Any:
    """Of the rank that the budget pays."""
    found = under_budget(m, n, share, "macs")
    return next(s for s in found if isinstance(s, BlockTensorTrain))


def nearest(grid: Grid) -> Callable[[Tensor], tuple[Tensor, float, float]]:
    """Rounding to nearest, in the range from the least to the greatest weight."""
    grid = replace(grid, fitted=False)
    return lambda W: (grid.round(W).dense(), packed_bytes(grid, W), W.numel())


def by_magnitude(support: Any) -> Callable[[Tensor], tuple[Tensor, float, float]]:
    """The smallest weights go."""

    def core(W: Tensor) -> tuple[Tensor, float, float]:
        """One matrix."""
        mask = support(W)
        return W * mask, sparse_bytes(W, int(mask.sum())), float(mask.sum())

    return core


def rounded(grid: Grid) -> Callable[[Tensor, Tensor], tuple[Tensor, float, float]]:
    """The published loop of GPTQ."""
    return lambda W, A: (gptq(W, A.float(), grid), packed_bytes(grid, W), W.numel())


def pruned(sparsity: float) -> Callable[[Tensor, Tensor], tuple[Tensor, float, float]]:
    """The published loop of SparseGPT."""

    def core(W: Tensor, A: Tensor) -> tuple[Tensor, float, float]:
        """One matrix."""
        found = sparse_gpt(W, A.float(), sparsity)
        kept = int((found != 0).sum())
        return found, sparse_bytes(W, kept), kept

    return core


def packed_bytes(grid: Grid, W: Tensor) -> float:
    """Codes, and for each group a scale of 16 bits and a zero."""
    groups = len(W) * -(-W.shape[-1] // grid.size(W.shape[-1]))
    return (grid.bits * W.numel() + groups * (16 + grid.bits)) / 8


def sparse_bytes(W: Tensor, kept: int) -> float:
    """The numbers that stay, and a bit for each entry."""
    return W.element_size() * kept + W.numel() / 8


def plainly(core: Callable[[Tensor], Any], model: nn.Module, _: Calibration) -> Made:
    """Every layer by itself, from its weights alone."""
    nbytes = macs = 0.0
    for layer in chosen(model, None, ()).values():
        W, size, work = core(weight(layer))
        set_weight(layer, W)
        nbytes, macs = nbytes + size, macs + work
    return Made(model, nbytes, macs)


def by_core(core: Callable[[Tensor, Tensor], Any], model: nn.Module, data: Calibration) -> Made:
    """Every layer from its inputs, behind what is compressed, all vectors used."""
    layers, totals = chosen(model, None, ()), [0.0, 0.0]

    def compress(seen: Any) -> None:
        """The layers that were just seen."""
        for name, what in seen.items():
            A = (what.A + what.holdout) / (what.rows + what.held)
            W, size, work = core(weight(layers[name]), A)
            set_weight(layers[name], W)
            totals[0], totals[1] = totals[0] + size, totals[1] + work

    block_by_block(model, layers, data.batches, compress)
    return Made(model, totals[0], totals[1])


def ours(methods: Any, model: nn.Module, data: Calibration, *, two_sided: bool) -> Made:
    """By `compress_`."""
    gradients = data.gradients(model) if two_sided else False
    report = compress_(model, data.batches, methods, two_sided=gradients)
    return Made(model, *totals_of(report, model))


def totals_of(report: Report, model: nn.Module) -> tuple[float, float]:
    """Bytes and multiply-adds of the layers of a report."""
    sizes = {n: m.in_features * m.out_features for n, m in linears(model).items()}
    nbytes = sum(layer.bits * sizes[layer.name] / 8 for layer in report.layers)
    return nbytes, sum(layer.macs for layer in report.layers)


def linears(model: nn.Module) -> dict[str, Any]:
    """Layers with sizes."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}


def by_layer(kind: Callable[..., Any], share: float, model: nn.Module) -> dict[str, Any]:
    """The structure of each layer."""
    layers: dict[str, Any] = chosen(model, None, ())
    return {n: kind(m.out_features, m.in_features, share) for n, m in layers.items()}


def structured(
    kind: Callable[..., Any], share: float, model: nn.Module, data: Calibration, *, two_sided: bool
) -> Made:
    """By `compress_`, a structure of the size of each layer."""
    return ours(by_layer(kind, share, model), model, data, two_sided=two_sided)


def projected(kind: Callable[..., Any], share: float, model: nn.Module, _: Calibration) -> Made:
    """The nearest in the Frobenius norm."""
    nbytes = macs = 0.0
    for name, found in by_layer(kind, share, model).items():
        layer, W = model.get_submodule(name), weight(model.get_submodule(name))
        recipes = found if isinstance(found, tuple) else (found,)
        tried = [(r, project(r, W)) for r in recipes]
        recipe, value = min(tried, key=lambda t: float((W - t[1].dense()).norm()))
        swap(model, {layer: stand_in(layer, recipe, value)})
        nbytes, macs = nbytes + 4 * cost(value).params, macs + cost(value).macs
    return Made(model, nbytes, macs)


def svd_llm(share: float, model: nn.Module, data: Calibration) -> Made:
    """Low rank as SVD-LLM has it: nearest in the moment of the inputs, which is damped by 0.01."""
    return svd_by(share, 0.01, {}, model, data)


def kfac_svd(share: float, model: nn.Module, data: Calibration) -> Made:
    """Low rank as KFAC-SVD has it: norms of gradients in [0.1, 10], shrinkage 0.3 and 0.1."""
    moments = gradient_moments(model, data.batches, samples=data.samples, bound=(0.1, 10.0))
    left = {name: shrunk(B, 0.3) for name, B in moments.items()}
    return svd_by(share, 0.1, left, model, data)


def svd_by(
    share: float, damping: float, left: dict[str, Tensor], model: nn.Module, data: Calibration
) -> Made:
    """Every layer by a truncated SVD behind what is compressed, all vectors used."""
    layers = chosen(model, None, ())
    recipes, totals = by_layer(low_rank, share, model), [0.0, 0.0]

    def compress(seen: Any) -> None:
        """The layers that were just seen."""
        for name, what in seen.items():
            right = shrunk((what.A + what.holdout) / (what.rows + what.held), damping)
            value = project(recipes[name], weight(layers[name]), left=left.get(name), right=right)
            swap(model, {layers[name]: stand_in(layers[name], recipes[name], value)})
            totals[0] += 4 * cost(value).params
            totals[1] += cost(value).macs

    block_by_block(model, layers, data.batches, compress)
    return Made(model, totals[0], totals[1])


def shrunk(M: Tensor, share: float) -> Tensor:
    """A multiple of its mean diagonal added."""
    return M + share * M.diagonal().mean() * eye(len(M)).to(M)


def allocated(budget: str, grids: list[Grid], model: nn.Module, data: Calibration) -> Made:
    """By `allocate`, over grids and half of the weights removed."""
    options = [*grids, unstructured(0.5)]
    found = allocate(model, data.batches, budget, options, two_sided=data.gradients(model))
    told = {
        "predicted": found.predicted,
        "measured": found.measured,
        "uniform": found.uniform,
        "uniform measured": found.uniform_measured,
        "fell back": found.fell_back,
    }
    nbytes, macs = totals_of(found.report, found.model)
    return Made(found.model, nbytes, macs, json.dumps(told))
