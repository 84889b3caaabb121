"""Whole models: `quantize_`, `prune_`, `structure_`, in place, behind one calibration.

Shapes: m = outputs, n = inputs of a layer.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from matrigami.compress._calibration import Seen, block_by_block, output_moments
from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._layers import chosen, set_weight, weight
from matrigami.compress._moments import row_losses
from matrigami.compress._removal import Support, remove
from matrigami.compress._rounding import round_ldl

DAMPINGS = (0.01, 0.1, 0.001)
"""Tried on the vectors that are held out; the best is taken."""

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

    def one(W: Tensor, seen: Seen | None, B: Tensor | None) -> tuple[Tensor, Any, tuple[Any, ...]]:
        """Round one matrix."""
        if seen is None:
            value = grid.round(W)
            return (
                value.dense(),
                value,
                (0.0, float("nan"), float("nan"), bits(value), "not reached: rounded to nearest"),
            )
        A, holdout = seen.moments()
        found = round_ldl(W, A, B, grid=grid, damping=damping, holdout=holdout)
        note = "" if found.kept == 0 else f"{found.kept} of {len(W)} rows rounded to nearest"
        told = (found.damping, float(found.loss), float(found.nearest), bits(found.value), note)
        return found.value.dense(), found.value, told

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

    def one(W: Tensor, seen: Seen | None, B: Tensor | None) -> tuple[Tensor, Any, tuple[Any, ...]]:
        """Prune one matrix."""
        if seen is None:
            plain = remove(W, support)
            return (
                plain.W,
                plain.mask,
                (
                    0.0,
                    float("nan"),
                    plain.loss,
                    sparse_bits(plain.mask, W),
                    "not reached: by magnitude",
                ),
            )
        A, holdout = seen.moments()
        found = remove(W, support, A, B, damping=damping, holdout=holdout)
        E = (W - W * support(W)).double()
        simple = float(row_losses(E, holdout, B).sum() / row_losses(W.double(), holdout, B).sum())
        if simple < found.loss:
            plain = remove(W, support)
            return (
                plain.W,
                plain.mask,
                (damping, simple, simple, sparse_bits(plain.mask, W), "by magnitude: no worse"),
            )
        return found.W, found.mask, (damping, found.loss, simple, sparse_bits(found.mask, W), "")

    return _compressed(model, calibration, one, targets, ignore, two_sided, progress)


def bits(value: QuantizedMatrix) -> float:
    """Stored bits of a weight, scales of 16 bits and zeros counted."""
    groups = value.scale.numel() * (16 + (0 if value.zero is None else value.bits))
    return value.bits + groups / value.codes.numel()


def sparse_bits(mask: Tensor, W: Tensor) -> float:
    """Stored bits of a weight: those that stay, and one to say which."""
    return 1 + 8 * W.element_size() * float(mask.sum()) / mask.numel()


def _compressed(
    model: nn.Module,
    calibration: Iterable[Any],
    one: Callable[[Tensor, Seen | None, Tensor | None], tuple[Tensor, Any, tuple[Any, ...]]],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
    two_sided: bool,
    progress: Progress | None,
) -> Report:
    """Compress the chosen layers by a function of one matrix and what it has seen."""
    layers = chosen(model, targets, ignore)
    data = list(calibration)
    if not data:
        raise ValueError(
            "the calibration has no batches.\nGive some: a few hundred vectors are enough."
        )
    gradients: Mapping[str, Tensor] = output_moments(model, layers, data) if two_sided else {}
    report = Report()

    def compress(seen: Mapping[str, Seen | None]) -> None:
        """Compress the layers that were just seen."""
        for name, what in seen.items():
            W = weight(layers[name]).float()
            new, report.values[name], told = one(W, what, gradients.get(name))
            set_weight(layers[name], new)
            counts = (0, 0) if what is None else (what.rows, what.rejected)
            report.layers.append(LayerReport(name, *counts, *told))
            if progress is not None:
                progress(len(report.layers), len(layers), name)

    block_by_block(model, layers, data, compress)
    return report
