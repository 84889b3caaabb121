"""The configuration of a model of transformers whose layers have become smaller.

Which number of a configuration a layer takes its size from is not guessed from names: a model is
made on the meta device from each candidate, and its shapes are compared.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn

from matrigami.compress._folder import configuration

Shapes = dict[str, tuple[int, ...]]
"""Of all tensors, by name."""

TRIED = 3
"""Most numbers of a configuration that are changed together: heads of queries, heads of keys."""

KEPT = ("head_dim", "d_kv", "_id")
"""Endings of numbers that do not change: heads are removed whole."""


def resized(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model, with the sizes that its layers have now; empty if it has none.

    Raises:
        ValueError: If no change of a few numbers gives these sizes.
    """
    config = configuration(model)
    if not config or not type(model).__module__.startswith("transformers."):
        return config
    here = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for change in _changes(config, _shapes(model, {}), here):
        if _shapes(model, change) == here:
            return config | change
    raise ValueError(
        f"save_dense: no configuration of a {type(model).__name__} has layers of these sizes.\n"
        "Keep them with matrigami.save, whose folders tell the size of each layer."
    )


def _differing(there: Shapes, here: Shapes) -> Iterator[tuple[int, int]]:
    """The sizes of axes that differ, with those that they have here."""
    for name, shape in there.items():
        pairs = zip(shape, here.get(name, ()), strict=False)
        yield from (pair for pair in pairs if pair[0] != pair[1])


def _changes(
    config: Mapping[str, Any], there: Shapes | None, here: Shapes
) -> Iterator[dict[str, int]]:
    """Changes of a few numbers, by the ratios of the sizes that differ; the first is none."""
    yield {}
    sizes = set(_differing(there or {}, here))
    numbers = {k: v for k, v in config.items() if type(v) is int and v > 0}
    found = {
        (key, value * new // old)
        for old, new in sizes
        for key, value in numbers.items()
        if value * new % old == 0 and not key.endswith(KEPT)
    }
    for count in range(1, TRIED + 1):
        for some in combinations(sorted(found), count):
            yield dict(some)


def _shapes(model: nn.Module, change: Mapping[str, int]) -> Shapes | None:
    """Those of a model of a changed configuration; None if there is no such model."""
    kind = type(model.config)  # pyright: ignore[reportArgumentType]
    try:
        config: Any = kind.from_dict(model.config.to_dict() | change)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # configurations and models refuse in ways of their own
        return None
    return {name: tuple(t.shape) for name, t in made.state_dict().items()}
