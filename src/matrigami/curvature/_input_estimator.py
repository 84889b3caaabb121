"""The second moments of what layers see, in the forward passes of a training loop.

No backward pass and no loss enter: each call of a layer is counted when it is made. One that a
checkpoint makes again is not. Layers that read one tensor (queries, keys, values) share a moment.

Shapes: b = blocks, i = inputs of a block.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.curvature._blocks import SharedInputs, are_finite, by_block
from matrigami.curvature._factors import MomentCache, SecondMoments
from matrigami.curvature._tape import LayerCall
from matrigami.curvature._watch import ModelWatch
from matrigami.operators import operator


class InputEstimator(ModelWatch):
    """Estimates the second moments of the inputs of some weights of a model while it trains.

    Args:
        model: The model.
        wanted: The weights.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> watch = InputEstimator(model, [model.weight])
        >>> watch.start(0)
        >>> _ = model(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> watch.take()["weight"]
        [tensor([[[5., 1.],
                 [1., 2.]]])]
    """

    def __init__(self, model: nn.Module, wanted: Collection[Tensor]) -> None:
        super().__init__(model, wanted)
        self.forget()

    def _begin(self, *given: Any) -> None:
        """A new batch: forget which inputs the layers of the last one shared."""
        super()._begin(*given)
        self._cache, self._inputs = MomentCache(None), SharedInputs()

    @torch.no_grad()
    def note(self, call: LayerCall, output: Tensor) -> None:
        """Count the inputs of a call, unless they hold NaN."""
        self._within.calls.append(call.traced(output))
        if not call.x.numel():
            return
        blocks = by_block([(call, None)], self._inputs)
        if not are_finite(blocks):
            self.rejected += 1
            return
        self._sums.add(blocks, cache=self._cache)

    def passed(self, calls: list[LayerCall], outputs: Any) -> None:
        """After the forward pass: its inputs are counted, if they are all that there were."""
        self.check_uses(outputs, calls)
        self._ever |= {name for call in calls for name in call.layer.names.values()}

    def forget(self) -> None:
        """Drop what was seen since the last call of `take`."""
        self._sums = SecondMoments()

    def collected(self) -> dict[str, list[Tensor]]:
        """The mean over inputs, of each weight."""
        found = {key[0]: self._sums[key][0] for key in self._sums}
        return {n: [operator(F.A).dense() / F.rows] for n, F in found.items() if F.rows}  # pyright: ignore[reportArgumentType]
