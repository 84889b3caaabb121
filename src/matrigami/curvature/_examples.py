"""What an example is: where those of a batch are in the outputs, and in what each layer sees.

Curvature is a sum over examples, so the gradients of two of them must not be added up first. Shapes
alone do not tell where they are: positions may be folded into the first axis, as `(N T, C)` or
`(T N, C)`, or come before the examples, as `(T, N, C)`. So it is found out: the gradient of the
outputs of some examples is zero at all others, in every layer. If no place fits, the batch as a
whole is one example, which is always right, and costs a column for each of its outputs.

Shapes: M = rows of the outputs, N = examples, T = positions on the axis of the examples, K =
columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from matrigami.curvature._tape import LayerCall, pull_back
from matrigami.nn import OneHot, Use

FEW = 8
"""Examples up to which a search is certain that no two of them mix; of more, all but certain."""


class Place(NamedTuple):
    """Where the examples are in one tensor.

    Args:
        examples: How many there are.
        axis: Which axis they are on.
        last: They change fastest on it, `t N + n`, instead of the positions, `n T + t`.
    """

    examples: int
    axis: int = 0
    last: bool = False

    def owners(self, size: int, device: torch.device) -> Tensor:
        """The example of each entry of the axis."""
        at = torch.arange(size, device=device)
        return at % self.examples if self.last else at // (size // self.examples)

    def positions(self, size: int, device: torch.device) -> Tensor:
        """The position of each entry of the axis."""
        at = torch.arange(size, device=device)
        return at // self.examples if self.last else at % (size // self.examples)

    def in_order(self, t: Tensor, before: int = 0) -> Tensor:
        """`(..., N T, ...)` with so many axes before the examples, each with its own positions."""
        t = t.movedim(before + self.axis, before)
        if not self.last or self.examples in (1, t.shape[before]):
            return t
        return (
            t.unflatten(before, (-1, self.examples))
            .transpose(before, before + 1)
            .flatten(before, before + 1)
        )


@dataclass(frozen=True)
class Examples:
    """The places of the examples of a batch.

    Args:
        outputs: In the outputs of the model.
        inputs: In what each call of a layer sees; None: the call is of no example, or of all.
    """

    outputs: Place
    inputs: tuple[Place | None, ...]


class Finder:
    """Finds the examples, once for all batches of one shape.

    Args:
        alone: Whether a layer that is called once for all examples may be seen as one example:
            where labels are drawn, for then the gradients of two examples do not correlate.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.known: dict[Any, Examples] = {}

    def find(
        self, inputs: Any, outputs: Tensor, calls: list[LayerCall], column: Tensor | None = None
    ) -> Examples:
        """Where the examples of one batch are.

        Args:
            inputs: What the model was given.
            outputs: What it gave.
            calls: The calls on the way, without gradients.
            column: Columns `(k, M, ...)` that are pulled back next. A single one of which no entry
                is zero tells as much as noise: the calls then have its gradients.
        """
        shapes = tuple((id(c.layer), tuple(c.x.shape), c.shape) for c in calls)
        key = (tuple(outputs.shape), _sizes(inputs), shapes)
        if key not in self.known:
            marks = _noise(outputs) if column is None or not _tells(column) else column
            self.known[key] = self._search(inputs, marks, outputs, calls)
            for call in calls:
                g, call.g = call.g, None
                if g is not None and marks is column:
                    call.g = g.sum(0, keepdim=True)
        return self.known[key]

    def _search(
        self, inputs: Any, marks: Tensor, outputs: Tensor, calls: list[LayerCall]
    ) -> Examples:
        """The finest examples that no layer mixes; else each row, or all of them together."""
        whole = Place(1)
        rest = tuple(None if _is_single(c) else whole for c in calls)
        partly: list[tuple[Place | None, ...]] = []
        for place in _candidates(len(outputs), _sizes(inputs)):
            found = self._places(place, marks, outputs, calls)
            if all(found):
                return Examples(place, found)
            partly += [found] if self.alone else []
        if not self.alone:
            return Examples(whole, rest)
        return Examples(whole, _of_each_layer(calls, partly, rest))

    def _places(
        self, place: Place, marks: Tensor, outputs: Tensor, calls: list[LayerCall]
    ) -> tuple[Place | None, ...]:
        """The places in all calls, if the outputs have theirs there; None where there is none."""
        options = [list(_options(call, place.examples)) for call in calls]
        for groups in _groups(place.examples, outputs.device):
            if not self.alone and not all(options):
                return (None,)
            rows = groups[:, place.owners(len(outputs), outputs.device)]
            pull_back(outputs, calls, marks * rows.view(*rows.shape, *[1] * (outputs.ndim - 1)))
            options = [
                [way for way in ways if _is_there(way, call.g, groups)]
                for call, ways in zip(calls, options, strict=True)
            ]
        return tuple(next(iter(ways), None) for ways in options)


def _of_each_layer(
    calls: list[LayerCall],
    partly: list[tuple[Place | None, ...]],
    rest: tuple[Place | None, ...],
) -> tuple[Place | None, ...]:
    """The first places that all calls of a layer have, and of those that share its parameters."""
    found = list(rest)
    for group in _related(calls):
        places = next((p for p in partly if all(p[i] for i in group)), rest)
        for i in group:
            found[i] = places[i]
    return tuple(found)


def _related(calls: list[LayerCall]) -> list[list[int]]:
    """Which calls share parameters."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, call in enumerate(calls):
        names, members = set(call.layer.names.values()), [i]
        joined = [group for group in groups if group[0] & names]
        groups = [group for group in groups if not group[0] & names]
        for others, more in joined:
            names, members = names | others, members + more
        groups.append((names, members))
    return [members for _, members in groups]


def _is_single(call: LayerCall) -> bool:
    """Whether the input of a call has no axis of examples or positions."""
    features = call.layer.features
    return features is not None and call.x.ndim == features


def _sizes(inputs: Any) -> tuple[int, ...]:
    """Sizes of the first two axes of all tensors that a model was given."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[:2])
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(size for part in inputs for size in _sizes(part))
    return ()


def _candidates(rows: int, sizes: tuple[int, ...]) -> Iterator[Place]:
    """Every row an example; rows that are positions of fewer examples."""
    if rows > 1:
        yield Place(rows)
    for size in sorted(set(sizes), reverse=True):
        if 1 < size < rows and rows % size == 0:
            yield Place(size)
            yield Place(size, last=True)


def _options(call: LayerCall, examples: int) -> Iterator[Place]:
    """Where so many examples may be in a call; nothing if its output is not on the way."""
    features = call.layer.features
    axes = 1 if features is None else call.x.ndim - features
    shape = call.shape
    for axis in range(min(axes, len(shape))):
        if shape[axis] == call.x.shape[axis] and shape[axis] % examples == 0 and shape[axis]:
            yield Place(examples, axis)
            if shape[axis] > examples:
                yield Place(examples, axis, last=True)


def _groups(examples: int, device: torch.device) -> Bool[Tensor, "k 2 N"]:
    """Groups of examples, each with all others, such that two that mix are not together in all.

    Few examples have the digits of their numbers. Of more, random halves do: a model that mixes
    pairs would have to mix none across.
    """
    if examples <= FEW:
        digits = torch.arange((examples - 1).bit_length())[:, None]
        chosen = torch.arange(examples) >> digits & 1 == 1
    else:
        generator = torch.Generator().manual_seed(examples)
        chance = torch.rand(1 + 20 // examples, examples, generator=generator)
        chosen = chance.argsort() % 2 == 1
    return torch.stack([chosen, ~chosen], 1).to(device)


def _tells(column: Tensor) -> bool:
    """Whether a column tells as much as noise: it is one, and none of its entries is zero."""
    return len(column) == 1 and bool(column.all())


def _noise(outputs: Tensor) -> Tensor:
    """One column `(1, M, ...)` that nothing is orthogonal to."""
    generator = torch.Generator(outputs.device).manual_seed(1)
    noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
    return noise[None].to(outputs.dtype)


def _is_there(place: Place, g: Tensor | None, groups: Bool[Tensor, "2 N"]) -> bool:
    """Whether the gradients of both groups of examples are at this place."""
    if g is None:
        return True
    g = g.movedim(place.axis + 1, 1)
    active = g.reshape(*g.shape[:2], -1).abs().amax(-1).ne(0)  # a sixth of the time of any()
    return not bool((active & ~groups[:, place.owners(g.shape[1], g.device)]).any())


def by_positions(columns: Tensor, place: Place) -> Iterator[Tensor]:
    """Columns `(k, M, ...)`, those of one position of the axis of examples after the other."""
    M = columns.shape[1]
    if place.examples == M:
        yield columns
        return
    at = place.positions(M, columns.device).view(-1, *[1] * (columns.ndim - 2))
    for t in range(M // place.examples):
        yield columns * (at == t)


def by_terms(g: Tensor, axis: int) -> Iterator[Tensor]:
    """A gradient `(N, ...)` as columns `(1, N, ...)`, each of one term of every example.

    Args:
        g: The gradient.
        axis: That of the outputs of one term; all others but the first are of terms.
    """
    first = torch.zeros_like(g[:1]).movedim(axis, -1)[..., 0] if g.ndim > 1 else g[:1]
    for place in range(first[0].numel()):
        mask = torch.zeros_like(first).flatten()
        mask[place] = 1
        mask = mask.view(first.shape)
        yield (g * (mask.unsqueeze(axis) if g.ndim > 1 else mask))[None]


def arranged(
    x: Tensor, g: Tensor | None, place: Place | None, features: int | None
) -> tuple[Tensor, Tensor | None]:
    """The input and gradients of a call with the examples first, if its layer lets them be."""
    if place is None or (place.axis == 0 and x.shape[0] == place.examples):
        return x, g
    x, g = place.in_order(x), None if g is None else place.in_order(g, 1)
    if features is None:
        return x, g
    x = x.unflatten(0, (place.examples, -1))
    return x, None if g is None else g.unflatten(1, (place.examples, -1))


def regrouped(use: Use, place: Place | None) -> Use:
    """A use whose rows are positions of fewer examples, as further shared positions."""
    if isinstance(use.inputs, OneHot):
        return _regrouped_tokens(use, place)
    inputs, g = use.inputs, use.gradients
    if place is None or inputs.shape[1] == place.examples:
        return use
    inputs = inputs.unflatten(1, (place.examples, -1)).flatten(2, 3)
    if g is not None:
        g = g.unflatten(1, (place.examples, -1)).transpose(2, 3).flatten(3, 4)
    return use._replace(inputs=inputs, gradients=g)


def _regrouped_tokens(use: Use, place: Place | None) -> Use:
    """The same tokens of one example are summed."""
    inputs, g = use.inputs, use.gradients
    if place is None or not isinstance(inputs, OneHot) or inputs.number == place.examples:
        return use
    owners = inputs.examples // (inputs.number // place.examples)
    found, at = (owners * inputs.size + inputs.indices).unique(return_inverse=True)
    merged = OneHot(found % inputs.size, inputs.size, found // inputs.size, place.examples)
    if g is not None:
        g = g.new_zeros(1, len(found), *g.shape[2:]).index_add_(1, at, g)
    return use._replace(inputs=merged, gradients=g)
