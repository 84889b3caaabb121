"""Whole models: `quantize_`, `prune_`, `structure_`, in place, behind one calibration.

Shapes: m = outputs, n = inputs of a layer.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from matrigami.compress._calibration import block_by_block
from matrigami.compress._generation import examples
from matrigami.compress._gradients import Gradients, gradients_of, summed
from matrigami.compress._grid import Grid
from matrigami.compress._journal import Journal, fingerprint
from matrigami.compress._layers import (
    set_matrices,
    set_weight,
    tensors_of,
    untouched,
)
from matrigami.compress._methods import Method, Progress, described, fitting, meant
from matrigami.compress._moments import Seen, checked_dampings
from matrigami.compress._report import LayerReport, Report
from matrigami.compress._running import expect
from matrigami.compress._supports import Support
from matrigami.compress._trials import Maker
from matrigami.nn import Patterns, matching, swap
from matrigami.nn._choice import for_each, patterns_in
from matrigami.operators import LinearOperator, Structure


def quantize_(
    model: nn.Module,
    calibration: Iterable[Any],
    grid: Grid | None = None,
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = False,
    damping: float | tuple[float, ...] | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Report:
    """Round the weights of a model onto integer grids, in place.

    The weights are overwritten by the numbers that the codes stand for, so that the model runs as
    before; the codes are in the report, for files. Of structured layers those of each factor.

    Args:
        model: Any model; by default all its linear layers but the last, structured ones, too, and
            convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        grid: Bits, groups, symmetry; `Grid()` (4 bits, groups of 128) by default.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too: one backward pass for each batch
            and draw, of a model whose outputs are logits; or what `gradient_moments` returns.
        damping: Of several the best on held-out vectors is taken, layer by layer; None for three.
        progress: Told after every layer.
        journal: A folder for finished blocks: a call that was killed goes on where it was.

    Raises:
        ValueError: If a pattern matches nothing, or there are no batches.
    """
    grid = Grid() if grid is None else grid
    expect("quantize_(grid=)", grid, Grid, "Grid(4)")
    options = (targets, ignore, two_sided, damping, progress, journal)
    return _compressed(model, calibration, grid, *options)


def prune_(
    model: nn.Module,
    calibration: Iterable[Any],
    support: Support,
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = False,
    damping: float | tuple[float, ...] | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Report:
    """Set weights of a model to zero, in place, and fit the others.

    Args:
        model: Any model; by default all its linear layers but the last, and convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        support: What may stay: `unstructured(0.5)`, `n_of_m(2, 4)`, `whole_columns(0.5)`.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too; or their `gradient_moments`.
        damping: Of the moments, relative to their mean diagonal; of several the best on held-out
            vectors is taken, layer by layer; None for 0.01.
        progress: Told after every layer.
        journal: A folder for finished blocks: a call that was killed goes on where it was.

    Raises:
        ValueError: If a pattern matches nothing, or there are no batches.
    """
    expect("prune_(support=)", support, Callable, "unstructured(0.5) or n_of_m(2, 4)")
    options = (targets, ignore, two_sided, damping, progress, journal)
    return _compressed(model, calibration, support, *options)


def structure_(
    model: nn.Module,
    calibration: Iterable[Any],
    structure: Structure | None = None,
    *,
    budget: str | None = None,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = False,
    damping: float | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Report:
    """Replace linear layers of a model by structured ones, in place, nearest in the moments.

    Args:
        model: Any model; by default all its linear layers but the last, and convolutions.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        structure: The structure of the new weights, e.g. `LowRank(rank=0.25)`.
        budget: In its place a share such as `0.5x macs`: the nearest structure below it for each
            layer, of full rank without shared weights.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too; or their `gradient_moments`.
        damping: Of the moments, relative to their mean diagonal; None for 0.01, and where gradients
            count for the best of three trusts in them, tried block by block.
        progress: Told after every layer.
        journal: A folder for finished blocks: a call that was killed goes on where it was.

    Raises:
        ValueError: If a pattern matches nothing, no structured layer is known for a layer or its
            size does not fit, or there are no batches; the model is as it was.
    """
    if (structure is None) == (budget is None):
        raise ValueError(
            "structure_: one of structure= and budget= must be given.\n"
            "Write structure_(model, data, LowRank(rank=0.25)) or budget='0.5x macs'."
        )
    methods: Any = structure if budget is None else budget
    kinds = Structure if budget is None else str
    expect("structure_(structure=, budget=)", methods, kinds, "LowRank(rank=0.25), or '0.5x macs'")
    options = (targets, ignore, two_sided, damping, progress, journal)
    return _compressed(model, calibration, methods, *options)


def compress_(
    model: nn.Module,
    calibration: Iterable[Any],
    methods: Method | Mapping[str, Method],
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    two_sided: bool | Gradients = False,
    damping: float | tuple[float, ...] | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Report:
    """Compress the layers of a model, each in its own way, in place.

    Args:
        model: Any model.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        methods: A `Grid`, a support, a structure, several structures or a budget for one; or one of
            these for each pattern of names, of which the first that matches counts.
        targets: Patterns of layer names; not with a mapping, whose patterns these are.
        ignore: Patterns of layers to leave as they are.
        two_sided: Whether the gradients of the outputs count, too; or their `gradient_moments`.
        damping: Of the moments; None for the defaults of the methods.
        progress: Told after every layer.
        journal: A folder for finished blocks: a call that was killed goes on where it was.

    Raises:
        ValueError: If a pattern matches nothing, a method does not fit, or there are no batches.
    """
    targets = patterns_in(methods, targets, "compress_", "methods")
    options = (targets, ignore, two_sided, damping, progress, journal)
    return _compressed(model, calibration, methods, *options)


def by_layer(
    model: nn.Module, layers: Mapping[str, nn.Module], methods: Method | Mapping[str, Method]
) -> dict[str, Method]:
    """The method of each layer, which must fit it."""
    if isinstance(methods, Mapping):
        patterns = matching(list(methods), layers, model, "methods")
        found = {name: methods[patterns[name]] for name in layers}
    else:
        found = dict.fromkeys(layers, methods)
    return for_each(layers, lambda name, layer: fitting(found[name], layer))


def _compressed(
    model: nn.Module,
    calibration: Iterable[Any],
    methods: Method | Mapping[str, Method],
    targets: Patterns | None,
    ignore: Patterns,
    two_sided: bool | Gradients,
    damping: float | tuple[float, ...] | None,
    progress: Progress | None,
    journal: str | Path | None,
) -> Report:
    """Compress the chosen layers block by block, each behind those that are compressed."""
    several = methods.values() if isinstance(methods, Mapping) else (methods,)
    layers, data = meant(model, targets, ignore, several), examples(model, calibration)
    checked_dampings("compress", 0.0 if damping is None else damping)
    ways = by_layer(model, layers, methods)
    told = {name: described(method) for name, method in ways.items()}
    book = None
    if journal is not None:
        book = Journal(journal, fingerprint(model, data, told, summed(two_sided), damping))
    gradients = gradients_of(two_sided, model, layers, data)
    made_of = Maker(model, layers, ways, gradients, damping, data)
    done = {} if book is None else book.finished()
    report = Report(left=untouched(model, layers))

    def compress(seen: Mapping[str, Seen | None]) -> None:
        """Compress the layers that were just seen."""
        finished: list[tuple[LayerReport, Any]] = []
        if book is not None and seen.keys() & done.keys():
            for told, value in book.restore_(model, done[next(iter(seen))]):
                report.layers.append(told)
                report.values[told.name] = value
            return
        _refuse_not_finite(seen)
        for name, made in made_of(seen).items():
            what = seen[name]
            counts = (0, 0) if what is None else (what.rows, what.rejected)
            size = sum(t.numel() for t in tensors_of(layers[name]).values())
            finished.append((LayerReport.of(name, ways[name], made, size, counts), made.value))
            _put(model, name, made.new)
            report.layers.append(finished[-1][0])
            report.values[name] = made.value
            if progress is not None:
                progress(len(report.layers), len(layers), name)
        if book is not None and finished:
            book.write(model, finished)

    block_by_block(model, layers, data, compress, done)
    return report


def _refuse_not_finite(layers: Mapping[str, Seen | None]) -> None:
    """Raise if a layer has seen nothing but NaN."""
    for name, seen in layers.items():
        if seen is not None and seen.rejected and not seen.rows + seen.held:
            raise ValueError(
                f"compress: all {seen.rejected} vectors of the calibration are NaN or infinite at "
                f"the layer {name}.\nIt was left as it is, and all behind it.\n"
                "Look for NaN in the batches, or for a layer before it that overflows."
            )


def _put(
    model: nn.Module, name: str, new: Tensor | nn.Module | Mapping[str, LinearOperator]
) -> None:
    """New weights or matrices into the layer, or a structured layer in its place."""
    old = model.get_submodule(name)
    if isinstance(new, Tensor):
        set_weight(old, new)
    elif isinstance(new, Mapping):
        set_matrices(old, new)
    else:
        swap(model, {old: new})
