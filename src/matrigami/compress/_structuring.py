"""The structures near to the weights of one layer in its moments.

Each trust in the gradients is another metric on the outputs; all else is the same for all of them,
and what is found with one is where the next begins.

Shapes: m = outputs, n = inputs of a layer.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.compress._layers import weight
from matrigami.compress._moments import Seen, damped
from matrigami.compress._outcome import NAN, UNREACHED, Outcome, aim, half_loss
from matrigami.nn import stand_in
from matrigami.nn._candidates import Approach, Tried, begun, carried_through, gone_on
from matrigami.operators import (
    LinearOperator,
    Metric,
    Structure,
    Target,
    cost,
    metric_of,
    project,
)

EVEN = 1.0
"""Of the moment of the gradients in front of structures, by default: as much of the identity as of
the moment. They change so much that the gradients of the model as it was say half of the truth."""

TRUSTS = (EVEN, 0.3, math.inf)
"""The same, tried for whole models: what is best differs from block to block, and so does whether
the gradients should count at all."""


class Structuring:
    """The structures near to one layer, for any trust in its gradients.

    Args:
        method: A structure, or several.
        layer: The layer.
        seen: What it has seen; None if nothing.
        B: Second moment of its output gradients, or None.
        damping: Of the moment of its inputs.
    """

    def __init__(
        self,
        method: Structure | tuple[Structure, ...],
        layer: nn.Module,
        seen: Seen | None,
        B: Tensor | None,
        damping: float,
    ) -> None:
        W = weight(layer).float()
        self.layer, self.B, self.damping = layer, B, damping
        self.W = W if seen is None else aim(W, seen)
        A, self.holdout = (None, None) if seen is None else seen.moments()
        right = None if A is None else damped(A, damping)
        self.right = metric_of(self.W, None, right).right
        self.rough = None if self.holdout is None else self.holdout.to(W)
        self.recipes = method if isinstance(method, tuple) else (method,)
        self.plain: Tried = [(recipe, project(recipe, self.W)) for recipe in self.recipes]
        self.errors = [self.error(A) for _, A in self.plain]
        self.starts: dict[Structure, LinearOperator | None] = {}

    def error(self, A: LinearOperator) -> Float[Tensor, "m m"]:
        """`E A E.T` of an error, on held-out vectors; in single precision, to compare members."""
        E = self.W - A.dense()
        return (E if self.rough is None else E @ self.rough) @ E.mT

    def near(self, even: float) -> "Nearby":
        """What comes near with one trust; the structures that do not are not tried with the next.

        Args:
            even: How much of the identity is added to `B`, relative to its mean diagonal; without
                end, `B` does not count.
        """
        B = None if even == math.inf else self.B
        found = Nearby(self, B, [])
        if self.right is None:
            return found
        left = None if B is None else metric_of(self.W, damped(B, even), None).left
        target = Target(self.W, Metric(left, self.right))
        found.searches.extend(gone_on(begun(self.recipes, target, found.loss, self.starts)))
        self.recipes = tuple(one.recipe for one in found.searches)
        self.starts = {one.recipe: one.found for one in found.searches}
        return found


@dataclass(frozen=True)
class Nearby:
    """The structures near to one layer, for one trust in its gradients.

    Attributes:
        of: What all trusts share.
        B: Second moment of the output gradients, if it counts.
        searches: As far as they have come.
    """

    of: Structuring
    B: Float[Tensor, "m m"] | None
    searches: list[Approach]

    def loss(self, A: LinearOperator) -> float:
        """Half of the squared error in the moments, on held-out vectors."""
        return self._weighed(self.of.error(A))

    def layer(self) -> nn.Module:
        """The nearest so far, as a layer."""
        recipe, A = self._nearest([(one.recipe, one.found) for one in self.searches])  # pyright: ignore[reportArgumentType]
        return stand_in(self.of.layer, recipe, A)

    def outcome(self) -> Outcome:
        """The nearest once the searches are carried through."""
        of = self.of
        recipe, A = self._nearest(carried_through(self.searches) if self.searches else [])
        simple = of.plain[self._simple()][1]
        errors = of.W, of.W - A.dense(), of.W - simple.dense()
        whole, lost, plain = map(self._exact, errors)
        loss, least = (part / whole if whole > 0 else 0.0 for part in (lost, plain))
        price, unseen = cost(A), of.holdout is None
        size = weight(of.layer).element_size() * price.params, price.macs
        told = loss, least, NAN if unseen else lost
        note = UNREACHED if unseen else ""
        return Outcome(stand_in(of.layer, recipe, A), A, of.damping, *told, *size, note)

    def _nearest(self, tried: Tried) -> tuple[Structure, LinearOperator]:
        """Of these and the nearest without the moments."""
        every = [self.of.plain[self._simple()], *tried]
        return min(every, key=lambda one: self.loss(one[1]))

    def _simple(self) -> int:
        """Which projection without the moments is the nearest in them."""
        losses = [self._weighed(K) for K in self.of.errors]
        return losses.index(min(losses))

    def _weighed(self, K: Float[Tensor, "m m"]) -> float:
        """`tr(B E A E.T) / 2`; rounding goes below zero."""
        return max(float((K.trace() if self.B is None else (self.B * K).sum()) / 2), 0.0)

    def _exact(self, E: Float[Tensor, "m n"]) -> float:
        """The same in double precision."""
        A = torch.eye(E.shape[-1]).to(E).double() if self.of.holdout is None else self.of.holdout
        return half_loss(E, A, self.B)
