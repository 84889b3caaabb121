"""Watching a model while it trains: which of its layers, in which forward passes, on all processes.

`FisherEstimator` and `InputEstimator` differ in what they make of the calls that are noted here.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami.curvature._beside import refuse_other_uses
from matrigami.curvature._tape import (
    Hook,
    LayerCall,
    Tape,
    TapedLayer,
    find_layers,
    is_observed,
    unwrapped,
)
from matrigami.nn import parts

Moments = Sequence[Tensor]
"""The second moments of one weight, each a stack of symmetric matrices."""


class ModelWatch(Tape):
    """Notes the calls of layers within forward passes of the whole model that may be trained on.

    Args:
        model: The model; of a data-parallel or sharded one the moments are averaged over all
            processes, each of which has its own data.
        wanted: The weights. Those of embeddings and norms are not for this.

    Raises:
        TypeError: If a weight belongs to a module without a rule.

    Attributes:
        clock: The step whose batches are looked at; None: none are.
        seen: How many forward passes there were.
        rejected: How many batches held NaN.
    """

    sides = ("A",)
    """Moments of each weight: `A` of its inputs, `B` of its output gradients."""

    def __init__(self, model: nn.Module, wanted: Collection[Tensor]) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.distributed, self.sharded = isinstance(model, DistributedDataParallel), False
        self.clock: int | None = None
        self.rejected = self.seen = 0
        self._within = threading.local()
        self._hidden: set[str] = set()
        self._ever: set[str] = set()
        self._layers: dict[str, TapedLayer] = {}
        self.extend(wanted)
        self.hold(self.model.register_forward_pre_hook(Hook(self._begin)))
        self.hold(self.model.register_forward_hook(Hook(self._end)))

    def extend(self, wanted: Collection[Tensor]) -> None:
        """Watch some more weights of the model."""
        sharded = any(hasattr(p, "placements") for p in wanted)  # what a DTensor has
        self.sharded |= sharded
        self.distributed |= sharded
        layers = find_layers(self.model, joint=False, wanted=wanted) if wanted else []
        self.check(layers)
        self.listen(layers)
        self._layers |= {name: layer for layer in layers for name in layer.names.values()}

    def check(self, layers: list[TapedLayer]) -> None:
        """Raise if some layers cannot be watched."""

    def start(self, clock: int) -> None:
        """Look at the batches from now on, those of a step."""
        self.clock = clock

    def stop(self) -> None:
        """Look at no more batches."""
        self.clock = None

    def forget(self) -> None:
        """Drop what was seen since the last call of `take`: its gradients are dropped, too."""

    def take(self) -> Mapping[str, Moments]:
        """The moments since the last call, by parameter name; looks at no more batches.

        Of several processes all call it, and have the mean over those that have seen a weight.
        """
        looked, self.clock = self.clock is not None, None
        found = self.collected()
        self.forget()
        if not self.distributed:
            return found
        return self._mean_of_processes(found) if looked else {}

    def collected(self) -> Mapping[str, Moments]:
        """What this process has seen since the last call of `take`."""
        raise NotImplementedError

    @property
    def names(self) -> set[str]:
        """The weights that were ever seen."""
        return self._ever

    def _mean_of_processes(self, found: Mapping[str, Moments]) -> dict[str, Moments]:
        """The moments of all processes, in one order; some may have refused a batch with NaN."""
        device = next(self.model.parameters()).device
        present = torch.tensor([float(n in found) for n in self._layers], device=device)
        dist.all_reduce(present)
        means = {}
        for name, count in zip(self._layers, present.tolist(), strict=True):
            if count:
                means[name] = found[name] if name in found else self._nothing(name)
                for t in means[name]:
                    dist.all_reduce(t)
                    t.div_(count)
        return means

    def _nothing(self, name: str) -> Moments:
        """Zeros of the shapes of the moments of a weight."""
        layer = self._layers[name]
        key = next(key for key, known in layer.names.items() if known == name)
        p, blocks = layer.module.get_parameter(key), parts(layer.module)[key].blocks
        b, m, n = blocks.stack  # pyright: ignore[reportOptionalMemberAccess] - it is a matrix
        dtype = torch.promote_types(p.dtype, torch.float32)
        sizes = [n if side == "A" else m for side in self.sides]
        return [torch.zeros(b, k, k, dtype=dtype, device=p.device) for k in sizes]

    def check_uses(self, outputs: Any, calls: list[LayerCall]) -> None:
        """Refuse weights that are used beside their layers, when one is seen for the first time."""
        if any(name not in self._ever for call in calls for name in call.layer.names.values()):
            refuse_other_uses(outputs, calls)

    def wants(self) -> bool:
        """Only calls within a forward pass of the whole model count."""
        return getattr(self._within, "calls", None) is not None

    def _begin(self, *_: Any) -> None:
        """Before the forward pass of the model."""
        wanted = self.clock is not None and self.model.training and torch.is_grad_enabled()
        self._within.calls = [] if wanted and is_observed() else None
        self._hidden.clear()

    def _end(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        """After it."""
        calls, self._within.calls = getattr(self._within, "calls", None), None
        if calls:
            self.seen += 1
            self.passed(calls, outputs)

    def passed(self, calls: list[Any], outputs: Any) -> None:
        """A forward pass has ended, in which there were some calls."""
