"""What can be done with one layer: its type says which of the three ways is meant.

    Grid                       rounded
    function of importances    pruned
    structures                 the nearest of them in its place
    text, "0.5x macs"          the nearest structure of full rank under this budget

Shapes: m = outputs, n = inputs of a layer.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._cores import check_cores, rounded_cores
from matrigami.compress._grid import Grid, quantized_bytes
from matrigami.compress._layers import tensors_of, weight, with_structured
from matrigami.compress._moments import Seen
from matrigami.compress._outcome import DAMPING, NAN, UNREACHED, Outcome, aim, half_loss
from matrigami.compress._removal import remove
from matrigami.compress._rounding import roundings
from matrigami.compress._running import expect
from matrigami.compress._structuring import EVEN, Structuring
from matrigami.compress._supports import Support
from matrigami.nn import (
    Patterns,
    StructuredLinear,
    chosen,
    matrix_view,
    parsed_budget,
    stand_in,
    under_budget,
)
from matrigami.operators import Structure

Method = Grid | Structure | tuple[Structure, ...] | str | Support
"""A grid rounds, a support (`unstructured(0.5)`) prunes, of structures the nearest is taken."""

DAMPINGS = (0.01, 0.1, 0.001)
"""Tried on the vectors that are held out when weights are rounded; the best is taken."""

PRUNED = 0.05
"""Share of zeros from which a weight was pruned, and stays so when it is rounded."""


def outcome(
    method: Method,
    layer: nn.Module,
    seen: Seen | None,
    B: Tensor | None,
    damping: float | tuple[float, ...] | None = None,
) -> Outcome:
    """What a method makes of one layer; nothing is changed yet.

    Args:
        method: The method.
        layer: The layer.
        seen: What it has seen; None if nothing.
        B: Second moment of its output gradients, or None.
        damping: Of the moments; None for the default of the method.
    """
    if isinstance(method, str):
        return outcome(fitting(method, layer), layer, seen, B, damping)
    if isinstance(method, Structure | tuple):
        even = EVEN if damping is None else _one(damping)
        return Structuring(method, layer, seen, B, _one(damping)).near(even).outcome()
    dampings = DAMPINGS if damping is None else damping
    if isinstance(layer, StructuredLinear) and isinstance(method, Grid):
        return rounded_cores(method, layer, seen, B, dampings)
    given = weight(layer).float()
    W = given if seen is None else aim(given, seen)
    if isinstance(method, Grid):
        sparse = float((given == 0).double().mean()) >= PRUNED
        W = W * (given != 0) if sparse else W
        made = _rounded(method, W, seen, B, dampings, sparse)
    else:
        number = weight(layer).element_size()  # W is in single precision
        made = _pruned(method, W, seen, B, DAMPING if damping is None else damping, number)
    return made


def meant(
    model: nn.Module, targets: Patterns | None, ignore: Patterns, methods: Iterable[Method]
) -> dict[str, nn.Module]:
    """The layers of `chosen`, and where there is a grid among the methods the structured ones."""
    rounds = any(isinstance(method, Grid) for method in methods)
    return (with_structured if rounds else chosen)(model, targets, ignore)


def described(method: Method) -> str:
    """The method in words.

    Examples:
        >>> from matrigami.compress import unstructured
        >>> described(Grid(4)), described(unstructured(0.5))
        ('Grid(4)', 'unstructured(0.5)')
    """
    if isinstance(method, tuple):
        return " | ".join(map(described, method))
    if isinstance(method, Grid | Structure):
        return _without_defaults(method)
    return method if isinstance(method, str) else method.__name__


def _without_defaults(recipe: Any) -> str:
    """A call that makes it, the bits of a grid by their place."""
    given = [(f.name, getattr(recipe, f.name)) for f in fields(recipe)]
    told = [
        f"{value}" if key == "bits" else f"{key}={value!r}"
        for key, value in given
        if key == "bits" or value != recipe.__dataclass_fields__[key].default
    ]
    return f"{type(recipe).__name__}({', '.join(told)})"


def fitting(method: Method, layer: nn.Module) -> Method:
    """The method for a layer: a budget becomes structures, and what does not fit is refused.

    Raises:
        ValueError: If it does not fit the size or the kind of the layer.
    """
    view: Any = matrix_view(layer)
    if fault := next(filter(None, map(_fault, tensors_of(layer).values())), ""):
        raise ValueError(
            f"its weight {fault}.\nMend or load the weights first, or leave the layer by ignore=."
        )
    if isinstance(layer, StructuredLinear):
        check_cores(layer, isinstance(method, Grid))
        return method
    if isinstance(method, str):
        method = tuple(under_budget(view.rows, view.columns, *parsed_budget(method)))
    if isinstance(method, Structure | tuple):
        for recipe in method if isinstance(method, tuple) else (method,):
            stand_in(layer, recipe)
    elif not isinstance(method, Grid):
        expect("compress", method, Callable, "a Grid, a structure, a budget, or unstructured(0.5)")
        method(torch.ones(view.rows, view.columns))
    return method


def _fault(W: Tensor) -> str:
    """Why weights cannot be worked on, or nothing."""
    faults = {
        "is on the meta device": W.is_meta,
        "is complex": W.is_complex(),
        "was made under torch.inference_mode": W.is_inference()
        and not torch.is_inference_mode_enabled(),
    }
    found = next((fault for fault, is_so in faults.items() if is_so), "")
    return found or ("" if bool(W.isfinite().all()) else "has NaN or infinite entries")


def _one(damping: float | tuple[float, ...] | None) -> float:
    """The only damping, or the first."""
    first = damping[0] if isinstance(damping, tuple) else damping
    return DAMPING if first is None else first


def _rounded(
    grid: Grid,
    W: Tensor,
    seen: Seen | None,
    B: Tensor | None,
    damping: float | tuple[float, ...],
    sparse: bool,
) -> Outcome:
    """Round one matrix, in the fitted range of its groups or in the whole one: the better counts.

    Fitted ranges cut off what feedback may need to make up for errors of nearly equal inputs. Zeros
    of a `sparse` matrix stay, and multiply nothing.
    """
    macs = int((W != 0).sum()) if sparse else W.numel()
    if seen is None:
        value = grid.round(W)
        told = (0.0, NAN, NAN, NAN, quantized_bytes(value), macs, UNREACHED)
        return Outcome(value.dense(), value, *told)
    A, holdout = seen.moments()
    ranges = (grid, replace(grid, fitted=False)) if grid.fitted else (grid,)
    dampings = damping if isinstance(damping, tuple) else (damping,)
    made = roundings(W, A, B, ranges, dampings, keep_zeros=sparse, holdout=holdout)
    found = min(made, key=lambda m: float(m.loss))
    kept = f"{found.kept} of {len(W)} rows rounded to nearest" if found.kept else ""
    zeros = f"{1 - macs / W.numel():.0%} zeros kept" if sparse else ""
    note = ", ".join(filter(None, (zeros, kept)))
    new = found.value.dense()
    absolute = half_loss(W - new, holdout, B)
    nearest = min(float(m.nearest) for m in made)
    told = (found.damping, float(found.loss), nearest, absolute)
    return Outcome(new, found.value, *told, quantized_bytes(found.value), macs, note)


def _pruned(
    support: Support,
    W: Tensor,
    seen: Seen | None,
    B: Tensor | None,
    damping: float | tuple[float, ...],
    number: int,
) -> Outcome:
    """Prune one matrix, of numbers of so many bytes."""
    plain = remove(W, support)
    kept = int(plain.mask.sum())
    size = (kept * number + W.numel() / 8, kept)
    if seen is None:
        return Outcome(plain.W, plain.mask, 0.0, NAN, NAN, NAN, *size, UNREACHED)
    A, holdout = seen.moments()
    found = remove(W, support, A, B, damping=damping, holdout=holdout)
    simple = _relative(W - plain.W, W, holdout, B)
    if simple < found.loss:
        told = (simple, simple, half_loss(W - plain.W, holdout, B))
        note = "by magnitude: nothing better was found"
        return Outcome(plain.W, plain.mask, found.damping, *told, *size, note)
    told = (found.loss, simple, half_loss(W - found.W, holdout, B))
    return Outcome(found.W, found.mask, found.damping, *told, *size, "")


def _relative(E: Tensor, W: Tensor, A: Tensor, B: Tensor | None) -> float:
    """The loss of an error, relative to that of removing everything."""
    whole = half_loss(W, A, B)
    return half_loss(E, A, B) / whole if whole > 0 else 0.0


Progress = Callable[[int, int, str], None]
"""Told the number of layers that are done, of all, and the name of the last one."""
