"""What a plan tells beside losses and sizes: directions of a layer, and when another is faster.

Shapes: m = outputs, n = inputs of a layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn._linear import fastest

SIZES = (1, 16, 256, 4096)
"""Vectors at once with which layers are timed."""

SHARES = (0.9, 0.99)
"""Of what a layer says, for ranks."""

NEVER = "never"
"""Where no size is worth it."""

REPEATS = 5
"""Calls, of which the fastest counts."""


def ranks(W: Float[Tensor, "m n"], A: Float[Tensor, "n n"] | None) -> tuple[int, ...]:
    """Of how many singular values of `W A^(1/2)` the squares sum up to each of the shares.

    Examples:
        >>> ranks(torch.diag(torch.tensor([3.0, 1.0, 0.0])), None)
        (1, 2)
    """
    W = W.double()
    values = torch.linalg.eigvalsh(W @ W.mT if A is None else W @ A @ W.mT).flip(-1).clamp_min(0)
    return tuple(int((values.cumsum(-1) < share * values.sum()).sum()) + 1 for share in SHARES)


@torch.no_grad()
def faster_from(old: nn.Module, new: Any) -> str:
    """From how many vectors at once a new layer takes less time than the old one, as measured here.

    Args:
        old: The layer.
        new: A layer for its place; weights are multiplied as before, and nothing is told.
    """
    inputs: Any = getattr(old, "in_features", None)
    same = type(new) is type(old) or not isinstance(new, nn.Module)
    if same or not isinstance(inputs, int):
        return ""
    p = next(old.parameters())
    faster = []
    for size in SIZES:
        x = torch.ones(size, inputs, dtype=p.dtype, device=p.device)
        times = [fastest(lambda m=m, x=x: m(x), REPEATS, p.device) for m in (old, new)]
        faster.append(times[1] < times[0])
    return least(faster)


def least(faster: Sequence[bool]) -> str:
    """The least size from which all are faster.

    Examples:
        >>> least([True, False, True, True]), least([True, True, True, False])
        ('256', 'never')
    """
    count = next((i for i, one in enumerate(reversed(faster)) if not one), len(faster))
    return str(SIZES[len(faster) - count]) if count else NEVER
