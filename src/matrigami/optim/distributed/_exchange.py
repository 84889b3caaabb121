"""Where gradients come from and where updates go: here one process, which owns every parameter.

This is the seam for distribution: another exchange (`_owners.py`) gathers shards, decides which
process updates which parameter, and hands each its part of the result. The mathematics does not
notice.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import BlockView
from matrigami.optim._method import State

Groups = list[dict[str, Any]]
"""The parameter groups of an optimiser, with the views of their parameters."""


class Update(NamedTuple):
    """What one step does to one parameter.

    Args:
        parameter: The parameter.
        direction: What is subtracted, times the learning rate; of the shape of the parameter, or
            of its local shard.
        applied: 1, or 0 where the step of this parameter is skipped; then nothing decays either.
    """

    parameter: Tensor
    direction: Inexact[Tensor, "..."]
    applied: float | Tensor = 1.0


@runtime_checkable
class Exchange(Protocol):
    """What the step and the state ask about other processes."""

    def collect(self, groups: Groups) -> dict[Tensor, Inexact[Tensor, "..."]]:
        """The gradients of what this process updates: of whole matrices, of shards of the rest."""
        ...

    def deliver(self, updates: list[Update]) -> list[Update]:
        """The updates of this process in, those that it applies to its tensors out."""
        ...

    def saved(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """The state as checkpoints hold it: every entry, on every process."""
        ...

    def loaded(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """The inverse of `saved`: what this process keeps of a checkpoint."""
        ...

    def owners(self, groups: Groups) -> dict[Tensor, int]:
        """The rank that updates each matrix, for those that one process updates for others."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether it holds on some process."""
        ...

    def summed(self, value: float) -> float:
        """The sum over the processes among which matrices have owners."""
        ...

    def whole(self, p: Tensor, part: Tensor) -> Tensor:
        """All of a tensor that is spread as `p` is, of which this process has a part."""
        ...


class Local:
    """One process, whole tensors."""

    def collect(self, groups: Groups) -> dict[Tensor, Inexact[Tensor, "..."]]:
        """Every gradient there is."""
        return {p: G for p, _, G in present(groups)}

    def deliver(self, updates: list[Update]) -> list[Update]:
        """All of them."""
        return updates

    def saved(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:  # noqa: ARG002 - one signature
        """All of it."""
        return dict(state)

    def loaded(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:  # noqa: ARG002
        """All of it, if it is whole."""
        for p, entry in state.items():
            if any(is_sharded(S) for S in entry.values() if isinstance(S, Tensor)):
                raise ValueError(
                    f"load_state_dict(state): shards for a plain {tuple(p.shape)} parameter.\n"
                    "One process has no other parts of them.\n"
                    "Load it with torch.distributed.checkpoint, which puts them together."
                )
        return dict(state)

    def owners(self, groups: Groups) -> dict[Tensor, int]:  # noqa: ARG002
        """None: no process updates for others."""
        return {}

    def anywhere(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def summed(self, value: float) -> float:
        """The value itself."""
        return value

    def whole(self, p: Tensor, part: Tensor) -> Tensor:  # noqa: ARG002
        """The part itself."""
        return part


def present(groups: Groups) -> Iterator[tuple[Tensor, BlockView | None, Tensor]]:
    """The parameters that have a gradient, with their views.

    Raises:
        ValueError: If a gradient is sparse.
    """
    for group in groups:
        for p, view in zip(group["params"], group["views"], strict=True):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"step(): a gradient of shape {tuple(p.shape)} is sparse.\n"
                    "Only dense gradients are taken.\n"
                    "Make the embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )
            yield p, view, p.grad


def is_sharded(t: Tensor) -> bool:
    """Whether it is a `DTensor`: who has one has imported its module, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """What this process holds of a tensor; it shares its storage."""
    return t.detach().to_local() if is_sharded(t) else t


def working_dtype(t: Tensor) -> torch.dtype:
    """Double precision stays, everything else is computed in single precision."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
