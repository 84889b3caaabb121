"""What compression would cost: for every layer and method the predicted loss, before any work.

The prediction is the quadratic one of the curvature of the model as it is, `tr(B E A E.T) / 2` in
each layer on held-out vectors: with the output gradients of labels drawn from the model's own
logits it is the Kullback-Leibler divergence to the model in nats a token, and it adds over layers.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from matrigami._words import columns
from matrigami.compress._calibration import observed
from matrigami.compress._generation import examples
from matrigami.compress._gradients import Gradients, gradients_of
from matrigami.compress._layers import tensors_of, weight
from matrigami.compress._methods import Method, Progress, described, fitting, meant, outcome
from matrigami.compress._worth import faster_from, ranks
from matrigami.nn import Patterns, StructuredLinear


@dataclass(frozen=True)
class Option:
    """What one method would do to one layer.

    Attributes:
        layer: The layer.
        method: The method in words.
        predicted: Nats a token by which the loss would rise.
        loss: Relative loss of the layer on held-out vectors.
        nbytes: Stored bytes of the weight.
        macs: Multiply-adds for one input vector.
        index: The number of the method.
        faster_from: Vectors at once from which a structured layer takes less time than this one, as
            measured, or `never`; empty if it was not measured, or the product stays what it is.
    """

    layer: str
    method: str
    predicted: float
    loss: float
    nbytes: float
    macs: int
    index: int
    faster_from: str = ""


@dataclass
class CompressionPlan:
    """Options by layer; printed, a table with the sums of every method below.

    Attributes:
        methods: The methods, in words.
        options: For each layer those that fit it.
        dense: Bytes and multiply-adds of each layer as it is.
        misfits: Layers and methods that do not go together, with the reason.
        ranks: For each layer how many singular values of its weights, on its inputs, have 90 % and
            99 % of the sum of squares.
    """

    methods: list[str]
    options: dict[str, list[Option]] = field(default_factory=dict)
    dense: dict[str, tuple[int, int]] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def total(self, index: int) -> Option | None:
        """The sum of one method over all layers; None where it does not fit one of them."""
        found = [o for options in self.options.values() for o in options if o.index == index]
        if len(found) < len(self.options):
            return None
        parts = [(o.predicted, o.nbytes, o.macs) for o in found]
        predicted, nbytes, macs = (sum(column) for column in zip(*parts, strict=True))
        return Option("all", self.methods[index], predicted, float("nan"), nbytes, macs, index)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        """A table: a line for each layer and method."""
        totals = [t for i in range(len(self.methods)) if (t := self.total(i)) is not None]
        rows = [_row(o) for o in [*chain(*self.options.values()), *totals]]
        head = ["layer", "method", "predicted nats", "loss", "bytes", "MACs", "faster from"]
        shown = len(head) - (not any(row[-1] for row in rows))
        lines = columns([row[:shown] for row in [head, *rows]], [False] * 2 + [True] * (shown - 2))
        return "\n".join([*lines, *self.misfits, *self._spectra()])

    def _spectra(self) -> list[str]:
        """How many directions each layer has."""
        rows = [["layer", "rank of 90 %", "of 99 %"]]
        rows += [[name, *map(str, found)] for name, found in self.ranks.items()]
        return ["", *columns(rows, [False, True, True])] if self.ranks else []


def _row(option: Option) -> list[str]:
    """A line of the table."""
    loss = "" if option.layer == "all" else f"{option.loss:.2e}"
    sizes = f"{option.nbytes:.0f}", str(option.macs), option.faster_from
    return [option.layer, option.method, f"{option.predicted:.2e}", loss, *sizes]


def plan(
    model: nn.Module,
    calibration: Iterable[Any],
    methods: Sequence[Method],
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = True,
    timed: bool = False,
    progress: Progress | None = None,
) -> CompressionPlan:
    """What each of some methods would do to each layer of a model, which is not changed.

    All layers are observed in one run of the model as it is, so that what is compressed in front of
    a layer is not seen; and a prediction to second order is for small errors.

    Args:
        model: Any model; with `two_sided` its outputs are logits.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        methods: Grids, supports, structures, or budgets such as `0.5x macs`.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave out.
        two_sided: Whether the gradients of the outputs count; without them predictions are squared
            errors of the outputs of each layer, which do not compare between layers. Or what
            `gradient_moments` returns.
        timed: Whether structured layers are timed beside those that they would replace.
        progress: Told after every layer.

    Raises:
        ValueError: If a pattern matches nothing, or there are no batches.
    """
    layers, data = meant(model, targets, ignore, methods), examples(model, calibration)
    gradients = gradients_of(two_sided, model, layers, data)
    seen = observed(model, layers, data)
    found = CompressionPlan([described(method) for method in methods])
    speeds: dict[Any, str] = {}
    for name, layer in layers.items():
        W, what = weight(layer), seen[name]
        found.ranks[name] = ranks(W, None if what is None else what.moments()[0])
        found.dense[name], found.options[name] = _size(layer), []
        for i, method in enumerate(methods):
            try:
                way = fitting(method, layer)
            except ValueError as error:
                found.misfits.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            made = outcome(way, layer, what, gradients.get(name))
            told = (made.absolute, made.loss, made.nbytes, made.macs, i)
            kind = type(layer), W.shape, i
            if timed and kind not in speeds:
                speeds[kind] = faster_from(layer, made.new)
            option = Option(name, found.methods[i], *told, speeds.get(kind, ""))
            found.options[name].append(option)
        if progress is not None:
            progress(len(found.options), len(layers), name)
    return found


def _size(layer: nn.Module) -> tuple[int, int]:
    """Bytes and multiply-adds of a layer as it is."""
    tensors = tensors_of(layer).values()
    macs = layer.cost().macs if isinstance(layer, StructuredLinear) else weight(layer).numel()
    return sum(t.nbytes for t in tensors), macs
