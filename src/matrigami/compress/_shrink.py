"""Structured removal: neurons and heads go physically, and the layers around them become smaller.

A hidden unit is a group of rows of the layers that produce it and of columns of the layer that
consumes it. Which layers belong together is not guessed from names: their units are permuted, and
the outputs of the model must stay. Units go one after the other, the one next that costs least,

    tr((W.T B W)_uu (A^-1)_uu^-1),        W <- W - W_u (A^-1)_uu^-1 (A^-1)_u:

(optimal brain surgeon on groups; `A^-1` is reduced to those that stay), after which the others make
up for it exactly: `W' = W A_:s A_ss^-1` on the set s that stays.

Shapes: m = outputs, n = inputs of the consumer, u = units.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.compress._calibration import observed
from matrigami.compress._generation import examples
from matrigami.compress._gradients import Gradients, gradients_of
from matrigami.compress._layers import set_weight, weight
from matrigami.compress._methods import Progress
from matrigami.compress._moments import damped, relative, row_losses
from matrigami.compress._report import LayerReport, Report
from matrigami.compress._running import answer, at_rest, called
from matrigami.nn import Patterns, chosen, matrix_view, swap

TOLERANCE = 1e-4
"""Relative change of the outputs below which two models are the same, in single precision."""


class Shrunk(NamedTuple):
    """The new size of a layer, outputs by inputs."""

    outputs: int
    inputs: int


@dataclass(frozen=True)
class Group:
    """Layers with common hidden units: who makes them, and who reads them.

    A fused layer makes several times what is read: queries, keys and values, head by head or, if
    `stacked`, one below the other.
    """

    consumer: str
    producers: tuple[str, ...]
    units: int
    stacked: bool = False


@torch.no_grad()
def shrink_(
    model: nn.Module,
    calibration: Iterable[Any],
    share: float,
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    heads: int | None = None,
    two_sided: bool | Gradients = False,
    damping: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Remove hidden units of a model and make its layers smaller, in place.

    Args:
        model: Any model; `nn.Linear`s, and the `Conv1D`s of transformers, are made smaller.
        calibration: Batches, or "self", as for `quantize_`.
        share: Of the units of each group, from 0 to below 1.
        targets: Patterns of the layers that read the units, such as `*.down_proj`; None for all
            whose units are found. A pattern whose units are not found is an error.
        ignore: Patterns of such layers to leave.
        heads: Units of several neighbouring inputs, so many in a layer: the heads of an attention
            (of shared keys and values: their number), by `targets="*.o_proj"`. The attention must
            read its number of heads from the sizes of its layers, as that of Llama does.
        two_sided: Whether the gradients of the outputs count, too; or their `gradient_moments`.
        damping: Of the moments, relative to their mean diagonal.
        progress: Told after every group, by the layer that reads its units. There is no journal as
            `quantize_` has: a killed call leaves layers of other sizes, and is run again.

    Returns:
        A report on the layers that read the units; `values` has the new sizes of all layers, which
        `matrigami.save` wants.

    Raises:
        ValueError: If a pattern matches nothing, no units are found, or the smaller model does not
            compute what the zeroed one does; the model is as it was.
    """
    if not 0 <= share < 1:
        raise ValueError(f"shrink_(share={share}): a share from 0 to below 1 can go.")
    data = examples(model, calibration)
    layers = chosen(model, "*" if targets is None else targets, ignore)
    groups = _found(model, layers, data[0], heads, required=targets is not None)
    readers = {group.consumer: layers[group.consumer] for group in groups}
    gradients = gradients_of(two_sided, model, readers, data)
    report = Report()
    for done, group in enumerate(groups, 1):
        consumer = model.get_submodule(group.consumer)
        seen = observed(model, {group.consumer: consumer}, data)[group.consumer]
        if seen is None:
            continue
        B = gradients.get(group.consumer)
        kept, W, losses = _removed(weight(consumer).double(), seen, B, group.units, share, damping)
        _shrink(model, group, kept, W, data[0])
        for name in (group.consumer, *group.producers):
            report.values[name] = Shrunk(*weight(model.get_submodule(name)).shape)
        told = (damping, *losses, *_told(group, kept, consumer), "shrink", W.numel())
        report.layers.append(LayerReport(group.consumer, seen.rows, seen.rejected, *told))
        if progress is not None:
            progress(done, len(groups), group.consumer)
    return report


def _told(group: Group, kept: list[int], consumer: Any) -> tuple[float, str]:
    """Bits of what is left for each weight there was, and how many units that is."""
    bits = 8.0 * consumer.weight.element_size() * len(kept) / group.units
    return bits, f"{len(kept)} of {group.units} units of {', '.join(group.producers)}"


def _found(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batch: Any,
    heads: int | None,
    required: bool,
) -> list[Group]:
    """The groups whose units can be permuted without changing the model."""
    every = {n: tuple(weight(m).shape) for n, m in model.named_modules() if can_be_smaller(m)}
    groups = [
        group
        for name in layers
        if name in every and (group := _group(model, name, every, batch, heads)) is not None
    ]
    missing = set(layers) - {group.consumer for group in groups}
    if not groups or (required and missing):
        raise ValueError(
            f"shrink_: no hidden units are found that {', '.join(sorted(missing)) or 'a layer'} "
            f"reads, of the {type(model).__name__}.\n"
            "Its producers must be nn.Linears (or Conv1Ds) beside it, with nothing between that "
            "mixes units; leave the layer by ignore=."
        )
    return groups


def _group(
    model: nn.Module, name: str, every: dict[str, tuple[int, ...]], batch: Any, heads: int | None
) -> Group | None:
    """The fewest layers beside a consumer that make its inputs, the nearest first."""
    inputs = every[name][1]
    units = inputs if heads is None else heads
    if inputs % units:
        return None
    fitting = [n for n in _beside(name, every) if _makes(every[n][0], inputs, units, heads)]
    sizes = range(1, len(fitting) + 1) if heads is None else [len(fitting)]
    layouts = (False,) if heads is None else (False, True)
    for count in sizes:
        for producers, stacked in product(combinations(fitting, count), layouts):
            group = Group(name, producers, units, stacked)
            if producers and _permutes(model, group, batch):
                return group
    return None


def _beside(name: str, every: Iterable[str]) -> list[str]:
    """The layers of the same parent, the last first; of an only child those of its grandparent."""
    parent = name.rpartition(".")[0]
    family = [n for n in every if n.rpartition(".")[0] == parent and n != name]
    if not family and parent:
        elder = parent.rpartition(".")[0]
        family = [n for n in every if n.startswith(f"{elder}." if elder else "") and n != name]
    return family[::-1]


def _makes(outputs: int, inputs: int, units: int, heads: int | None) -> bool:
    """Whether a layer could make these inputs."""
    return outputs == inputs if heads is None else outputs % units == 0


def _permutes(model: nn.Module, group: Group, batch: Any) -> bool:
    """Whether the units can be exchanged, all their rows and columns together."""
    expected = _outputs(model, batch)
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
    _permute(model, group, order)
    same = _near(_outputs(model, batch), expected)
    _permute(model, group, order.argsort())
    return same


def _permute(model: nn.Module, group: Group, order: Tensor) -> None:
    """Rows of the producers and columns of the consumer in another order of the units."""
    consumer = model.get_submodule(group.consumer)
    inputs = weight(consumer).mT
    for name in group.producers:
        layer: Any = model.get_submodule(name)
        set_weight(layer, _rows(weight(layer), order, group, len(inputs)))
        if layer.bias is not None:
            layer.bias.copy_(_rows(layer.bias, order, group, len(inputs)))
    set_weight(consumer, _rows(inputs, order, group, len(inputs)).mT)


def _rows(t: Tensor, order: Tensor, group: Group, inputs: int) -> Tensor:
    """The rows of some units, of all parts of a fused layer that reads so many at once."""
    parts = max(len(t) // inputs, 1) if group.stacked else 1
    return t.unflatten(0, (parts, group.units, -1))[:, order.to(t.device)].flatten(0, 2)


def _removed(
    W: Float[Tensor, "m n"],
    seen: Any,
    B: Tensor | None,
    units: int,
    share: float,
    damping: float,
) -> tuple[list[int], Tensor, tuple[float, float]]:
    """Units that stay, the weights on them, and the losses of this and of the simple choice."""
    A, holdout = seen.moments()
    count = units - round(share * units)
    order, size = _order(W, damped(A, damping), B, units), W.shape[-1] // units
    norms = (W.square().sum(0) * A.diagonal()).unflatten(0, (units, size)).sum(-1)
    tried = []
    for kept, metric in (
        (sorted(order[len(order) - count :]), damped(A, damping)),
        (sorted(norms.topk(count).indices.tolist()), None),
    ):
        s = torch.tensor(kept, device=W.device)
        columns = (s[:, None] * size + torch.arange(size, device=W.device)).flatten()
        V = W[:, columns]
        if metric is not None:
            V = torch.linalg.solve(metric[columns][:, columns], metric[columns] @ W.mT).mT
        E = W.index_add(1, columns, -V)
        loss = relative(*(row_losses(X, holdout, B).sum() for X in (E, W)))
        tried.append((kept, V, float(loss)))
    best = min(tried, key=lambda found: found[2])
    return best[0], best[1], (best[2], tried[1][2])


def _order(W: Tensor, A: Tensor, B: Tensor | None, units: int) -> list[int]:
    """All units in the order in which they go."""
    size, left, order = W.shape[-1] // units, list(range(units)), []
    inverse = torch.linalg.inv(A)
    while left:
        blocks = inverse.unflatten(0, (units, size)).unflatten(2, (units, size))
        index = torch.tensor(left, device=W.device)
        own = blocks[index, :, index]
        parts = W.unflatten(1, (units, size))[:, index]
        gram = torch.einsum("muk,mul->ukl", parts if B is None else _left(B, parts), parts)
        costs = torch.linalg.solve(own, gram).diagonal(dim1=-2, dim2=-1).sum(-1)
        u = left.pop(int(costs.argmin()))
        order.append(u)
        at = slice(u * size, (u + 1) * size)
        reach = torch.linalg.solve(inverse[at, at], inverse[at])
        W = W - W[:, at] @ reach
        inverse = inverse - inverse[:, at] @ reach
    return order


def _left(B: Tensor, parts: Tensor) -> Tensor:
    """`B` on the outputs."""
    return torch.einsum("mo,ouk->muk", B.to(parts), parts)


def _shrink(model: nn.Module, group: Group, kept: list[int], W: Tensor, batch: Any) -> None:
    """Put smaller layers into the place of the group; the model must be the zeroed one."""
    index = torch.tensor(kept)
    old: dict[nn.Module, nn.Module] = {}
    consumer: Any = model.get_submodule(group.consumer)
    before = weight(consumer).clone()
    size = before.shape[1] // group.units
    columns = (index[:, None] * size + torch.arange(size)).flatten().to(W.device)
    zeroed = torch.zeros_like(before, dtype=W.dtype).index_add_(1, columns, W)
    set_weight(consumer, zeroed.to(before.dtype))
    expected = _outputs(model, batch)
    old[consumer] = smaller(consumer, W.to(before.dtype), consumer.bias)
    for name in group.producers:
        layer: Any = model.get_submodule(name)
        rows = _rows(weight(layer), index, group, before.shape[1])
        bias = None if layer.bias is None else _rows(layer.bias, index, group, before.shape[1])
        old[layer] = smaller(layer, rows, bias)
    resize(model, old)
    try:
        same = _near(_outputs(model, batch), expected)
    except (RuntimeError, ValueError):
        same = False
    if not same:
        resize(model, {new: layer for layer, new in old.items()})
        set_weight(consumer, before)
        raise ValueError(
            f"shrink_: without its units, {group.consumer} does not compute what it does with "
            "zeros in their place.\nThe model reads sizes from elsewhere; leave it by ignore=."
        )


SIZES = {"Linear": ("in_features", "out_features"), "Conv1D": ("nx", "nf")}
"""What the layers that can be made smaller call their inputs and outputs."""


def can_be_smaller(layer: nn.Module) -> bool:
    """Whether it is a linear layer of torch, or the `Conv1D` of transformers."""
    known = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
    return known and matrix_view(layer) is not None


def smaller(layer: Any, W: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer with another weight and bias, and all else as it was."""
    new = copy.copy(layer)  # its hooks and flags, but a table of parameters of its own
    new._parameters = dict(layer._parameters)
    stored = W if type(layer) is nn.Linear else W.mT
    for name, t in (("weight", stored), ("bias", bias)):
        old = layer._parameters[name]
        if t is not None and old is not None:
            own = t.detach().to(old).clone(memory_format=torch.contiguous_format)
            new._parameters[name] = nn.Parameter(own, old.requires_grad)
    for name, size in zip(SIZES[type(layer).__name__], reversed(W.shape), strict=True):
        setattr(new, name, size)
    return new


def resize(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Put layers of other sizes into a model; whoever splits the outputs of one is told.

    The attention of GPT-2 keeps the size of each of the parts that its fused layer makes.
    """
    for parent in model.modules():
        splits = isinstance(getattr(parent, "split_size", None), int)
        for child in parent.children() if splits else ():
            split: Any = parent.split_size
            new = layers.get(child, child)
            rows, left = (len(weight(c)) if can_be_smaller(c) else 0 for c in (child, new))
            if rows > split and left:
                parent.split_size = split * left // rows
    swap(model, layers)


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    """What the model says, in evaluation mode."""
    with at_rest(model):
        return answer(called(model, batch)).double()


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are the same but for rounding."""
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
