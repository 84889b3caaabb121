"""Indices that belong to the layout of a value, as its sizes do.

They are no leaf of its PyTree: what maps over the numbers of a stack leaves them alone.
"""

import torch
from jaxtyping import Int
from torch import Tensor


class Places:
    """A tensor of indices, compared by content, and copied once to each device that needs it.

    Args:
        index: The indices.

    Examples:
        >>> Places(torch.tensor([1, 0])) == Places(torch.tensor([1, 0]))
        True
    """

    def __init__(self, index: Int[Tensor, "..."]) -> None:
        self.index = index
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Int[Tensor, "..."]:
        """The indices on a device."""
        if device == self.index.device:
            return self.index
        if device not in self._copies:
            self._copies[device] = self.index.to(device)
        return self._copies[device]

    @property
    def shape(self) -> torch.Size:
        """The shape of the indices."""
        return self.index.shape

    def __eq__(self, other: object) -> bool:
        """Whether the indices are the same."""
        if self is other:
            return True
        return isinstance(other, Places) and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        """By the shape: equal ones agree."""
        return hash(tuple(self.index.shape))

    def __repr__(self) -> str:
        """The shape."""
        return f"Places({tuple(self.index.shape)})"
