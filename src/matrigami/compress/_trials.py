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
from matrigami.compress._methods import EVEN, TRUSTS, Method, Outcome, outcome
from matrigami.compress._moments import Seen
from matrigami.compress._running import at_rest, called, logits
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
        self.judge = divergence(model, data) if self.tried else None

    def __call__(self, seen: Mapping[str, Seen | None]) -> dict[str, Outcome]:
        """What becomes of each; nothing is changed."""
        tried = {n: what for n, what in seen.items() if n in self.tried and what is not None}
        made = self._made({n: what for n, what in seen.items() if n not in tried}, EVEN)
        if tried and self.judge is not None:
            made |= self._best(tried, self.judge)
        return {name: made[name] for name in seen}

    def _made(self, seen: Mapping[str, Seen | None], even: float) -> dict[str, Outcome]:
        """With one trust."""
        return {
            n: outcome(
                self.ways[n], self.layers[n], what, self.gradients.get(n), self.damping, even
            )
            for n, what in seen.items()
        }

    def _best(self, seen: Mapping[str, Seen], judge: Callable[[], float]) -> dict[str, Outcome]:
        """With the trust that is best for all of them."""
        trials = [self._made(seen, even) for even in TRUSTS]
        scores = [self._score(trial, judge) for trial in trials]
        best = scores.index(min(scores))
        return {name: _noted(made, TRUSTS[best]) for name, made in trials[best].items()}

    def _score(self, trial: Mapping[str, Outcome], judge: Callable[[], float]) -> float:
        """The divergence of the model with other layers, which is then as it was."""
        new: dict[Any, Any] = {self.layers[name]: made.new for name, made in trial.items()}
        swap(self.model, new)
        try:
            return judge()
        finally:
            swap(self.model, {layer: old for old, layer in new.items()})


def divergence(model: nn.Module, data: list[Any]) -> Callable[[], float]:
    """Tells how far the outputs of a model are from those that it has now: nats, of a held batch.

    It is infinite where they overflow.
    """
    batch = data[min(HELD_OUT, len(data)) - 1]

    @torch.no_grad()
    def answers() -> Tensor:
        """Log probabilities."""
        with at_rest(model):
            return logits(called(model, batch)).float().log_softmax(-1)

    given = answers()

    def far() -> float:
        """Of the model as it is at the time of the call."""
        found = float((given.exp() * (given - answers())).sum(-1).nanmean())
        return found if math.isfinite(found) else math.inf

    return far


def _noted(made: Outcome, even: float) -> Outcome:
    """With a word on what counted."""
    told = "inputs alone" if even == math.inf else f"both moments, {even:g} of the identity"
    return replace(made, note=made.note or told)
