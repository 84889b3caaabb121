"""What becomes of one layer, what its weights should be, and what an error in them costs.

Shapes: m = outputs, n = inputs of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.compress._moments import Seen, damped, row_losses
from matrigami.operators import LinearOperator

DAMPING = 0.01
"""Of the moments, but where weights are rounded; chosen layer by layer it made pruned language
models no better."""

DRIFT = 0.5
"""How far weights make up for the compressed prefix; all the way shrinks the outputs too much."""

UNREACHED = "not reached by the calibration: the simple method"
"""The note on a layer that has seen nothing."""

NAN = float("nan")


@dataclass(frozen=True)
class Outcome:
    """What becomes of one layer.

    Attributes:
        new: New weights, a layer to be put in its place, or the matrices of a structured layer.
        value: What is kept in the report: a quantised matrix, a mask, a structured matrix.
        damping: Of the moments, relative to their mean diagonal.
        loss: Relative loss of the layer on held-out vectors.
        simple: The same of the simple method.
        absolute: `tr(B E A E.T) / 2` on held-out vectors: with `B` the rise of the loss.
        nbytes: Stored bytes of the weight.
        macs: Multiply-adds for one input vector, zeros not counted.
        note: What a reader should know, or nothing.
    """

    new: Tensor | nn.Module | Mapping[str, LinearOperator]
    value: Any
    damping: float
    loss: float
    simple: float
    absolute: float
    nbytes: float
    macs: int
    note: str


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


def half_loss(E: Tensor, A: Tensor, B: Tensor | None) -> float:
    """`tr(B E A E.T) / 2`."""
    return float(row_losses(E.double(), A, None if B is None else B.double()).sum() / 2)
