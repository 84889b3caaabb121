"""What can be done with one layer: its type says which of the three ways is meant.

    Grid                       rounded
    function of importances    pruned
    structures                 the nearest of them in its place
    text, "0.5x macs"          the nearest structure of full rank under this budget

Shapes: m = outputs, n = inputs of a layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._layers import weight
from matrigami.compress._moments import Seen, damped, row_losses
from matrigami.compress._removal import Support, remove
from matrigami.compress._rounding import roundings
from matrigami.nn import hopeful, matrix_view, parsed_budget, stand_in, under_budget
from matrigami.nn._candidates import Tried
from matrigami.operators import LinearOperator, Structure, cost, project

Method = Grid | Structure | tuple[Structure, ...] | str | Support
"""A grid rounds, a support (`unstructured(0.5)`) prunes, of structures the nearest is taken."""

DAMPINGS = (0.01, 0.1, 0.001)
"""Tried on the vectors that are held out when weights are rounded; the best is taken."""

DAMPING = 0.01
"""Of the other methods; chosen layer by layer it made pruned language models no better."""

EVEN = 1.0
"""Of the moment of the gradients in front of structures, by default: as much of the identity as of
the moment. They change so much that the gradients of the model as it was say half of the truth."""

TRUSTS = (EVEN, 0.3, math.inf)
"""The same, tried for whole models: what is best differs from block to block, and so does whether
the gradients should count at all."""

DRIFT = 0.5
"""How far weights make up for the compressed prefix; all the way shrinks the outputs too much."""

UNREACHED = "not reached by the calibration: the simple method"
"""The note on a layer that has seen nothing."""

NAN = float("nan")


@dataclass(frozen=True)
class Outcome:
    """What becomes of one layer.

    Attributes:
        new: New weights, or a layer to be put in its place.
        value: What is kept in the report: a quantised matrix, a mask, a structured matrix.
        damping: Of the moments, relative to their mean diagonal.
        loss: Relative loss of the layer on held-out vectors.
        simple: The same of the simple method.
        absolute: `tr(B E A E.T) / 2` on held-out vectors: with `B` the rise of the loss.
        nbytes: Stored bytes of the weight.
        macs: Multiply-adds for one input vector, zeros not counted.
        note: What a reader should know, or nothing.
    """

    new: Tensor | nn.Module
    value: Any
    damping: float
    loss: float
    simple: float
    absolute: float
    nbytes: float
    macs: int
    note: str


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
        return outcome(fitting(method, "outcome", layer), layer, seen, B, damping)
    W = weight(layer).float()
    W = W if seen is None else aim(W, seen)
    if isinstance(method, Grid):
        made = _rounded(method, W, seen, B, DAMPINGS if damping is None else damping)
    elif isinstance(method, Structure | tuple):
        even = EVEN if damping is None else _one(damping)
        made = _structured(_plain(method, W), layer, W, seen, B, even, _one(damping))
    else:
        made = _pruned(method, W, seen, B, DAMPING if damping is None else damping)
    return made


def trusted(
    method: Method, layer: nn.Module, seen: Seen, B: Tensor | None, evens: Sequence[float]
) -> list[Outcome]:
    """What structures make of one layer, once for each trust in the gradients.

    Args:
        method: Structures, or a budget for one.
        layer: The layer.
        seen: What it has seen.
        B: Second moment of its output gradients, or None.
        evens: How much of the identity is added to `B`, relative to its mean diagonal; without end,
            `B` does not count.
    """
    if isinstance(method, str):
        return trusted(fitting(method, "outcome", layer), layer, seen, B, evens)
    W = aim(weight(layer).float(), seen)
    plain = _plain(method, W)
    return [_structured(plain, layer, W, seen, B, even, DAMPING) for even in evens]


def aim(W: Float[Tensor, "m n"], seen: Seen) -> Float[Tensor, "m n"]:
    """What the weights should be behind a compressed prefix.

    `min ||W z - V x||^2` over V, of inputs `x` and those of the given model `z`, is solved by
    `W + W E[(z - x) x.T] A^-1`; a share of the correction is taken. That the rest of `V x` is then
    a matter of `A` alone is Pythagoras.
    """
    if seen.drift is None or not seen.rows:
        return W
    drift = W.double() @ (seen.drift / seen.rows)
    shift = torch.linalg.solve(damped(seen.moments()[0], DAMPING), drift, left=False)
    return W + DRIFT * shift.to(W)


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


def fitting(method: Method, name: str, layer: nn.Module) -> Method:
    """The method for a layer: a budget becomes structures, and what does not fit is refused.

    Raises:
        ValueError: If it does not fit the size or the kind of the layer.
    """
    view: Any = matrix_view(layer)
    if not bool(weight(layer).isfinite().all()):
        raise ValueError(
            f"{name}: its weight has NaN or infinite entries.\n"
            "Mend the weights first, or leave the layer by ignore=."
        )
    try:
        if isinstance(method, str):
            method = tuple(under_budget(view.rows, view.columns, *parsed_budget(method)))
        if isinstance(method, Structure | tuple):
            for recipe in method if isinstance(method, tuple) else (method,):
                stand_in(layer, recipe)
        elif not isinstance(method, Grid):
            method(torch.ones(view.rows, view.columns))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return method


def _one(damping: float | tuple[float, ...] | None) -> float:
    """The only damping, or the first."""
    first = damping[0] if isinstance(damping, tuple) else damping
    return DAMPING if first is None else first


def _rounded(
    grid: Grid, W: Tensor, seen: Seen | None, B: Tensor | None, damping: float | tuple[float, ...]
) -> Outcome:
    """Round one matrix, in the fitted range of its groups or in the whole one: the better counts.

    Fitted ranges cut off what feedback may need to make up for errors of nearly equal inputs.
    """
    if seen is None:
        value = grid.round(W)
        told = (0.0, NAN, NAN, NAN, quantized_bytes(value), W.numel(), UNREACHED)
        return Outcome(value.dense(), value, *told)
    A, holdout = seen.moments()
    ranges = (grid, replace(grid, fitted=False)) if grid.fitted else (grid,)
    dampings = damping if isinstance(damping, tuple) else (damping,)
    made = roundings(W, A, B, ranges, dampings, holdout=holdout)
    found = min(made, key=lambda m: float(m.loss))
    note = "" if found.kept == 0 else f"{found.kept} of {len(W)} rows rounded to nearest"
    new = found.value.dense()
    absolute = _half_loss(W - new, holdout, B)
    nearest = min(float(m.nearest) for m in made)
    told = (found.damping, float(found.loss), nearest, absolute)
    return Outcome(new, found.value, *told, quantized_bytes(found.value), W.numel(), note)


def _pruned(
    support: Support,
    W: Tensor,
    seen: Seen | None,
    B: Tensor | None,
    damping: float | tuple[float, ...],
) -> Outcome:
    """Prune one matrix."""
    plain = remove(W, support)
    kept = int(plain.mask.sum())
    size = (kept * W.element_size() + W.numel() / 8, kept)
    if seen is None:
        return Outcome(plain.W, plain.mask, 0.0, NAN, NAN, NAN, *size, UNREACHED)
    A, holdout = seen.moments()
    found = remove(W, support, A, B, damping=damping, holdout=holdout)
    simple = _relative(W - plain.W, W, holdout, B)
    if simple < found.loss:
        told = (simple, simple, _half_loss(W - plain.W, holdout, B))
        note = "by magnitude: nothing better was found"
        return Outcome(plain.W, plain.mask, found.damping, *told, *size, note)
    told = (found.loss, simple, _half_loss(W - found.W, holdout, B))
    return Outcome(found.W, found.mask, found.damping, *told, *size, "")


def _plain(method: Any, W: Tensor) -> Tried:
    """The nearest members in the Frobenius norm."""
    return [(r, project(r, W)) for r in (method if isinstance(method, tuple) else (method,))]


def _structured(
    plain: Tried,
    layer: nn.Module,
    W: Tensor,
    seen: Seen | None,
    B: Tensor | None,
    even: float,
    damping: float,
) -> Outcome:
    """Project one matrix onto each structure, with and without the moments; take the nearest."""
    A, holdout = (None, None) if seen is None else seen.moments()
    judge = torch.eye(W.shape[-1]).to(W).double() if holdout is None else holdout
    B = None if even == math.inf else B

    def lost(value: LinearOperator) -> float:
        """Half of its squared error in the moments."""
        return _half_loss(W - value.dense(), judge, B)

    tried = list(plain)
    if A is not None:
        left = None if B is None else damped(B, even)
        tried += hopeful([r for r, _ in plain], W, lost, left, damped(A, damping))
    losses = [lost(value) for _, value in tried]
    best = min(range(len(tried)), key=losses.__getitem__)
    recipe, value = tried[best]
    whole = _half_loss(W, judge, B)
    shares = [loss / whole if whole > 0 else 0.0 for loss in losses]
    price, note = cost(value), UNREACHED if seen is None else ""
    told = (shares[best], min(shares[: len(plain)]), NAN if seen is None else losses[best])
    size = (W.element_size() * price.params, price.macs)
    return Outcome(stand_in(layer, recipe, value), value, damping, *told, *size, note)


def _relative(E: Tensor, W: Tensor, A: Tensor, B: Tensor | None) -> float:
    """The loss of an error, relative to that of removing everything."""
    whole = _half_loss(W, A, B)
    return _half_loss(E, A, B) / whole if whole > 0 else 0.0


def _half_loss(E: Tensor, A: Tensor, B: Tensor | None) -> float:
    """`tr(B E A E.T) / 2`."""
    return float(row_losses(E.double(), A, None if B is None else B.double()).sum() / 2)


def quantized_bytes(value: QuantizedMatrix) -> float:
    """Stored bytes of a matrix, scales of 16 bits and zeros counted."""
    groups = value.scale.numel() * (16 + (0 if value.zero is None else value.bits))
    return (value.bits * value.codes.numel() + groups) / 8


Progress = Callable[[int, int, str], None]
"""Told the number of layers that are done, of all, and the name of the last one."""
