"""What each parameter of a layer is, said once by the layer and read by the whole library.

Learning rates, optimisers and curvature all need to know how a parameter is a stack of matrices,
with how many inputs and outputs, and what its blocks see in a pass. `parts` answers for a layer;
it is open, so that a layer registers once, beside itself. `anatomy` walks over a model.

Shapes: b = blocks, N = examples, K = columns of gradients (classes, or drawn labels), S = shared
positions, i = inputs and o = outputs of a block.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from matrigami.operators import BlockView, Fan, LinearOperator, OpenFunction

RUNNING = ("forward", "_conv_forward")
"""Methods that a subclass must not replace: a rule is for the computation that it knows."""


class Role(StrEnum):
    """What a parameter does in a model."""

    MATRIX = "hidden matrix"
    CORE = "structured core"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    TIED = "tied head"
    HEAD = "output head"
    NORM = "norm"
    BIAS = "bias"
    GAIN = "gain"
    ELEMENTWISE = "elementwise"


class OneHot(NamedTuple):
    """Inputs that are unit vectors: row `u` is the unit vector `indices[u]` of `size`.

    Args:
        indices: Of each row.
        size: Length of the vectors.
        examples: The example of each row.
        number: How many examples there are.
    """

    indices: Tensor
    size: int
    examples: Tensor
    number: int


class Use(NamedTuple):
    """Inputs and gradients of one use: `dW[n, k] = sum_s gradients[n, k, s] inputs[n, s].T`.

    Args:
        inputs: What the blocks see.
        gradients: What comes back, or None where there was no backward pass.
        transposed: The parameter stores `(i, o)` matrices instead of `(o, i)`.
        rows: How many of the inputs of a block count, if not all: the others are zero.
    """

    inputs: "Float[Tensor, 'b N S i'] | OneHot"
    gradients: Float[Tensor, "b N K S o"] | None
    transposed: bool = False
    rows: int | None = None


Tap = Callable[[Tensor, Tensor | None], Use]
"""One use, from the input of a layer `(N, ...)` and gradients by its output `(K, N, ...)`."""


class Whole(NamedTuple):
    """The dense matrix that a parameter is a factor of.

    Args:
        inputs: Its columns.
        outputs: Its rows.
        factors: How many parameters make it.
        growth: The powers of the width with which inputs and outputs grow.
        product: The matrix as a value of the parameters themselves, if it is that of a layer.
    """

    inputs: int
    outputs: int
    factors: int = 1
    growth: tuple[int, int] = (1, 1)
    product: LinearOperator | None = None


@dataclass(frozen=True)
class Part:
    """What one parameter is.

    Parameters with one `tap` share a block: the scale and the shift of a norm.

    Args:
        role: What it does.
        blocks: How it is a stack of matrices; None: it is not one, or a stack of vectors.
        fan: Inputs and outputs of a block, for the learning rate; None: it keeps its rate.
        whole: The matrix that it is a factor of; by default the one of `fan`.
        tap: How its inputs and gradients are read; None: curvature refuses it.
        column_of: The weight of which it is one more column, whose input is always one: its bias.
        refused: Why there is no tap, after the name of the layer: "with max_norm".
        features: How many of the last axes of an input of the layer are features; all before are
            examples and positions, in any order. None: the first axis is of examples.
    """

    role: Role
    blocks: BlockView | None = None
    fan: Fan | None = None
    whole: Whole | None = None
    tap: Tap | None = None
    column_of: str = ""
    refused: str = ""
    features: int | None = None

    @property
    def is_seen(self) -> bool:
        """Whether its inputs and gradients can be read."""
        return self.tap is not None or self.column_of != ""


Parts = dict[str, Part]
"""The part of each parameter, by its name in the module (`out_proj.weight` of a child's)."""


def _as_it_runs(function: OpenFunction[..., Any], module: nn.Module) -> Parts:
    """The rule of the computation that runs; what is left has at most one axis, or is unknown."""
    found = next((rule(module) for rule in _rules(function, module)), {})
    known = _stored(module, found)
    own = module.named_parameters(recurse=False)
    rest = {name: Part(Role.ELEMENTWISE) for name, p in own if name not in known and p.ndim < 2}
    return known | rest


def _rules(function: OpenFunction[..., Any], module: nn.Module) -> Iterator[Callable[..., Parts]]:
    """The rules for a module, of the class first whose methods are those that run."""
    for kind in type(module).__mro__:
        if kind is nn.Module or runs_as(module, kind):
            yield from (r.function for r in function.rules.get(kind, ()) if r.holds((module,), {}))


def runs_as(module: nn.Module, kind: type) -> bool:
    """Whether a call of the module is the computation that a class defines."""
    for name in RUNNING:
        method, patched = getattr(kind, name, None), vars(module).get(name)
        if getattr(type(module), name, None) is not method:
            return False
        if patched is not None and getattr(inspect.unwrap(patched), "__func__", None) != method:
            return False  # a wrapper around the method itself, such as accelerate's, is fine
    return True


@partial(OpenFunction, around=_as_it_runs)
def parts(module: nn.Module) -> Parts:  # noqa: ARG001 - the default knows nothing
    """What each parameter of a layer is, by its name in the layer.

    The rule is that of the class whose `forward` runs: a subclass without one of its own is its
    parent, one with its own is another layer. A parameter of at most one axis is elementwise where
    no rule says more; a matrix without a rule is left out. Register a layer of your own with
    `@parts.register`, and check it with `matrigami.testing.check_layer`.

    Args:
        module: The layer.

    Returns:
        A `Part` for each parameter; some may belong to children that the layer uses without calling
        them.

    Examples:
        >>> found = parts(nn.Linear(3, 2))
        >>> found["weight"].blocks.stack, found["bias"].role.value
        ((1, 2, 3), 'bias')
    """
    return {}


PARAMETRISED = "with a parametrised weight"
"""Why curvature does not read a weight that is computed from others, nor its bias."""


def _stored(module: nn.Module, found: Mapping[str, Part]) -> Parts:
    """The parts of the parameters that are there, those of a parametrised one as they are kept."""
    there = dict(module.named_parameters())
    known: Parts = {}
    for name, part in found.items():
        if is_parametrized(module, name):
            known |= _originals(module, name, part)
        elif name in there and part.column_of and part.column_of not in there:
            known[name] = replace(part, column_of="", refused=PARAMETRISED)
        elif name in there:
            known[name] = part
    return known


def _originals(module: Any, name: str, part: Part) -> Parts:
    """What a parametrised weight is computed from: itself, and factors of its rows or columns."""
    shape, known = shape_of(module, name), {}
    hidden = replace(part, tap=None, column_of="", refused=PARAMETRISED)
    for key, p in module.parametrizations[name].named_parameters(recurse=False):
        if tuple(p.shape) == shape:
            known[f"parametrizations.{name}.{key}"] = hidden
        elif p.numel() <= max(shape):
            known[f"parametrizations.{name}.{key}"] = Part(Role.GAIN)
    return known


def shape_of(module: Any, name: str = "weight") -> tuple[int, ...]:
    """The shape of a tensor of a layer; a parametrised one is not computed for it."""
    if is_parametrized(module, name):
        kept = module.parametrizations[name].parameters(recurse=False)
        return max((tuple(p.shape) for p in kept), key=math.prod)
    return tuple(getattr(module, name).shape)


class Entry(NamedTuple):
    """A parameter at one place of a model.

    Args:
        name: Its name there.
        layer: Name of the layer that it belongs to.
        parameter: The parameter.
        part: What it is.
    """

    name: str
    layer: str
    parameter: Tensor
    part: Part


def anatomy(model: nn.Module, asked: str, *, elementwise: Collection[str] = ()) -> list[Entry]:
    """The parameters of a model, in its order; a tied one at each of its places.

    Args:
        model: The model.
        asked: Who asks, for the message.
        elementwise: Names of parameters that are not to be read as matrices.

    Raises:
        ValueError: If it is not known what a trainable parameter is; an unknown frozen one is left
            out.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> [(e.name, e.part.role.value) for e in anatomy(model, "a doctest")][1:3]
        [('0.bias', 'bias'), ('1.weight', 'norm')]
    """
    entries: list[Entry] = []
    claimed: dict[str, tuple[str, Part]] = {}
    for prefix, module in model.named_modules():
        found, missing = parts(module), []
        claimed |= _claims(prefix, found)
        for name, p in module.named_parameters(recurse=False):
            path = _path(prefix, name)
            layer, part = claimed.get(path, (prefix, found.get(name)))
            part = LISTED if path in elementwise else part
            if part is not None:
                entries.append(Entry(path, layer, p, part))
            elif p.requires_grad:
                missing.append(name)
        if missing:
            raise ValueError(refusal(asked, prefix, module, missing))
    return entries


def unread(model: nn.Module) -> list[str]:
    """The trainable parameters of which it is not known what they are: `anatomy` refuses them.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> model.register_parameter("scale", nn.Parameter(torch.ones(4, 4)))
        >>> unread(model)
        ['scale']
    """
    claimed: dict[str, tuple[str, Part]] = {}
    names = []
    for prefix, module in model.named_modules():
        found = parts(module)
        claimed |= _claims(prefix, found)
        own = module.named_parameters(recurse=False)
        free = [_path(prefix, name) for name, p in own if p.requires_grad and name not in found]
        names += [path for path in free if path not in claimed]
    return names


def _claims(prefix: str, found: Parts) -> dict[str, tuple[str, Part]]:
    """What a layer says of parameters of its children, and which layer each of them belongs to."""
    claimed = {}
    for name, part in found.items():
        owner = name.rpartition(".")[0]
        if owner:
            parametrised = owner.startswith("parametrizations.")
            layer = prefix if parametrised else _path(prefix, owner)
            claimed[_path(prefix, name)] = (layer, part)
    return claimed


LISTED = Part(Role.ELEMENTWISE)
"""What a parameter is that is listed as elementwise."""


def refusal(asked: str, layer: str, module: nn.Module, names: Collection[str]) -> str:
    """What every reader says of parameters that it cannot read: the layer, its names, a way out."""
    return (
        f"{asked}: unknown parameters of {layer or 'the model itself'}, "
        f"{described(module)}: {', '.join(names)}.\n"
        "What they are, or how they enter the model, is not known.\n"
        "Register the layer with @matrigami.nn.parts.register, freeze them with "
        "requires_grad_(False), or list them in elementwise=[...] of rates and optimisers."
    )


def described(module: nn.Module) -> str:
    """The kind of a module, and why its inputs and gradients cannot be read, if there is a why."""
    reasons = {part.refused for part in parts(module).values() if part.refused}
    kind = type(module).__name__
    return " ".join(["an" if kind[0] in "AEIO" else "a", kind, *sorted(reasons)[:1]])


def _path(prefix: str, name: str) -> str:
    """The name in the model."""
    return f"{prefix}.{name}" if prefix else name
