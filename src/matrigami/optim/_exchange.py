"""Where gradients come from and where updates go: here one process, which owns every parameter.

This is the seam for distribution: another exchange gathers shards, decides which process updates
which parameter, and hands each its part of the result. The mathematics does not notice.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from jaxtyping import Inexact
from torch import Tensor


class Update(NamedTuple):
    """What one step does to one parameter.

    Args:
        parameter: The parameter.
        direction: What is subtracted, times the learning rate; of the parameter's shape.
        applied: 1, or 0 where the step of this parameter is skipped; then nothing decays either.
    """

    parameter: Tensor
    direction: Inexact[Tensor, "..."]
    applied: float | Tensor = 1.0


class Exchange(Protocol):
    """The three questions that the step asks."""

    def collect(self, parameters: Iterable[Tensor]) -> dict[Tensor, Inexact[Tensor, "..."]]:
        """The full gradients of the parameters that this process updates and that have one."""
        ...

    def deliver(self, updates: list[Update]) -> list[Update]:
        """The updates of this process in, those that it applies to its tensors out."""
        ...


class Local:
    """One process, whole tensors."""

    def collect(self, parameters: Iterable[Tensor]) -> dict[Tensor, Inexact[Tensor, "..."]]:
        """Every gradient there is."""
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        for p, G in gradients.items():
            if G.is_sparse:
                raise ValueError(
                    f"A step was asked for with a sparse gradient of shape {tuple(p.shape)}.\n"
                    "Only dense gradients are taken.\n"
                    "Make the embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )
        return gradients

    def deliver(self, updates: list[Update]) -> list[Update]:
        """They are here already."""
        return updates
