"""A layer as a matrix: its weights, the vectors that they multiply, and their output gradients.

What a layer is, its anatomy says; here it is read.

Shapes: m = outputs, n = inputs, N = vectors (tokens, positions).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from matrigami.nn import Use, matrix_view, parts
from matrigami.operators import BlockView


def weight(module: nn.Module) -> Inexact[Tensor, "m n"]:
    """The weights of a layer as a matrix, outputs by inputs (of a convolution: by taps)."""
    W: Any = module.weight
    return _view(module).split(W.detach())[0]


def key_of(name: str) -> str:
    """The weight of a layer by its name, which is empty for a model that is one layer."""
    return f"{name}.weight" if name else "weight"


@torch.no_grad()
def set_weight(module: nn.Module, W: Float[Tensor, "m n"]) -> None:
    """Overwrite the weights of a layer, in their own type."""
    old: Any = module.weight
    old.copy_(_view(module).merge(W[None]))


def untouched(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Shares of all numbers of the model that are in matrices of no chosen layer, by name."""
    own = {id(layer.weight) for layer in layers.values()}
    every = dict(model.named_parameters())
    whole = sum(p.numel() for p in every.values())
    return {n: p.numel() / whole for n, p in every.items() if p.ndim > 1 and id(p) not in own}


def rows(module: nn.Module, x: Tensor) -> Float[Tensor, "N n"]:
    """The vectors that the matrix of a layer multiplies, example by example."""
    inputs: Any = _use(module, x, None).inputs
    return inputs.reshape(-1, inputs.shape[-1])


def gradient_rows(module: nn.Module, x: Tensor, g: Tensor) -> Float[Tensor, "N m"]:
    """The gradients of the outputs, one row for each vector of `rows`."""
    gradients: Any = _use(module, x, g[None]).gradients
    return gradients.reshape(-1, gradients.shape[-1])


def _use(module: nn.Module, x: Tensor, g: Tensor | None) -> Use:
    """What the matrix of a layer sees."""
    tap: Any = parts(module)["weight"].tap
    return tap(x, g)


def _view(module: nn.Module) -> BlockView:
    """How the weight is a matrix."""
    view = matrix_view(module)
    if view is None:
        raise ValueError(
            f"weight({type(module).__name__}): the layer is not one matrix.\n"
            "Known are Linear, convolutions of one group, and Conv1D."
        )
    return view
