"""The parts of layers of `transformers`, which is not imported: they are known by their names."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.nn._anatomy import Part, Parts, Role, parts, runs_as, shape_of
from matrigami.nn._layers import affine, scale_and_shift, weight_part
from matrigami.nn._taps import constant_use, last_features, linear_use
from matrigami.operators import stacked_view, transposed_view

PACKAGE = "transformers."
"""Where the classes are."""


def as_it_was(linear: nn.Linear, kind: type[nn.Module]) -> nn.Module:
    """A dense layer as the kind that it was: a `Conv1D` has its weight transposed."""
    if not (kind.__module__.startswith(PACKAGE) and kind.__name__ == "Conv1D"):
        return linear
    new: Any = kind(linear.out_features, linear.in_features)
    new.weight = nn.Parameter(linear.weight.detach().mT.contiguous())
    new.bias = nn.Parameter(linear.bias.detach())
    return new


def _is(module: nn.Module, ending: str) -> bool:
    """Whether a class of the package, by the end of its name, defines what a call computes."""
    return any(
        kind.__module__.startswith(PACKAGE) and kind.__name__.endswith(ending)
        for kind in type(module).__mro__
        if runs_as(module, kind) and hasattr(module, "weight")
    )


@parts.register(where=lambda layer: _is(layer, "Conv1D"))
def _(layer: nn.Module) -> Parts:
    """GPT-2's linear layer, whose weight is stored as `(in, out)`."""
    view = transposed_view(shape_of(layer))
    tap = partial(linear_use, transposed=True)
    return {
        "weight": weight_part(Role.MATRIX, view, tap, features=1),
        "bias": Part(Role.BIAS, tap=constant_use, features=1),
    }


@parts.register(where=lambda layer: _is(layer, "FalconLinear"))
def _(layer: nn.Module) -> Parts:
    """An `nn.Linear` whose bias is added in a second step."""
    view = stacked_view(shape_of(layer))
    return affine(weight_part(Role.MATRIX, view, linear_use, features=1))


@parts.register(where=lambda layer: _is(layer, "RMSNorm"))
def _(layer: nn.Module) -> Parts:
    """`w x / rms(x)`, or `(1 + w) x / rms(x)`: the gradient of `w` is the same."""
    (d,) = shape_of(layer)
    eps = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", 0.0)

    def normalise(x: Tensor) -> Tensor:
        """In single precision at least, as the layer does."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    return scale_and_shift(layer, normalise, partial(last_features, d), last=1)
