"""A layer as a matrix: its weights, the vectors that they multiply, and their output gradients.

What a layer is, its anatomy says; here it is read.

Shapes: m = outputs, n = inputs, N = vectors (tokens, positions).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from matrigami.nn import Patterns, StructuredLinear, Use, chosen, matrix_view, parts
from matrigami.operators import BlockView, LinearOperator, contractions


def with_structured(
    model: nn.Module, targets: Patterns | None = None, ignore: Patterns = ()
) -> dict[str, nn.Module]:
    """The layers of `chosen` and the structured ones, but those that share a tensor with others."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    structured = {m for m in model.modules() if isinstance(m, StructuredLinear)}
    alone = {m for m in structured if all(uses[id(p)] == 1 for p in tensors_of(m).values())}
    return chosen(model, targets, ignore, beside=alone)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """What the matrix of a layer is made of: its weight, or the tensors of a structured one."""
    names = module.factor_names if isinstance(module, StructuredLinear) else ("weight",)
    return {name: getattr(module, name) for name in names}


def view_of(module: nn.Module, tensor: str) -> BlockView | None:
    """How a tensor of a layer is a stack of matrices; None if it is not known."""
    if isinstance(module, StructuredLinear) and tensor in module.factor_names:
        at = module.factor_names.index(tensor)
        return contractions(module._template)[at].matrix.view
    return matrix_view(module) if tensor == "weight" else None


def matrix_of(module: nn.Module, tensor: str) -> Inexact[Tensor, "bm n"]:
    """A tensor of a layer as a matrix, of a stack one below the other."""
    view: Any = view_of(module, tensor)
    return view.split(getattr(module, tensor).detach()).flatten(0, 1)


def weight(module: nn.Module) -> Inexact[Tensor, "m n"]:
    """The weights of a layer as a matrix, outputs by inputs (of a convolution: by taps)."""
    W: Any = module.weight
    return (
        W.detach() if isinstance(module, StructuredLinear) else _view(module).split(W.detach())[0]
    )


def key_of(name: str, tensor: str = "weight") -> str:
    """A tensor of a layer by its name, which is empty for a model that is one layer."""
    return f"{name}.{tensor}" if name else tensor


@torch.no_grad()
def set_weight(module: nn.Module, W: Float[Tensor, "m n"]) -> None:
    """Overwrite the weights of a layer, in their own type."""
    old: Any = module.weight
    old.copy_(_view(module).merge(W[None]))


@torch.no_grad()
def set_matrices(module: nn.Module, matrices: Mapping[str, LinearOperator]) -> None:
    """Overwrite tensors of a layer by those that `matrix_of` is of, in their own type."""
    for name, A in matrices.items():
        view: Any = view_of(module, name)
        getattr(module, name).copy_(view.merge(A.dense().reshape(view.stack)))


def untouched(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Shares of all numbers of the model that are in matrices of no chosen layer, by name."""
    own = {id(t) for layer in layers.values() for t in tensors_of(layer).values()}
    every = dict(model.named_parameters())
    whole = sum(p.numel() for p in every.values())
    return {n: p.numel() / whole for n, p in every.items() if p.ndim > 1 and id(p) not in own}


def rows(module: nn.Module, x: Tensor) -> Float[Tensor, "N n"]:
    """The vectors that the matrix of a layer multiplies, example by example."""
    inputs: Any = x if isinstance(module, StructuredLinear) else _use(module, x, None).inputs
    return inputs.reshape(-1, inputs.shape[-1])


def gradient_rows(module: nn.Module, x: Tensor, g: Tensor) -> Float[Tensor, "N m"]:
    """The gradients of the outputs, one row for each vector of `rows`."""
    gradients: Any = (
        g if isinstance(module, StructuredLinear) else _use(module, x, g[None]).gradients
    )
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
