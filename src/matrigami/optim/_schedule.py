"""When what is expensive is refreshed: spread over the steps of a cycle, so that none is slow."""

import math
from collections.abc import Sequence

from jaxtyping import Bool, Int64
from torch import Tensor

STEPS = 1024
"""Steps of a cycle that are told apart; a longer one has refreshes at every so many of them."""


def spread(costs: Sequence[float], frequency: int) -> list[int]:
    """For each refresh the step of the cycle at which it is due, so that the worst is cheap.

    The most expensive goes first, always to the step with the least work so far; among equals to
    the one farthest from the steps already taken. (Graham 1969: at most 4/3 of the optimum.)

    Args:
        costs: Work of each refresh, in any unit.
        frequency: Steps of a cycle.

    Examples:
        >>> spread([8.0, 8.0, 1.0, 1.0], frequency=4)
        [0, 2, 1, 3]
    """
    steps = min(frequency, max(STEPS, len(costs)))
    load = [0.0] * steps
    offsets = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        taken = [step for step, work in enumerate(load) if work]
        step = min(range(steps), key=lambda s: (load[s], -_distance(s, taken, steps)))
        offsets[i] = step
        load[step] += costs[i]
    return [step * frequency // steps for step in offsets]


def due(offset: Int64[Tensor, " b"], clock: int, frequency: int) -> list[int]:
    """The items whose turn it is; the offsets are on the host, so that nothing waits for a device.

    Examples:
        >>> import torch
        >>> due(torch.tensor([0, 1, 0]), clock=10, frequency=5)
        [0, 2]
    """
    turn: Bool[Tensor, " b"] = (clock - offset) % frequency == 0
    return turn.nonzero().flatten().tolist()


def _distance(step: int, taken: Sequence[int], frequency: int) -> float:
    """Steps around the cycle to the nearest one taken."""
    around = [min((step - s) % frequency, (s - step) % frequency) for s in taken]
    return min(around, default=math.inf)
