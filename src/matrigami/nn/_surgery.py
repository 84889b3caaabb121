"""Surgery: dense layers of a finished model exchanged for structured ones, and back.

All new layers are made before the first is put in its place, so that a structure that does not fit
leaves the model as it was.

Shapes: m = outputs, n = inputs of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matrigami._words import columns
from matrigami.nn._budget import cost_of, parsed_budget, under_budget
from matrigami.nn._candidates import hopeful
from matrigami.nn._choice import (
    Patterns,
    about,
    chosen,
    for_each,
    matching,
    matrix_view,
    patterns_in,
)
from matrigami.nn._linear import StructuredLinear, fastest
from matrigami.nn._separate import fuse_
from matrigami.nn._stand_in import StructuredConv, dense_of, stand_in, swap
from matrigami.operators import LinearOperator, Structure, check_recipe, cost, operator

Structures = Structure | Mapping[str, Structure]
"""One structure for all layers, or one for each pattern of names; the first that matches."""

REPEATS = 5
"""Timings of a layer, after one to warm up; the fastest counts."""


@dataclass(frozen=True)
class Exchange:
    """One layer before and after.

    Attributes:
        name: The layer; of layers with a shared weight, the first.
        structure: The structure that it has now.
        error: `||W - A|| / ||W||`, in the metric if there was one; NaN for a random start.
        parameters: Numbers in the weight, before and after.
        macs: Multiply-adds for one input vector, before and after.
        seconds: Time of a product with its matrix, before and after; empty if not measured.
    """

    name: str
    structure: Structure | None
    error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, ...] = ()

    def cells(self) -> list[str]:
        """A row of the table."""
        error = "" if self.error != self.error else f"{self.error:.3f}"
        cells = [self.name, str(self.structure or ""), error]
        for before, after in (self.parameters, self.macs):
            cells += [str(before), f"-> {after}"]
        times = [f"{1e6 * s:.1f}" for s in self.seconds]
        return cells + ([times[0], f"-> {times[1]}"] if times else ["", ""])


@dataclass(frozen=True)
class Exchanges:
    """What surgery has done, layer by layer; printed, it is a table."""

    layers: list[Exchange]

    def __str__(self) -> str:
        """A table, with the sum of all layers in the end."""
        total = Exchange(
            "all", None, float("nan"), *map(self._sum, ("parameters", "macs", "seconds"))
        )
        times = "microseconds" if self.layers[0].seconds else ""
        rows = [["layer", "structure", "error", "parameters", "", "MACs", "", times, ""]]
        rows += [x.cells() for x in (*self.layers, total)]
        return "\n".join(columns(rows, [False] * 2 + [True] * 7))

    def _sum(self, what: str) -> Any:
        """Before and after, of all layers."""
        return tuple(map(sum, zip(*[getattr(x, what) for x in self.layers], strict=True)))


@torch.no_grad()
def replace_(
    model: nn.Module,
    structure: Structures | None = None,
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    init: Literal["project", "random"] = "project",
    metric: Any = None,
    budget: str | None = None,
    vectors: int = 0,
) -> Exchanges:
    """Exchange dense layers of a model for structured ones, in place.

    Any `nn.Linear`, convolution of one group (its matrix of taps) and `Conv1D` of transformers.
    Device, type, `requires_grad`, mode, bias and hooks are kept; layers that shared a weight share
    the new tensors. If anything does not fit, nothing is changed.

    Args:
        model: The model.
        structure: One for all, or for each pattern of names: `{"*.mlp.*": Monarch(blocks=4)}`.
        targets: Patterns such as `re:.*mlp.*`; None for all but the last, or with a mapping.
        ignore: Patterns of layers to leave as they are.
        init: Start from the nearest member, or from a random one, to be trained.
        metric: For `init="project"`: the moments of what the layers have seen, a
            `curvature.capture` or anything that has `.inputs` and `.gradients` by the name of the
            weight; None for the Frobenius norm.
        budget: In place of a structure: a share such as `0.5x macs` (`parameters`, `bytes`). Each
            layer gets the best structure of full rank without shared weights below it: the nearest,
            or for a random start the largest.
        vectors: Measure the latency of each layer, before and after, on so many input vectors.

    Raises:
        ValueError: If a pattern matches nothing, a layer does not fit the structure, a weight is
            shared with a layer that stays, or neither a structure nor a budget is given.

    Examples:
        >>> from matrigami import LowRank
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> done = replace_(model, LowRank(rank=4))
        >>> model[0], done.layers[0].parameters
        (StructuredLinear(16, 16, LowRank(rank=4), bias=True), (256, 128))
    """
    if (structure is None) == (budget is None):
        raise ValueError(
            "replace_: one of structure= and budget= must be given.\n"
            "Write replace_(model, Monarch(blocks=4)) or replace_(model, budget='0.5x macs')."
        )
    layers, recipes = _recipes(model, structure, targets, ignore, budget)
    peers = {name: _peers(model, name, layer, ignore) for name, layer in layers.items()}
    exchanged: dict[nn.Module, nn.Module] = {}
    report = []
    for name, layer in layers.items():
        with about(name):
            A, recipe, error = _member(name, layer, recipes[name], init, metric)
            new = stand_in(layer, recipe, A)
        exchanged[layer] = new
        exchanged |= {peer: _sharing(stand_in(peer, recipe, A), new) for peer in peers[name]}
        report.append(_told(name, layer, new, recipe, error, vectors))
    swap(model, exchanged)
    return Exchanges(report)


def to_dense_(model: nn.Module) -> list[str]:
    """Exchange the structured layers of a model for dense ones with the same outputs, in place.

    Layers that share their tensors share the dense weight. A `Conv1D` of transformers is one again,
    and what `separate_` has made is fused.

    Args:
        model: The model.

    Returns:
        The names of the layers.

    Examples:
        >>> from matrigami import LowRank
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> _ = replace_(model, LowRank(rank=2), targets="0")
        >>> to_dense_(model), model[0]
        (['0'], Linear(in_features=4, out_features=4, bias=True))
    """
    exchanged: dict[nn.Module, nn.Module] = {}
    names, shared = [], {}
    inner = {m.taps for m in model.modules() if isinstance(m, StructuredConv)}
    for name, old in model.named_modules():
        if not isinstance(old, StructuredLinear | StructuredConv) or old in inner:
            continue
        linear = old.taps if isinstance(old, StructuredConv) else old
        new: Any = dense_of(old)
        first = next(linear.parameters())
        new.weight = shared.setdefault(id(first), new.weight)
        new.weight.requires_grad_(first.requires_grad)
        if linear.bias is not None:
            new.bias.requires_grad_(linear.bias.requires_grad)
        exchanged[old] = new.train(old.training)
        names.append(name)
    swap(model, exchanged)
    fuse_(model)
    return names


Candidates = dict[str, list[Structure]]
"""The structures that are tried for each layer."""


def _recipes(
    model: nn.Module,
    structure: Structures | None,
    targets: Patterns | None,
    ignore: Patterns,
    budget: str | None,
) -> tuple[dict[str, nn.Module], Candidates]:
    """The layers, and what each may become; every size is tried without data."""
    targets = patterns_in(structure, targets, "replace_", "structures")
    layers = chosen(model, targets, ignore)
    if budget is not None:
        share, unit = parsed_budget(budget)
        return layers, for_each(layers, lambda _, v: under_budget(*_size(v), share, unit))
    given = structure if isinstance(structure, Mapping) else {"*": structure}
    by_name = matching(list(given), layers, model, "structure")
    return layers, for_each(layers, lambda name, v: [_fitting(given[by_name[name]], v)])


def _fitting(structure: Any, layer: nn.Module) -> Structure:
    """A structure that has members of the size of a layer.

    Raises:
        ValueError: If it has none.
        TypeError: If it is no structure.
    """
    check_recipe(structure, "replace_: structure")
    cost_of(structure, *_size(layer))
    return structure


def _size(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    view: Any = matrix_view(layer)
    return view.rows, view.columns


def _member(
    name: str, layer: Any, recipes: list[Structure], init: str, metric: Any
) -> tuple[LinearOperator | None, Structure, float]:
    """The weight of a new layer, its structure and its error: of several the nearest."""
    m, n = _size(layer)
    if init == "random":
        if metric is not None:
            raise ValueError(
                "replace_: metric= was given beside init='random'.\n"
                "Nothing is projected there. Leave one of them out."
            )
        best = max(recipes, key=lambda recipe: cost(recipe.init(m, n, device="meta")).params)
        return None, best, float("nan")
    if init != "project":
        raise ValueError(f"replace_(init={init!r}): it is neither 'project' nor 'random'.")
    view: Any = matrix_view(layer)
    W = view.split(layer.weight.detach())[0]
    if W.is_meta:
        raise ValueError(
            "replace_: its weight is on the meta device and has no numbers.\n"
            "Load the weights first, or start from random ones: init='random'."
        )
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    left, right = _sides(name, metric, W)

    def squared(A: LinearOperator) -> float:
        """Its squared error in the metric."""
        return _square(W - A.dense(), left, right)

    found = [(squared(A), A, r) for r, A in hopeful(recipes, W, squared, left, right)]
    error, A, recipe = min(found, key=lambda one: one[0])
    whole = _square(W, left, right)
    return A, recipe, (error / whole) ** 0.5 if whole > 0 else 0.0


def _sides(name: str, metric: Any, W: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The moments of the output gradients and of the inputs of a layer."""
    if metric is None:
        return None, None
    moments = metric[f"{name}.weight"]
    sides = (moments.gradients, moments.inputs)
    left, right = (None if M is None else operator(M).dense().to(W) for M in sides)
    return tuple(M[0] if M is not None and M.ndim == 3 else M for M in (left, right))  # pyright: ignore[reportReturnType]


def _square(E: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """`tr(B E A E.T)`."""
    F = E if left is None else left @ E
    return max(float(((F if right is None else F @ right) * E).sum()), 0.0)


def _peers(model: nn.Module, name: str, layer: Any, ignore: Patterns) -> list[nn.Module]:
    """Other layers with the same weight, which must go along.

    Raises:
        ValueError: If one of them is no layer that can be replaced, or is to be left.
    """
    left = matching(ignore, dict(model.named_modules()), model, "ignore")
    found = []
    for other, module in model.named_modules():
        if module is layer or all(p is not layer.weight for p in module._parameters.values()):
            continue
        if other in left or matrix_view(module) is None:
            raise ValueError(
                f"replace_: {name} shares its weight with {other}, a {type(module).__name__} that "
                "stays.\nLeave both by ignore=, or give one of them a weight of its own first."
            )
        found.append(module)
    return found


def _sharing(new: nn.Module, first: nn.Module) -> nn.Module:
    """A layer with the tensors of another one, but its own bias."""
    mine, theirs = (x.taps if isinstance(x, StructuredConv) else x for x in (new, first))
    for key in theirs.factor_names:  # pyright: ignore[reportGeneralTypeIssues]
        mine.register_parameter(key, theirs.get_parameter(key))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return new


def _told(
    name: str, old: nn.Module, new: Any, recipe: Structure, error: float, vectors: int
) -> Exchange:
    """One row of the table."""
    linear = new.taps if isinstance(new, StructuredConv) else new
    m, n = _size(old)
    now = linear.cost()
    seconds = ()
    if vectors:
        W: Tensor = matrix_view(old).split(old.weight)[0]  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
        x = torch.ones(vectors, n, dtype=W.dtype, device=W.device)
        calls = (lambda: nn.functional.linear(x, W, linear.bias)), (lambda: linear(x))
        seconds = tuple(fastest(call, REPEATS, W.device) for call in calls)
    return Exchange(name, recipe, error, (m * n, now.params), (m * n, now.macs), seconds)
