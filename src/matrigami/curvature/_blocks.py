"""What each block of parameters saw in some calls of layers.

The calls of a layer, and those of layers that share parameters, are brought together here, with the
examples first and without positions that do not count.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from matrigami.curvature._examples import Place, arranged, features_of, regrouped
from matrigami.curvature._likelihood import Terms
from matrigami.curvature._masks import counted, is_masked, noise, only, reduced
from matrigami.curvature._moments import input_rows
from matrigami.curvature._record import Record, pull_back
from matrigami.curvature._uses import Use, uses
from matrigami.nn import runs_as

Key = tuple[str, ...]
"""A block: the names of its parameters in the model."""

Blocks = dict[Key, "list[Use]"]
"""What each block saw in one batch."""

Rows = Callable[[Record, Key, Use], Tensor | None]
"""Which inputs of a block in a call count, of the use that it makes; None: all."""


class SharedInputs:
    """The inputs that linear layers of one batch have in common, each made once."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], tuple[Tensor, Use]] = {}

    def shared(self, record: Record, place: int, parts: int, use: Use) -> Use:
        """The use with the inputs of an earlier layer that read the same tensor."""
        if not runs_as(record.site.layer, nn.Linear):
            return use
        x = record.x  # held below, so that its memory is not given to another tensor
        source = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), place, parts)
        return use._replace(inputs=self.known.setdefault(source, (x, use))[1].inputs)


def named_uses(record: Record, seen: SharedInputs, place: Place | None = None) -> dict[Key, Use]:
    """The uses of one call, by the model's names of the parameters, without frozen ones."""
    site = record.site
    x, g = (
        t.to(torch.promote_types(t.dtype, torch.float32))
        if t is not None and t.is_floating_point()
        else t
        for t in (record.x, record.g)
    )
    with torch.no_grad(), torch.autocast(record.x.device.type, enabled=False):
        x, g = arranged(x, g, place, features_of(site.layer))  # pyright: ignore[reportArgumentType]
        found = uses(site.layer, x, g, site.joint)
    named = {}
    for i, (keys, use) in enumerate(found.items()):
        free = [key for key in keys if key in site.names]
        if free and len(free) < len(keys):
            raise TypeError(
                f"curvature was asked for {site.name} with {', '.join(free)} trainable alone.\n"
                f"{', '.join(keys)} share one block.\nTrain or freeze them together."
            )
        if free:
            key = tuple(site.names[key] for key in keys)
            named[key] = seen.shared(record, i, len(keys), regrouped(use, place))
    return named


def by_block(
    calls: Iterable[tuple[Record, Place | None]],
    seen: SharedInputs,
    rows: Rows | None = None,
    *,
    reduce: bool = False,
) -> Blocks:
    """The uses of each block in some calls, with the places of their examples.

    `rows` tells which inputs count, of each block in each call.
    """
    found: Blocks = {}
    for record, place in calls:
        for key, use in named_uses(record, seen, place).items():
            kept = use if rows is None else only(use, rows(record, key, use))
            found.setdefault(key, []).append(reduced(kept) if reduce else kept)
    return {key: joined(parts) for key, parts in found.items()}


def with_gradients(
    records: list[Record], places: Sequence[Place | None]
) -> list[tuple[Record, Place | None]]:
    """The calls that gradients came back to, with the places of their examples."""
    return [(r, p) for r, p in zip(records, places, strict=True) if r.g is not None]


def rows_that_count(
    outputs: Tensor, records: list[Record], places: Sequence[Place | None], found: Terms
) -> Rows | None:
    """Which inputs of each block in each call have a part in terms that count; None: all."""
    if not is_masked(found):
        return None
    pull_back(outputs, records, noise(outputs.detach(), found))
    known = {
        (id(record), key): counted(use)
        for record, place in with_gradients(records, places)
        for key, use in named_uses(record, SharedInputs(), place).items()
    }
    return lambda record, key, _: known[id(record), key]


def joined(parts: list[Use]) -> list[Use]:
    """Uses of one block in one batch: those alike become further shared positions."""
    first, *rest = parts
    alike = all(
        isinstance(use.inputs, Tensor)
        and isinstance(first.inputs, Tensor)
        and use.transposed == first.transposed
        and use.inputs.shape[:2] == first.inputs.shape[:2]
        for use in rest
    )
    if not rest or not alike:
        return parts
    inputs = torch.cat([use.inputs for use in parts], 2)  # pyright: ignore[reportCallIssue, reportArgumentType]
    rows = None
    if any(use.rows is not None for use in parts):
        rows = sum(input_rows(use.inputs) if use.rows is None else use.rows for use in parts)
    if first.gradients is None:
        return [first._replace(inputs=inputs, rows=rows)]
    gradients = torch.cat([use.gradients for use in parts], 3)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return [Use(inputs, gradients, first.transposed, rows)]


def finite(use: Use) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(is_finite(t) for t in (use.inputs, use.gradients) if isinstance(t, Tensor))


def is_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite: then neither is the sum, which takes one pass."""
    return bool(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite())
