"""Several ways to compress the layers of a block, judged by what the whole model then says.

The loss of a layer by itself cannot tell how far the gradients of the given model are to be trusted
once much has changed: it is computed from them. So each way is tried in place, and that is kept
with which the outputs of the model diverge least from what they were, on a batch held out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._calibration import HELD_OUT
from matrigami.compress._methods import Method, outcome
from matrigami.compress._moments import Seen
from matrigami.compress._outcome import DAMPING, Outcome
from matrigami.compress._structuring import TRUSTS, Nearby, Structuring
from matrigami.compress._tail import Tail
from matrigami.nn import swap
from matrigami.operators import Structure


class Maker:
    """Makes new layers of those that were seen together.

    Structures are tried with every trust in the gradients, where there are gradients and nobody
    asks for a damping.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        ways: Mapping[str, Method],
        gradients: Mapping[str, Tensor],
        damping: float | tuple[float, ...] | None,
        data: list[Any],
    ) -> None:
        self.model, self.layers, self.ways = model, layers, ways
        self.gradients, self.damping = gradients, damping
        structured = {n for n, way in ways.items() if isinstance(way, Structure | tuple | str)}
        self.tried = structured if gradients and damping is None else set()
        batch = data[min(HELD_OUT, len(data)) - 1]
        self.tail = Tail(model, self.tried, batch) if self.tried else None
        self.judge = divergence(self.tail) if self.tail else None

    def __call__(self, seen: Mapping[str, Seen | None]) -> dict[str, Outcome]:
        """What becomes of each; nothing is changed."""
        tried = {n: what for n, what in seen.items() if n in self.tried and what is not None}
        made = self._made({n: what for n, what in seen.items() if n not in tried})
        if tried and self.tail is not None and self.judge is not None:
            self.tail.advance(tried)
            made |= self._best(tried, self.judge)
        return {name: made[name] for name in seen}

    def _made(self, seen: Mapping[str, Seen | None]) -> dict[str, Outcome]:
        """With the default trust."""
        return {
            n: outcome(self.ways[n], self.layers[n], what, self.gradients.get(n), self.damping)
            for n, what in seen.items()
        }

    def _best(self, seen: Mapping[str, Seen], judge: Callable[[], float]) -> dict[str, Outcome]:
        """With the trust that is best for all of them, as is seen before the searches end."""
        tried = {
            n: Structuring(self.ways[n], self.layers[n], what, self.gradients.get(n), DAMPING)  # pyright: ignore[reportArgumentType]
            for n, what in seen.items()
        }
        trials = [{n: one.near(even) for n, one in tried.items()} for even in TRUSTS]
        scores = [self._score(trial, judge) for trial in trials]
        best = scores.index(min(scores))
        return {n: _noted(found.outcome(), TRUSTS[best]) for n, found in trials[best].items()}

    def _score(self, trial: Mapping[str, Nearby], judge: Callable[[], float]) -> float:
        """The divergence of the model with other layers, which is then as it was."""
        new: dict[Any, Any] = {self.layers[name]: found.layer() for name, found in trial.items()}
        swap(self.model, new)
        try:
            return judge()
        finally:
            swap(self.model, {layer: old for old, layer in new.items()})


def divergence(run: Callable[[], Tensor]) -> Callable[[], float]:
    """Tells how far logits are from what they are now, in nats; infinite where they overflow."""

    @torch.no_grad()
    def answers() -> Tensor:
        """Log probabilities."""
        return run().float().log_softmax(-1)

    given = answers()
    p = given.exp()

    def far() -> float:
        """At the time of the call."""
        found = float((p * (given - answers())).sum(-1).nanmean())
        return found if math.isfinite(found) else math.inf

    return far


def _noted(made: Outcome, even: float) -> Outcome:
    """With a word on what counted."""
    told = "inputs alone" if even == math.inf else f"both moments, {even:g} of the identity"
    return replace(made, note=made.note or told)
