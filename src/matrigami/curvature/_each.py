"""Gradients of single examples, from what the layers saw: one pass for all of a batch.

Shapes: p = parameters in all, N = examples, K = columns, S = shared positions, b = blocks, i =
inputs, o = outputs, l = rows and r = columns of a parameter's matrix.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad

from matrigami.curvature._beside import refuse_other_uses
from matrigami.curvature._blocks import Blocks, SharedInputs, by_block, with_gradients
from matrigami.curvature._examples import Finder
from matrigami.curvature._moments import known_gradients
from matrigami.curvature._objective import Objective, sums
from matrigami.curvature._passes import one_tensor, refuse_shapes
from matrigami.curvature._tape import (
    LayerCall,
    find_layers,
    pull_back,
    recording,
    refuse_not_finite,
)
from matrigami.nn import OneHot, Use

Sizes = Mapping[str, tuple[int, ...]]
"""The shapes of some parameters, in the order of a vector."""


class Seen(NamedTuple):
    """One forward pass: outputs, the calls of layers, and where the examples are in each."""

    outputs: Tensor
    calls: list[LayerCall]
    places: Any

    def pulled(self, columns: Float[Tensor, "K *outputs"]) -> Blocks:
        """What each block saw, with the gradients of some combinations of the outputs."""
        pull_back(self.outputs, self.calls, columns)
        return by_block(with_gradients(self.calls, self.places), SharedInputs())


class Observer:
    """Runs a model and tells the examples of its batches apart.

    Args:
        model: The model.
        names: The parameters that matter.
    """

    def __init__(self, model: nn.Module, names: Sizes) -> None:
        known = dict(model.named_parameters())
        self.model, self.finder = model, Finder(alone=False)
        self.layers = find_layers(model, joint=True, wanted=[known[n] for n in names])

    def __call__(self, inputs: Any) -> Seen:
        """One forward pass.

        Raises:
            ValueError: If the outputs of one example depend on the others.
        """
        with recording(self.layers) as calls:
            outputs = one_tensor(self.model(inputs))
        if not self.finder.known:
            refuse_other_uses(outputs, calls)
        found = self.finder.find(inputs, outputs, calls)
        if found.outputs.examples < len(outputs):
            raise ValueError(
                f"gradients of single examples: the outputs are {tuple(outputs.shape)}.\n"
                "Some layer sees them together (batch statistics, positions on the first axis, "
                "a table that all share).\nGive one example a batch, or outputs (N, ...)."
            )
        return Seen(outputs, calls, found.inputs)


def losses(target: Objective, names: Sizes) -> Iterator[Blocks]:
    """What each block saw, batch by batch, with the gradient of the loss of each example.

    The loss of an example is the sum of its terms, whether the loss averages or not.
    """
    observe = Observer(target.model, names)
    for i, (inputs, targets, weight) in enumerate(target):
        seen = observe(inputs)
        refuse_shapes(target.loss, seen.outputs.detach(), targets)
        many = 1.0 if sums(target.loss) else weight * target.total
        g = grad(lambda f, y=targets: target.loss(f, y))(seen.outputs.detach())
        blocks = seen.pulled(many * g[None])
        refuse_not_finite(seen.calls, i)
        yield blocks


def vectors(blocks: Blocks, sizes: Sizes) -> Float[Tensor, "p c"]:
    """The gradients of all parameters, a column for each example and each of its columns."""
    found: dict[str, Tensor] = {}
    for names, parts in blocks.items():
        M = torch.stack([gradient_matrices(use) for use in parts]).sum(0).flatten(1, 2)
        rows = math.prod(sizes[names[-1]]) if len(names) > 1 else 1
        grid = M.movedim(1, -1).reshape(rows, -1, M.shape[1])
        widths = [math.prod(sizes[name]) // rows for name in names]
        for name, part in zip(names, grid.split(widths, 1), strict=True):
            found[name] = part.flatten(0, 1)
    like = next(iter(found.values()))
    zeros = {name: like.new_zeros(math.prod(s), like.shape[1]) for name, s in sizes.items()}
    return torch.cat(list((zeros | found).values()))


def gradient_matrices(use: Use) -> Float[Tensor, "b N K l r"]:
    """`sum_s g_nks a_ns.T` of each example, as the parameter stores it."""
    g, inputs = known_gradients(use), use.inputs
    if isinstance(inputs, OneHot):
        at = inputs.examples * inputs.size + inputs.indices
        rows = g.new_zeros(inputs.number * inputs.size, *g.shape[2:])
        dW = rows.index_add_(0, at, g[0]).unflatten(0, (inputs.number, -1)).sum(3)
        dW = dW.movedim(1, -1)[None]  # (1, N, K, o, i)
    else:
        dW = g.mT @ inputs[:, :, None].to(g)
    return dW.mT if use.transposed else dW


def paired(
    blocks: Blocks, X: Mapping[str, Float[Tensor, "..."]], room: int
) -> Float[Tensor, "N q"]:
    """`<X_q, dW_n>` of every example with some tensors of the parameters, without any `dW_n`.

    Args:
        blocks: What each block saw, one column.
        X: For each parameter its tensors, `(*shape, q)`.
        room: Numbers that are held at once.
    """
    total: Tensor | float = 0.0
    for names, parts in blocks.items():
        last = X[names[-1]]
        rows = last.numel() // last.shape[-1] if len(names) > 1 else 1
        grid = torch.cat([X[name].reshape(rows, -1, last.shape[-1]) for name in names], 1)
        for use in parts:
            total = total + _scores(use, grid, room)
    return total  # pyright: ignore[reportReturnType]


def _scores(use: Use, grid: Tensor, room: int) -> Float[Tensor, "N q"]:
    """Those of one use: `sum_s g_s.T X a_s`."""
    g, inputs, q = known_gradients(use).sum(2), use.inputs, grid.shape[-1]
    b, o = len(g), g.shape[-1]
    i = inputs.size if isinstance(inputs, OneHot) else inputs.shape[-1]
    shape = (b, i, o, q) if use.transposed else (b, o, i, q)
    M = grid.reshape(shape) if use.transposed else grid.reshape(shape).transpose(1, 2)
    if isinstance(inputs, OneHot):
        each = torch.einsum("to,toq->tq", g[0, :, 0], M[0][inputs.indices])
        return each.new_zeros(inputs.number, q).index_add_(0, inputs.examples, each)
    size = max(1, room // max(b * inputs.shape[2] * o * q, 1))
    found = []
    for a, h in zip(inputs.split(size, 1), g.split(size, 1), strict=True):
        image = (a.flatten(1, 2).to(M) @ M.flatten(2)).unflatten(-1, (o, q))
        each = torch.einsum("bto,btoq->tq", h.flatten(1, 2), image)
        found.append(each.unflatten(0, (a.shape[1], -1)).sum(1))
    return torch.cat(found)
