"""Structured layers whose tensors are rounded, each in its turn, and the others make up for it.

Every tensor of a structured matrix enters it linearly, `A = P C Q + rest`, as a stack of blocks.
In the moments `E[x x.T] = right` and `E[g g.T] = left` an error of a block costs what one of a
matrix does behind inputs of the moment `Q right Q.H` and in front of gradients of `P.H left P`: it
is rounded with feedback in these. The tensors that are still to come are then the best for those
that are done, before it is their turn.

Shapes: m = outputs, n = inputs of a layer, b = blocks, o, i = rows and columns of a block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from matrigami.compress._grid import Grid, QuantizedMatrix, quantized_bytes
from matrigami.compress._moments import Seen, damped
from matrigami.compress._outcome import NAN, UNREACHED, Outcome, aim, half_loss
from matrigami.compress._rounding import roundings
from matrigami.nn import StructuredLinear
from matrigami.operators import (
    LinearOperator,
    Target,
    contractions,
    cost,
    metric_of,
    named_tensors,
    with_tensors,
)
from matrigami.operators._alternating import Part, in_turn

ROUNDS = 2
"""How often each tensor is rounded; a third time gains little."""

SIMPLE = "rounded to nearest: nothing better was found"
"""The note on a layer for which feedback was of no use."""


@dataclass(frozen=True, eq=False)
class QuantizedCores(Mapping[str, QuantizedMatrix]):
    """The codes of a structured layer: for each tensor, by its name, its blocks as one matrix.

    Args:
        cores: The matrices, `(b o, i)`, the blocks one below the other.
    """

    cores: Mapping[str, QuantizedMatrix]

    def __getitem__(self, name: str) -> QuantizedMatrix:
        """That of one tensor."""
        return self.cores[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors."""
        return iter(self.cores)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.cores)


def check_cores(layer: StructuredLinear, rounds: bool) -> None:
    """Raise if the tensors of a structured layer cannot be rounded, or something else is meant."""
    way_out = "Leave the layer by ignore=, or make it dense first: nn.to_dense_(model)."
    if not rounds:
        raise ValueError(
            f"it is structured already, {layer.structure}.\n"
            f"Structured layers can be rounded alone, by a Grid.\n{way_out}"
        )
    if layer.rms_cap or is_parametrized(layer):
        raise ValueError(
            "its weight is computed from others (rms_cap, or a parametrisation).\n"
            f"Codes could not be stored for it.\n{way_out}"
        )
    try:
        contractions(layer._template)
    except TypeError as error:
        raise ValueError(
            f"the tensors of {layer.structure} cannot be rounded.\n"
            f"{str(error).splitlines()[0]}\n{way_out}"
        ) from error


@torch.no_grad()
def rounded_cores(
    grid: Grid,
    layer: StructuredLinear,
    seen: Seen | None,
    B: Float[Tensor, "m m"] | None,
    damping: float | tuple[float, ...],
) -> Outcome:
    """Round the tensors of a structured layer, by the order and the ranges that are best.

    Args:
        grid: The grid, along the inputs of each block.
        layer: The layer.
        seen: What it has seen; None rounds to nearest.
        B: Second moment of its output gradients, or None.
        damping: Of the moments; the others are fitted with the first of several.
    """
    A = layer.matrix().detach().to(torch.float32)
    grids = (grid, replace(grid, fitted=False)) if grid.fitted else (grid,)
    if seen is None:
        return _outcome(layer, _to_nearest(grid, A), 0.0, (NAN, NAN, NAN), UNREACHED)
    W, dampings = aim(A.dense(), seen), damping if isinstance(damping, tuple) else (damping,)
    work = _Work(W, B, seen, grids, dampings)
    count = range(len(named_tensors(A)))
    simple = min((_to_nearest(g, A) for g in grids), key=work.loss)
    tried = [one for order in (count, count[::-1]) for one in work.rounded(A, order)]
    found = min(tried, key=work.loss)
    whole, plain, lost = half_loss(W, work.holdout, B), work.loss(simple), work.loss(found)
    better = lost < plain
    told = min(lost, plain) / max(whole, 1e-300), plain / max(whole, 1e-300), min(lost, plain)
    if better:
        return _outcome(layer, found, dampings[0], told, "")
    return _outcome(layer, simple, 0.0, told, SIMPLE)


class _Rounded(NamedTuple):
    """A matrix whose tensors are rounded, and their codes in stacks of blocks."""

    A: LinearOperator
    codes: dict[int, QuantizedMatrix]


def _to_nearest(grid: Grid, A: LinearOperator) -> _Rounded:
    """Every tensor by itself."""
    codes = {i: grid.round(part.matrix.blocks()) for i, part in enumerate(contractions(A))}
    for i, value in codes.items():
        A = _with_blocks(A, i, value.dense())
    return _Rounded(A, codes)


def _with_blocks(A: LinearOperator, i: int, C: Float[Tensor, "b o i"]) -> LinearOperator:
    """The matrix with other blocks in one tensor."""
    tensors = list(named_tensors(A).values())
    tensors[i] = contractions(A)[i].matrix.with_blocks(C)
    return with_tensors(A, iter(tensors))


class _Work:
    """The rounding of one layer.

    Args:
        W: The matrix to come near to.
        B: Second moment of the output gradients, or None.
        seen: What the layer has seen.
        grids: The grids, of which the better counts for each tensor.
        dampings: Those that are tried; the tensors to come are fitted with the first.
    """

    def __init__(
        self,
        W: Float[Tensor, "m n"],
        B: Float[Tensor, "m m"] | None,
        seen: Seen,
        grids: tuple[Grid, ...],
        dampings: tuple[float, ...],
    ) -> None:
        A, self.holdout = seen.moments()
        self.W, self.B, self.grids, self.dampings = W, B, grids, dampings
        left = None if B is None else damped(B, dampings[0])
        self.target = Target(W, metric_of(W, left, damped(A, dampings[0])))
        self.metric, self.held = metric_of(W, B, A), metric_of(W, None, self.holdout)

    def loss(self, found: _Rounded) -> float:
        """`tr(B E A E.T) / 2` on held-out vectors."""
        return self._lost(found.A)

    def rounded(self, A: LinearOperator, order: range) -> Iterator[_Rounded]:
        """The tensors in some order; those to come are fitted to those that are done.

        Then again each behind all others, which are rounded.
        """
        codes: dict[int, QuantizedMatrix] = {}
        for place, i in enumerate([*order] * ROUNDS):
            A = in_turn(A, self.target, order[place:][::-1] or [i])
            codes[i] = min(
                self._tried(A, i), key=lambda v: self._lost(_with_blocks(A, i, v.dense()))
            )
            A = _with_blocks(A, i, codes[i].dense())
            if len(codes) == len(order):
                yield _Rounded(A, dict(codes))

    def _tried(self, A: LinearOperator, i: int) -> list[QuantizedMatrix]:
        """The blocks of one tensor on each of the grids."""
        one = contractions(A)[i]
        part, held = Part(one, self.metric), Part(one, self.held)
        even = one.after is None and self.B is None
        inputs, judge = (_even(p.input_blocks()) for p in (part, held))
        outputs = None if even else _even(part.output_blocks())
        made = roundings(part.blocks(), inputs, outputs, self.grids, self.dampings, holdout=judge)
        return [found.value for found in made]

    def _lost(self, A: LinearOperator) -> float:
        """That of a matrix."""
        return half_loss(self.W - A.dense(), self.holdout, self.B)


def _even(M: Float[Tensor, "b i i"]) -> Float[Tensor, "b i i"]:
    """Symmetric to the bit."""
    return (M + M.mT) / 2


def _outcome(
    layer: StructuredLinear,
    found: _Rounded,
    damping: float,
    told: tuple[float, float, float],
    note: str,
) -> Outcome:
    """The codes by the names of the tensors, a matrix for each."""
    names = layer.factor_names
    value = QuantizedCores({names[i]: _flat(found.codes[i]) for i in range(len(names))})
    size = sum(map(quantized_bytes, value.values())), cost(found.A).macs
    return Outcome(value, value, damping, *told, *size, note)


def _flat(value: QuantizedMatrix) -> QuantizedMatrix:
    """The blocks one below the other."""
    zero = None if value.zero is None else value.zero.flatten(0, -2)
    codes, scale = value.codes.flatten(0, -2), value.scale.flatten(0, -2)
    return replace(value, codes=codes, scale=scale, zero=zero)
