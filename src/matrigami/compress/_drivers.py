"""Whole models: `quantize_`, `prune_`, `structure_`, in place, behind one calibration.

Shapes: m = outputs, n = inputs of a layer.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._calibration import Seen, block_by_block, output_moments
from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._layers import set_weight, weight
from matrigami.compress._moments import damped, row_losses
from matrigami.compress._removal import Support, remove
from matrigami.compress._rounding import round_ldl
from matrigami.nn import chosen, stand_in, swap
from matrigami.operators import Structure, cost, project

DAMPINGS = (0.01, 0.1, 0.001)
"""Tried on the vectors that are held out; the best is taken."""

UNREACHED = "not reached by the calibration: the simple method"
"""The note on a layer that has seen nothing."""

NAN = float("nan")

Progress = Callable[[int, int, str], None]
"""Told the number of layers that are done, of all, and the name of the last one."""


@dataclass(frozen=True)
class LayerReport:
    """What was done with one layer.

    Attributes:
        name: The layer.
        rows: Vectors in its calibration; 0 if none has reached it.
        rejected: Vectors that were left out because they were not finite.
        damping: Of the moments, relative to their mean diagonal.
        loss: Relative loss of the layer on held-out vectors.
        simple: The same of the simple method: rounding to nearest, removal by magnitude, or the
            projection without a metric.
        bits: Stored bits of a weight, scales counted.
        note: What a reader should know, or nothing.
    """

    name: str
    rows: int
    rejected: int
    damping: float
    loss: float
    simple: float
    bits: float
    note: str = ""


@dataclass
class Report:
    """What was done with a model, layer by layer; `values` holds the compressed matrices."""

    layers: list[LayerReport] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The layers as a JSON list."""
        return json.dumps([asdict(layer) for layer in self.layers], indent=1)

    def __str__(self) -> str:
        """A table."""
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'rows':>8}  {'loss':>9}  {'simple':>9}  {'bits':>5}  note"]
        lines += [
            f"{r.name:{width}}  {r.rows:>8}  {r.loss:>9.2e}  {r.simple:>9.2e}  {r.bits:>5.2f}  "
            f"{r.note}"
            for r in self.layers
        ]
        return "\n".join(line.rstrip() for line in lines)


def quantize_(
    model: nn.Module,
    calibration: Iterable[Any],
    grid: Grid | None = None,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    two_sided: bool = False,
    damping: float | tuple[float, ...] = DAMPINGS,
    progress: Progress | None = None,
) -> Report:
    """Round the weights of a model onto integer grids, in place.

    The weights are overwritten by the numbers that the codes stand for, so that the model runs as
    before; the codes are in the report, for files.

    Args:
        model: Any model; by default all its linear layers but the last, and convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords.
        grid: Bits, groups, symmetry; `Grid()` (4 bits, groups of 128) by default.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too: one backward pass for each batch
            and draw, of a model whose outputs are logits.
        damping: Of several the best on held-out vectors is taken, layer by layer.
        progress: Told after every layer.

    Raises:
        ValueError: If a pattern matches nothing, or there are no batches.
    """
    grid = Grid() if grid is None else grid

    def one(layer: nn.Module, seen: Seen | None, B: Tensor | None) -> _Outcome:
        """Round one matrix."""
        W = weight(layer).float()
        if seen is None:
            value = grid.round(W)
            return _Outcome(value.dense(), value, 0.0, NAN, NAN, bits(value), UNREACHED)
        A, holdout = seen.moments()
        found = round_ldl(W, A, B, grid=grid, damping=damping, holdout=holdout)
        note = "" if found.kept == 0 else f"{found.kept} of {len(W)} rows rounded to nearest"
        losses = float(found.loss), float(found.nearest)
        return _Outcome(
            found.value.dense(), found.value, found.damping, *losses, bits(found.value), note
        )

    return _compressed(model, calibration, one, targets, ignore, two_sided, progress)


def prune_(
    model: nn.Module,
    calibration: Iterable[Any],
    support: Support,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    two_sided: bool = False,
    damping: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Set weights of a model to zero, in place, and fit the others.

    Args:
        model: Any model; by default all its linear layers but the last, and convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords.
        support: What may stay: `unstructured(0.5)`, `n_of_m(2, 4)`.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too.
        damping: Of the moments, relative to their mean diagonal.
        progress: Told after every layer.

    Raises:
        ValueError: If a pattern matches nothing, or there are no batches.
    """

    def one(layer: nn.Module, seen: Seen | None, B: Tensor | None) -> _Outcome:
        """Prune one matrix."""
        W = weight(layer).float()
        plain = remove(W, support)
        size = sparse_bits(plain.mask, W)
        if seen is None:
            return _Outcome(plain.W, plain.mask, 0.0, NAN, NAN, size, UNREACHED)
        A, holdout = seen.moments()
        found = remove(W, support, A, B, damping=damping, holdout=holdout)
        whole = row_losses(W.double(), holdout, B).sum()
        simple = float(row_losses((W - plain.W).double(), holdout, B).sum() / whole)
        if simple < found.loss:
            note = "by magnitude: nothing better was found"
            return _Outcome(plain.W, plain.mask, damping, simple, simple, size, note)
        return _Outcome(found.W, found.mask, damping, found.loss, simple, size, "")

    return _compressed(model, calibration, one, targets, ignore, two_sided, progress)


def structure_(
    model: nn.Module,
    calibration: Iterable[Any],
    structure: Structure,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    two_sided: bool = False,
    damping: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Replace linear layers of a model by structured ones, in place, nearest in the moments.

    Args:
        model: Any model; by default all its linear layers but the last, and convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords.
        structure: The structure of the new weights, e.g. `LowRank(rank=0.25)`.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too.
        damping: Of the moments, relative to their mean diagonal.
        progress: Told after every layer.

    Raises:
        ValueError: If a pattern matches nothing, no structured layer is known for a layer or its
            size does not fit, or there are no batches; the model is as it was.
    """
    for layer in chosen(model, targets, ignore).values():
        stand_in(layer, structure)  # refused before anything is changed

    def one(layer: nn.Module, seen: Seen | None, B: Tensor | None) -> _Outcome:
        """Project one matrix."""
        W = weight(layer).float()
        A, holdout = (None, None) if seen is None else seen.moments()
        plain = project(structure, W)
        value = plain
        if A is not None:
            left = None if B is None else damped(B, damping)
            value = project(structure, W, left=left, right=damped(A, damping))
        judge = torch.eye(W.shape[-1]).double() if holdout is None else holdout
        whole = row_losses(W.double(), judge, B).sum()
        found, simple = (
            float(row_losses((W - V.dense()).double(), judge, B).sum() / whole)
            for V in (value, plain)
        )
        if simple < found:
            value, found = plain, simple
        size = 8 * W.element_size() * cost(value).params / W.numel()
        note = UNREACHED if seen is None else ""
        new = stand_in(layer, structure, value)
        return _Outcome(new, value, damping, found, simple, size, note)

    return _compressed(model, calibration, one, targets, ignore, two_sided, progress)


def bits(value: QuantizedMatrix) -> float:
    """Stored bits of a weight, scales of 16 bits and zeros counted."""
    groups = value.scale.numel() * (16 + (0 if value.zero is None else value.bits))
    return value.bits + groups / value.codes.numel()


def sparse_bits(mask: Tensor, W: Tensor) -> float:
    """Stored bits of a weight: those that stay, and one to say which."""
    return 1 + 8 * W.element_size() * float(mask.sum()) / mask.numel()


@dataclass(frozen=True)
class _Outcome:
    """What became of one layer: new weights or a value, what is kept, and what is told."""

    new: Tensor | nn.Module
    kept: Any
    damping: float
    loss: float
    simple: float
    bits: float
    note: str


def _compressed(
    model: nn.Module,
    calibration: Iterable[Any],
    one: Callable[[nn.Module, Seen | None, Tensor | None], _Outcome],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
    two_sided: bool,
    progress: Progress | None,
) -> Report:
    """Compress the chosen layers by a function of one layer and what it has seen."""
    layers, data = chosen(model, targets, ignore), list(calibration)
    if not data:
        raise ValueError(
            "the calibration has no batches.\nGive some: a few hundred vectors are enough."
        )
    gradients: Mapping[str, Tensor] = output_moments(model, layers, data) if two_sided else {}
    report = Report()

    def compress(seen: Mapping[str, Seen | None]) -> None:
        """Compress the layers that were just seen."""
        for name, what in seen.items():
            made = one(layers[name], what, gradients.get(name))
            _put(model, name, made.new)
            report.values[name] = made.kept
            counts = (0, 0) if what is None else (what.rows, what.rejected)
            told = (made.damping, made.loss, made.simple, made.bits, made.note)
            report.layers.append(LayerReport(name, *counts, *told))
            if progress is not None:
                progress(len(report.layers), len(layers), name)

    block_by_block(model, layers, data, compress)
    return report


def _put(model: nn.Module, name: str, new: Tensor | nn.Module) -> None:
    """New weights into the layer, or a structured layer in its place."""
    old = model.get_submodule(name)
    if isinstance(new, Tensor):
        set_weight(old, new)
    else:
        swap(model, {old: new})
