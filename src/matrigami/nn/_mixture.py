"""What mixtures of experts have in common: a gate, who gets which vector, and the losses of both.

Vectors are sorted by their expert and each expert sees its own: nothing is computed to be thrown
away, nothing is dropped, and the order of all sums is fixed.

Shapes: c = vectors (all positions of all examples), E = experts, a = active ones, n = inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matrigami.nn._dispatch import dispatch
from matrigami.operators import check_sizes

GATE_SCALE = 0.1
"""Variance of a logit at the start (Fedus et al. 2022): nearly uniform, but no tie for all."""


class Routing(NamedTuple):
    """Where each vector goes.

    Args:
        logits: Of all experts.
        experts: The active ones, the largest logit first.
        weights: Of the active ones; they sum to one.
    """

    logits: Float[Tensor, "c E"]
    experts: Int[Tensor, "c a"]
    weights: Float[Tensor, "c a"]


class RoutingLosses(NamedTuple):
    """What keeps a gate healthy; add both, weighted, to the loss of the task.

    Args:
        balance: `E sum_e f_e p_e`, with `f` the shares of the vectors that the experts got and `p`
            the mean probabilities: 1 if all get alike, up to `E / active` if some get all (Fedus et
            al. 2022, arXiv:2101.03961).
        z: The mean square of the logarithm of the sum of exponentials of the logits, which keeps
            them small (Zoph et al. 2022, arXiv:2202.08906).
    """

    balance: Tensor
    z: Tensor


class Mixture(nn.Module, ABC):
    """A module of which a part, a few of its experts, acts on each vector.

    A subclass calls `routed` once in its `forward`.

    Args:
        in_features: Size `n` of the vectors.
        experts: How many there are, `E`.
        active: How many act on each vector.

    Raises:
        ValueError: If this is no mixture.
    """

    def __init__(self, in_features: int, experts: int, active: int) -> None:
        super().__init__()
        name = type(self).__name__
        check_sizes(name, in_features=in_features, experts=experts, active=active)
        if active > experts:
            raise ValueError(
                f"{name}: experts={experts}, active={active}.\nThis is no mixture.\n"
                "Give active from 1 to the number of experts."
            )
        self.in_features, self.experts, self.active = in_features, experts, active
        self._routing: Routing | None = None

    @property
    @abstractmethod
    def gate_weight(self) -> Float[Tensor, "E n"]:
        """What makes the logits of a vector."""

    def route(self, x: Float[Tensor, "*batch n"]) -> Routing:
        """The experts of each vector; of logits that are equal, torch decides."""
        x, gate = x.reshape(-1, self.in_features), self.gate_weight
        kind = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = (gate.to(kind) @ x.to(kind).mT).mT  # faster for the few rows of a gate
        values, experts = logits.mT.topk(self.active, 0)
        return Routing(logits, experts.mT, values.softmax(0).mT)

    def losses(self) -> RoutingLosses:
        """The losses of the last call's routing, differentiable if that call was.

        Raises:
            ValueError: If there was no call.
        """
        if self._routing is None:
            raise ValueError(
                f"losses(): {self} has not been called.\nThey are about the vectors of a call."
            )
        logits, experts, _ = self._routing
        if not len(logits):
            return RoutingLosses(logits.sum(), logits.sum())
        counts = torch.bincount(experts.flatten(), minlength=self.experts)
        share = counts.to(logits) / experts.numel()
        balance = self.experts * (share * logits.softmax(-1).mean(0)).sum()
        return RoutingLosses(balance, logits.logsumexp(-1).square().mean())

    def routed(self, X: Float[Tensor, "c n"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each expert: which vectors it gets, the vectors themselves, and its weights."""
        self._routing = self.route(X)
        flat = self._routing.experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        places = order // self.active
        weights = self._routing.weights.flatten()[order]
        rows = dispatch(X, places, counts)
        return zip(places.split(counts), rows, weights.split(counts), strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has had no call: the graph of the last one is not copied."""
        return self.__dict__ | {"_routing": None}


def routing_loss(model: nn.Module, *, balance: float = 0.01, z: float = 0.001) -> Tensor:
    """The weighted losses of the last call, the mean over all mixtures of a model.

    Args:
        model: A model that was called.
        balance: Weight of the load-balancing loss (0.01 in arXiv:2101.03961 and in 2410.02117).
        z: Weight of the loss of the logits (a tenth of it).

    Raises:
        ValueError: If the model has no mixture, or one that was not called.

    Examples:
        >>> from matrigami import LowRank
        >>> from matrigami.nn import StructuredMoE
        >>> _ = torch.manual_seed(0)
        >>> moe = StructuredMoE(8, 8, LowRank(rank=2), experts=4, active=1)
        >>> y = moe(torch.randn(64, 8))
        >>> round(float(routing_loss(moe, balance=1.0, z=0.0).detach()), 1)
        1.0
    """
    found = [layer.losses() for layer in model.modules() if isinstance(layer, Mixture)]
    if not found:
        raise ValueError(
            f"routing_loss({type(model).__name__}): the model has no mixture of experts.\n"
            "Leave the loss out."
        )
    return torch.stack([balance * loss.balance + z * loss.z for loss in found]).mean()
