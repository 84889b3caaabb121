"""A budget for a whole model: which layer is compressed how far.

One knapsack over all layers: of the options of each exactly one, so that the predicted losses sum
to the least under the budget. Predictions are not measurements, and mixed choices made from them
are known to lose to uniform ones; so both are made, measured on held-out batches, and the better
one is kept.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from matrigami.compress._calibration import HELD_OUT
from matrigami.compress._drivers import compress_
from matrigami.compress._evaluation import evaluate
from matrigami.compress._generation import examples
from matrigami.compress._gradients import Gradients, gradients_of
from matrigami.compress._grid import Grid
from matrigami.compress._methods import Method, Progress, meant
from matrigami.compress._outcome import NAN
from matrigami.compress._plan import CompressionPlan, Option, plan
from matrigami.compress._report import Report
from matrigami.nn import Patterns, parsed_budget

BITS = tuple(Grid(bits) for bits in (2, 3, 4, 8))
"""What is allocated by default."""

BINS = 64
"""Steps of the budget for each layer; sizes are rounded up to them."""


@dataclass(frozen=True)
class Allocation:
    """A compressed model, and how it was chosen.

    Attributes:
        model: The compressed copy.
        report: What was done with its layers; `report.values` for files.
        methods: The method of each layer.
        size: Bytes, multiply-adds or parameters of the compressed layers, as the budget counts.
        dense: The same of the layers as they were.
        predicted: Nats a token by which the loss was to rise, by the plan.
        measured: Mean divergence from the given model on held-out batches, in nats a token.
        uniform: The best method that fits everywhere, in words; empty if none does.
        uniform_predicted: What the plan says of it.
        uniform_measured: What it measures.
        fell_back: Whether the uniform choice is the one that was kept.
    """

    model: nn.Module
    report: Report
    methods: dict[str, Method]
    size: float
    dense: float
    predicted: float
    measured: float
    uniform: str
    uniform_predicted: float
    uniform_measured: float
    fell_back: bool

    def __str__(self) -> str:
        """What was kept, in two lines."""
        kept = f"uniform, {self.uniform}: it is better" if self.fell_back else "allocated"
        return (
            f"{kept}; {self.size:.0f} of {self.dense:.0f}\n"
            f"nats a token: predicted {self.predicted:.2e}, measured {self.measured:.2e}; "
            f"uniform {self.uniform_predicted:.2e}, {self.uniform_measured:.2e}"
        )


def allocate(
    model: nn.Module,
    calibration: Iterable[Any],
    budget: str,
    over: Sequence[Method] = BITS,
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = True,
    progress: Progress | None = None,
) -> Allocation:
    """Compress a copy of a model to a share of its size, each layer as far as it bears.

    Args:
        model: The model, whose outputs are logits; it is not changed.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords, or "self", as
            for `quantize_`. Every fourth is held out, for the losses and for the comparison with
            the uniform choice.
        budget: A share of the chosen layers, `0.25x bytes` or `0.5x macs`.
        over: Grids, supports, structures, budgets for structures.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count; without them predictions do not
            compare between layers. Or what `gradient_moments` returns.
        progress: Told after every layer that is planned, and after every one that is compressed.

    Raises:
        ValueError: If even the smallest options are above the budget, or a pattern matches nothing.
    """
    share, unit = parsed_budget(budget, ("bytes", "macs"))
    data = examples(model, calibration)
    options = {"targets": targets, "ignore": ignore, "progress": progress}
    gradients = gradients_of(two_sided, model, meant(model, targets, ignore, over), data)
    table = plan(model, data, over, two_sided=gradients or False, **options)
    size = _bytes if unit == "bytes" else _macs
    dense = float(sum(d[unit == "macs"] for d in table.dense.values()))
    picked = knapsack(table, size, share * dense, budget)
    found = _made(model, data, {o.layer: over[o.index] for o in picked}, gradients, progress)
    uniform = _uniform(table, size, share * dense)
    other = None
    if uniform is not None:
        alike = dict.fromkeys(table.options, over[uniform.index])
        other = found if alike == found[1] else _made(model, data, alike, gradients, progress)
    if uniform is not None and other is not None and other[3] < found[3]:
        picked, kept = [uniform], other
    else:
        kept = found
    return Allocation(
        model=kept[0],
        methods=kept[1],
        report=kept[2],
        size=sum(map(size, picked)),
        dense=dense,
        predicted=sum(o.predicted for o in picked),
        measured=kept[3],
        uniform="" if uniform is None else uniform.method,
        uniform_predicted=NAN if uniform is None else uniform.predicted,
        uniform_measured=NAN if other is None else other[3],
        fell_back=kept is not found,
    )


def knapsack(table: CompressionPlan, size: Any, limit: float, budget: str) -> list[Option]:
    """One option of each layer, of least predicted loss in all, by dynamic programming.

    Raises:
        ValueError: If the smallest options are too large together.
    """
    layers = _predicted(table, budget)
    least = sum(min(map(size, options)) for options in layers)
    if not least <= limit:
        raise ValueError(
            f"allocate(budget={budget!r}): the smallest options take {least:.0f}, and the budget "
            f"is {limit:.0f}.\nGive smaller options in over=, or a larger budget."
        )
    bins = BINS * len(layers)
    best, taken = np.zeros(bins + 1), []
    for options in layers:
        costs = [_shifted(best, size(o) * bins / limit) + o.predicted for o in options]
        taken.append(np.argmin(costs, 0))
        best = np.min(costs, 0)
    if not np.isfinite(best[bins]):  # only by rounding up: the smallest of each
        return [min(options, key=size) for options in layers]
    return _traced(layers, taken, lambda option: int(np.ceil(size(option) * bins / limit)))


def _traced(
    layers: list[list[Option]], taken: list[Any], steps: Callable[[Option], int]
) -> list[Option]:
    """The options that lead to the best end, from the last layer to the first."""
    found, at = [], -1
    for options, choice in zip(reversed(layers), reversed(taken), strict=True):
        found.append(options[choice[at]])
        at -= steps(found[-1])
    return found[::-1]


def _predicted(table: CompressionPlan, budget: str) -> list[list[Option]]:
    """The options of each layer whose loss is known.

    Raises:
        ValueError: If a layer has none.
    """
    known = {
        name: [o for o in options if o.predicted == o.predicted]
        for name, options in table.options.items()
    }
    if unknown := [name for name, options in known.items() if not options]:
        raise ValueError(
            f"allocate(budget={budget!r}): nothing can be predicted of {', '.join(unknown)}: no "
            "method fits, or the calibration does not reach it (fused attention calls no layer of "
            "its own).\nLeave it by ignore=, or give other methods."
        )
    return list(known.values())


def _shifted(best: Any, size: float) -> Any:
    """The least loss where so much of the budget is taken."""
    step = int(np.ceil(size))
    moved = np.full_like(best, np.inf)
    if step < len(best):
        moved[step:] = best[: len(best) - step]
    return moved


def _uniform(table: CompressionPlan, size: Any, limit: float) -> Option | None:
    """The method that fits all layers and the budget with the least predicted loss."""
    totals = [table.total(i) for i in range(len(table.methods))]
    fitting = [t for t in totals if t is not None and size(t) <= limit]
    return min(fitting, key=lambda t: t.predicted, default=None)


def _made(
    model: nn.Module,
    data: list[Any],
    methods: dict[str, Method],
    gradients: Gradients,
    progress: Progress | None,
) -> tuple[nn.Module, dict[str, Method], Report, float]:
    """A compressed copy, and its divergence from the model on held-out batches."""
    made = copy.deepcopy(model)
    report = compress_(made, data, methods, two_sided=gradients or False, progress=progress)
    held = data[HELD_OUT - 1 :: HELD_OUT] or data
    return made, methods, report, evaluate(made, model, held).kl


def _bytes(option: Option) -> float:
    """What the budget counts."""
    return option.nbytes


def _macs(option: Option) -> float:
    """What the budget counts."""
    return float(option.macs)
