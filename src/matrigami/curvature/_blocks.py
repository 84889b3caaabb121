"""What each block of parameters saw in some calls of layers.

The calls of a layer, and those of layers that share parameters, are brought together here, with the
examples first and without positions that do not count: padding, prompts, whatever the targets of a
loss leave out. No gradient comes back to what nothing depends on that counts. Such rows add nothing
to the second moment of the gradients, and should not be in the mean over inputs either.

Shapes: b = blocks, N = examples, K = columns, S = shared positions.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from matrigami.curvature._examples import Place, arranged, regrouped
from matrigami.curvature._likelihood import Terms
from matrigami.curvature._moments import input_rows
from matrigami.curvature._tape import LayerCall, is_finite, pull_back
from matrigami.nn import OneHot, Use, runs_as, uses

Key = tuple[str, ...]
"""A block: the names of its parameters in the model."""

Blocks = dict[Key, "list[Use]"]
"""What each block saw in one batch."""

Rows = Callable[[LayerCall, Key, Use], Tensor | None]
"""Which inputs of a block in a call count, of the use that it makes; None: all."""


class SharedInputs:
    """The inputs that linear layers of one batch have in common, each made once."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], tuple[Tensor, Use]] = {}

    def shared(self, call: LayerCall, place: int, parts: int, use: Use) -> Use:
        """The use with the inputs of an earlier layer that read the same tensor."""
        if not runs_as(call.layer.module, nn.Linear):
            return use
        x = call.x  # held below, so that its memory is not given to another tensor
        source = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), place, parts)
        return use._replace(inputs=self.known.setdefault(source, (x, use))[1].inputs)


def named_uses(call: LayerCall, seen: SharedInputs, place: Place | None = None) -> dict[Key, Use]:
    """The uses of one call, by the model's names of the parameters, without frozen ones.

    A call of no rows, such as that of an expert without tokens, is one of a row of zeros that does
    not count: every layer can take that.
    """
    layer, is_empty = call.layer, not call.x.numel()
    x, g = map(_of_one_zero if is_empty else _in_single, (call.x, call.g))
    place = None if is_empty else place
    with torch.no_grad(), torch.autocast(call.x.device.type, enabled=False):
        x, g = arranged(x, g, place, layer.features)  # pyright: ignore[reportArgumentType]
        found = uses(layer.module, x, g, layer.joint)
    named = {}
    for i, (keys, use) in enumerate(found.items()):
        free = [key for key in keys if key in layer.names]
        if free and len(free) < len(keys):
            raise TypeError(
                f"curvature: of {layer.name} only {', '.join(free)} is trainable.\n"
                f"{', '.join(keys)} share one block.\nTrain or freeze them together."
            )
        if free:
            key = tuple(layer.names[key] for key in keys)
            kept = use._replace(rows=0) if is_empty else regrouped(use, place)
            named[key] = seen.shared(call, i, len(keys), kept)
    return named


def _in_single(t: Tensor | None) -> Tensor | None:
    """In single precision at least."""
    if t is None or not t.is_floating_point():
        return t
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _of_one_zero(t: Tensor | None) -> Tensor | None:
    """Zeros, with one entry along every axis that has none."""
    return None if t is None else _in_single(t.new_zeros([max(size, 1) for size in t.shape]))


def by_block(
    calls: Iterable[tuple[LayerCall, Place | None]],
    seen: SharedInputs,
    rows: Rows | None = None,
    *,
    reduce: bool = False,
) -> Blocks:
    """The uses of each block in some calls, with the places of their examples.

    `rows` tells which inputs count, of each block in each call.
    """
    found: Blocks = {}
    for call, place in sorted(calls, key=lambda known: not known[0].x.numel()):  # empty ones last
        for key, use in named_uses(call, seen, place).items():
            if key in found and not call.x.numel():
                continue
            kept = use if rows is None else only(use, rows(call, key, use))
            found.setdefault(key, []).append(reduced(kept) if reduce else kept)
    return {key: joined(parts) for key, parts in found.items()}


def with_gradients(
    calls: list[LayerCall], places: Sequence[Place | None]
) -> list[tuple[LayerCall, Place | None]]:
    """The calls that gradients came back to, with the places of their examples."""
    return [(c, p) for c, p in zip(calls, places, strict=True) if c.g is not None]


def rows_that_count(
    outputs: Tensor, calls: list[LayerCall], places: Sequence[Place | None], found: Terms
) -> Rows | None:
    """Which inputs of each block in each call have a part in terms that count; None: all."""
    if not is_masked(found):
        return None
    pull_back(outputs, calls, noise(outputs.detach(), found))
    known = {
        (id(call), key): counted(use)
        for call, place in with_gradients(calls, places)
        for key, use in named_uses(call, SharedInputs(), place).items()
    }
    return lambda call, key, _: known[id(call), key]


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
    rows = _rows_of_all(parts)
    if first.gradients is None:
        return [first._replace(inputs=inputs, rows=rows)]
    gradients = torch.cat([use.gradients for use in parts], 3)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return [Use(inputs, gradients, first.transposed, rows)]


def _rows_of_all(parts: list[Use]) -> int | None:
    """How many inputs of several uses count; None: all."""
    if all(use.rows is None for use in parts):
        return None
    return sum(input_rows(use.inputs) if use.rows is None else use.rows for use in parts)


def are_finite(blocks: Blocks) -> bool:
    """Whether no entry of inputs or gradients is NaN or infinite."""
    tensors = (t for parts in blocks.values() for use in parts for t in use[:2])
    return all(is_finite(t) for t in tensors if isinstance(t, Tensor))


def is_masked(found: Terms) -> bool:
    """Whether a loss leaves out some of its terms."""
    return found.weights is not None and not bool(found.weights.all())


def noise(outputs: Tensor, found: Terms) -> Tensor:
    """One column `(1, N, ...)` that is zero where nothing counts, and not elsewhere."""
    generator = torch.Generator(outputs.device).manual_seed(2)
    drawn = torch.randn(outputs.shape, generator=generator, device=outputs.device)
    return (drawn if found.weights is None else drawn * (found.weights != 0))[None].to(
        outputs.dtype
    )


def counted(use: Use) -> Tensor | None:
    """The rows of a use that have a gradient."""
    if use.gradients is None:
        return None
    active = use.gradients.ne(0).any(-1).any(2).any(0)  # N S
    return active[:, 0] if isinstance(use.inputs, OneHot) else active


def of_mask(mask: Bool[Tensor, "..."], use: Use) -> Tensor | None:
    """A mask of positions as rows of a use, if it has such positions; None: all count."""
    if isinstance(use.inputs, OneHot) or use.inputs.shape[1:3].numel() != mask.numel():
        return None
    return mask.reshape(use.inputs.shape[1:3]).to(use.inputs.device)


def only(use: Use, rows: Tensor | None) -> Use:
    """A use without the inputs that do not count."""
    if rows is None or bool(rows.all()):
        return use
    inputs, number = use.inputs, int(rows.sum())
    if not isinstance(inputs, OneHot):
        return use._replace(inputs=inputs * rows[:, :, None], rows=number)
    kept = OneHot(inputs.indices[rows], inputs.size, inputs.examples[rows], inputs.number)
    gradients = None if use.gradients is None else use.gradients[:, rows]
    return use._replace(inputs=kept, gradients=gradients)


def reduced(use: Use) -> Use:
    """One position: the mean of the inputs that count, the sum of the gradients."""
    if isinstance(use.inputs, OneHot) or use.gradients is None:
        return use
    gradients = use.gradients.sum(3, keepdim=True)
    if use.rows is None:
        return use._replace(inputs=use.inputs.mean(2, keepdim=True), gradients=gradients)
    there = use.inputs.ne(0).any(-1).any(0)  # N S
    number = there.sum(1).clamp_min(1)[:, None, None]
    inputs = use.inputs.sum(2, keepdim=True) / number
    return use._replace(inputs=inputs, gradients=gradients, rows=int(there.any(1).sum()))
