"""What each parameter of a module is: decided by the module that owns it, never by a shape.

`routes` is open: register a rule for a module of your own with `@routes.register`.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import singledispatch
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # the base of all batch and instance norms
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from matrigami.nn import StructuredLinear
from matrigami.operators import contractions, named_tensors, with_tensors
from matrigami.optim._view import (
    MatrixView,
    convolution,
    core,
    gates,
    transposed_convolution,
    view,
    whole,
)


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
    LISTED = "elementwise"


class Route(NamedTuple):
    """A role, and how the parameter is a stack of matrices; None: it is not one."""

    role: Role
    view: MatrixView | None = None


Routes = dict[str, Route]
"""The route of each of a module's own parameters, by its name in the module."""


@singledispatch
def routes(module: nn.Module) -> Routes:
    """The routes of a module's own parameters.

    Raises:
        ValueError: If the module has parameters and no rule.

    Examples:
        >>> found = routes(nn.Linear(3, 2))
        >>> found["weight"].view.stack, found["bias"].role.value
        ((1, 2, 3), 'bias')
    """
    names = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    if names:
        raise ValueError(
            f"A plan was asked for with the parameters {names} of a {type(module).__name__}.\n"
            "Whether they are matrices, and with which rows and columns, is not known.\n"
            "List their names in plan(elementwise=...), or write a rule with @routes.register."
        )
    return {}


def _own(module: nn.Module, matrix: Callable[[Tensor], MatrixView | None], role: Role) -> Routes:
    """A weight that is a matrix, and a bias."""
    found = {"weight": Route(role, matrix(module.get_parameter("weight")))}
    return found | {"bias": Route(Role.BIAS)}


@routes.register
def _(module: nn.Linear) -> Routes:
    return _own(module, lambda W: whole(tuple(W.shape)), Role.MATRIX)


@routes.register
def _(module: StructuredLinear) -> Routes:
    """Each core as the part that it plays in the product; gains and the bias are not matrices."""
    A = module.matrix()
    empty = with_tensors(A, iter([t.detach().to("meta") for t in named_tensors(A).values()]))
    parts = contractions(empty)
    found = {name: Route(Role.GAIN) for name, _ in module.named_parameters(recurse=False)}
    found |= {
        name: Route(Role.CORE, core(part.matrix))
        for name, part in zip(module.factor_names, parts, strict=True)
    }
    return found | {"bias": Route(Role.BIAS)}


@routes.register
def _(module: _ConvNd) -> Routes:
    return _own(module, lambda W: convolution(tuple(W.shape), module.groups), Role.CONVOLUTION)


@routes.register
def _(module: _ConvTransposeNd) -> Routes:
    def matrix(W: Tensor) -> MatrixView | None:
        """Inputs come first."""
        return transposed_convolution(tuple(W.shape), module.groups)

    return _own(module, matrix, Role.CONVOLUTION)


@routes.register
def _(module: nn.Bilinear) -> Routes:
    def matrix(W: Tensor) -> MatrixView | None:
        """One form for each output."""
        return view(tuple(W.shape), tuple(W.shape), (0, 1, 2), (1, 1, 1))

    return _own(module, matrix, Role.MATRIX)


@routes.register
def _(module: nn.MultiheadAttention) -> Routes:
    """Queries, keys and values are three matrices, in one tensor or in three."""
    found: Routes = {}
    for name, p in module.named_parameters(recurse=False):
        if p.ndim == 2:
            count = 3 if name == "in_proj_weight" else 1
            found[name] = Route(Role.MATRIX, gates(tuple(p.shape), count))
        else:
            found[name] = Route(Role.BIAS)
    return found


@routes.register
def _(module: nn.RNNBase) -> Routes:
    """The weights of the gates are stored one below the other."""
    count = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    found: Routes = {}
    for name, p in module.named_parameters(recurse=False):
        stacked = 1 if name.startswith("weight_hr") else count  # the projection has no gates
        matrix = name.startswith("weight")
        route = Route(Role.MATRIX, gates(tuple(p.shape), stacked)) if matrix else Route(Role.BIAS)
        found[name] = route
    return found


@routes.register(nn.Embedding)
@routes.register(nn.EmbeddingBag)
def _(_module: nn.Module) -> Routes:
    return {"weight": Route(Role.EMBEDDING)}


@routes.register(_NormBase)
@routes.register(nn.LayerNorm)
@routes.register(nn.GroupNorm)
@routes.register(nn.RMSNorm)
def _(_module: nn.Module) -> Routes:
    return {"weight": Route(Role.NORM), "bias": Route(Role.NORM)}


@routes.register
def _(_module: nn.PReLU) -> Routes:
    return {"weight": Route(Role.GAIN)}
