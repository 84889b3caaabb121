"""A model on one batch again and again, of which only what has changed is run.

Where its blocks are a chain, what the blocks in front of the changed one return is kept: of a deep
model half of the work of all runs together. That nothing but the last output of a chain is used
behind it is tried once.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from matrigami.compress._calibration import Stop, chain, inside
from matrigami.compress._running import at_rest, called, hooked, logits


class Tail:
    """The logits of a model on a batch, from some block on.

    Args:
        model: Its outputs are logits, or have them as `.logits`.
        layers: Names of layers that will change, block after block.
        batch: A tensor, a tuple of arguments or a mapping of keywords.
    """

    def __init__(self, model: nn.Module, layers: Collection[str], batch: Any) -> None:
        self.model, self.batch = model, batch
        self.blocks: list[str] = []
        self.at, self.before = 0, None
        with torch.no_grad(), at_rest(model):
            blocks = chain(model, list(layers), [batch])
        if blocks and self._ends_with(blocks):
            self.blocks = blocks

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The logits, of the model as it is now."""
        with at_rest(self.model), self._short():
            return logits(called(self.model, self.batch))

    @torch.no_grad()
    def advance(self, names: Collection[str]) -> None:
        """Keep what is in front of the block of these layers; it changes no more."""
        at = next((i for i, b in enumerate(self.blocks) if all(inside(n, [b]) for n in names)), 0)
        if at > self.at:
            self.before = self._output(self.blocks[at - 1])
        self.at, self.before = at, self.before if at else None

    @torch.no_grad()
    def _output(self, block: str) -> Any:
        """What a block returns; nothing behind it is run."""
        found: list[Any] = []

        def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            """Keep it and go."""
            found.append(output)
            raise Stop

        hook = {block: (self.model.get_submodule(block), leave)}
        with at_rest(self.model), self._short(), hooked(hook), suppress(Stop):
            called(self.model, self.batch)
        return found[0]

    def _ends_with(self, blocks: list[str]) -> bool:
        """Whether all that is behind a chain follows from its last output."""
        whole = self()
        before = self._output(blocks[-1])
        self.blocks, self.at, self.before = blocks, len(blocks), before
        same = torch.equal(self(), whole)
        self.blocks, self.at, self.before = [], 0, None
        return same

    @contextmanager
    def _short(self) -> Iterator[None]:
        """The blocks in front do nothing and return what was kept."""
        passed = [self.model.get_submodule(name) for name in self.blocks[: self.at]]
        own = [module.__dict__.get("forward") for module in passed]
        for module in passed:
            module.forward = lambda *_args, **_kwargs: _copied(self.before)
        try:
            yield
        finally:
            for module, forward in zip(passed, own, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.forward = forward


def _copied(output: Any) -> Any:
    """What a block returns, which the next one may write into."""
    return pytree.tree_map_only(Tensor, Tensor.clone, output)
