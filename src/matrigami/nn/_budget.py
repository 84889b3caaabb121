"""A budget for one matrix, and structures of full rank without shared weights under it.

Potapczynski et al. (2024, arXiv:2410.02117) find that at equal compute the best of a continuous
family are those of full rank whose parameters are not shared: block tensor trains, of which Monarch
matrices are a special case.

Shapes: m = rows, n = columns.
"""

import re
from functools import partial
from itertools import count, takewhile

import torch

from matrigami.operators import Cost, Structure, cost
from matrigami.structures import BlockTensorTrain, Monarch

UNITS = {"macs": "macs", "parameters": "params", "bytes": "bytes"}
"""What a budget may count, and how `Cost` calls it."""

MONARCHS = 3
"""Numbers of blocks that are tried."""


def parsed_budget(text: str, units: tuple[str, ...] = tuple(UNITS)) -> tuple[float, str]:
    """The share and the unit of a budget such as `0.5x macs`.

    Raises:
        ValueError: If it is not such a text.

    Examples:
        >>> parsed_budget("0.5x macs")
        (0.5, 'macs')
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*x\s*(\w+)\s*", str(text))
    if found is None or found[2] not in units or not 0 < float(found[1]) <= 1:
        raise ValueError(
            f"budget={text!r}: it is no share of what the dense layers cost.\n"
            f"Write a number above 0 and up to 1, and one of {', '.join(units)}: 0.5x {units[0]}."
        )
    return float(found[1]), found[2]


def cost_of(structure: Structure, m: int, n: int) -> Cost:
    """What a member of a structure costs; nothing is allocated.

    Raises:
        ValueError: If the structure has no member of this size.
    """
    return cost(structure.blank(m, n, partial(torch.empty, device="meta")))


def under_budget(m: int, n: int, share: float, unit: str) -> list[Structure]:
    """The largest members within a share of the dense cost: a train, and a few Monarch matrices.

    Raises:
        ValueError: If nothing is that small.

    Examples:
        >>> [str(structure).split(", pad")[0] for structure in under_budget(64, 64, 0.5, "macs")]
        ['BlockTensorTrain(rank=2, cores=2, interleaved=False)',
         'Monarch(blocks=4, rank=4, interleaved=True',
         'Monarch(blocks=8, rank=2, interleaved=True',
         'Monarch(blocks=16, rank=1, interleaved=True']
    """
    dense = 4 * m * n if unit == "bytes" else m * n
    limit, attribute = share * dense, UNITS[unit]

    def fits(structure: Structure) -> bool:
        """Whether there is a member of this size, and it is small enough."""
        try:
            return getattr(cost_of(structure, m, n), attribute) <= limit
        except ValueError:
            return False

    trains = list(takewhile(fits, (BlockTensorTrain(rank=rank) for rank in count(1))))
    found = [*trains[-1:], *filter(fits, _monarchs(m, n, share))]
    if not found:
        raise ValueError(
            f"budget={share}x {unit}: no structure of full rank of {m}x{n} is that small.\n"
            "Give a larger budget, or a structure."
        )
    return found


def _monarchs(m: int, n: int, share: float) -> list[Structure]:
    """Of full rank, with the fewest blocks: `r b (m + n)` numbers, rank `min(r b^2, m, n)`."""
    found: list[Structure] = []
    for b in range(2, min(m, n) + 1):
        rank = min(int(share * m * n / (b * (m + n))), min(m, n) // b)
        if m % b == 0 and n % b == 0 and rank >= 1 and rank * b * b >= min(m, n):
            found.append(Monarch(blocks=b, rank=rank))
    return found[:MONARCHS]
