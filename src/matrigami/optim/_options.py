"""Numbers that an optimiser takes, and those that it refuses."""

from collections.abc import Callable
from typing import Any

RANGES: dict[str, Callable[[Any], Any]] = {
    "lr": lambda x: x >= 0,
    "weight_decay": lambda x: x >= 0,
    "betas": lambda x: len(x) == 2 and min(x) >= 0 and x[0] < 1 and x[1] <= 1,
    "adam_betas": lambda x: len(x) == 2 and min(x) >= 0 and max(x) < 1,
    "eps": lambda x: x >= 0,
    "adam_eps": lambda x: x >= 0,
    "epsilon": lambda x: x >= 0,
    "exponent": lambda x: -1 <= x <= 0,
    "frequency": lambda x: x >= 1 and x == int(x),
    "statistics_every": lambda x: x >= 1 and x == int(x),
    "momentum": lambda x: 0 <= x < 1,
    "decay": lambda x: 0 <= x < 1,
    "gamma": lambda x: x > 0,
    "damping": lambda x: x > 0,
    "kl_clip": lambda x: x > 0,
    "labels": lambda x: x >= 1 and x == int(x),
    "max_dim": lambda x: x >= 1,
    "block_size": lambda x: x >= 1 and x == int(x),
}
"""Which values of each option are in range."""


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise unless the numbers that every method has, or may have, are in range."""
    for key, fits in RANGES.items():
        if key in options and not _is_in_range(fits, options[key]):
            raise ValueError(
                f"{name}({key}={options[key]}): this is out of range.\n"
                "Rates and eps are at least 0; decays, betas and momentum at least 0 and below 1; "
                "damping, gamma and kl_clip above 0; intervals and sizes whole numbers from 1."
            )
    if "betas" in options and options["betas"][1] == 1 and "exponent" not in options:
        raise ValueError(
            f"{name}(betas={options['betas']}): with a second beta of 1 no gradient would enter.\n"
            "Give a number below 1."
        )


def _is_in_range(fits: Callable[[Any], Any], value: Any) -> bool:
    """Whether a value is one, and fits."""
    try:
        return bool(fits(value))
    except (TypeError, ValueError, OverflowError):
        return False
