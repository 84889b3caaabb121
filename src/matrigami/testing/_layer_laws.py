"""The laws of a layer: what its anatomy says is what it does.

Shapes: N = examples, K = columns of gradients, b = blocks, i = inputs and o = outputs of a block.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.nn import OneHot, Role, Use, anatomy, parts, uses
from matrigami.testing._expectations import expect, expect_close, expect_refusal
from matrigami.testing._suite import enforce

Inputs = tuple[Any, ...]
"""What a layer is called with."""

MATRICES = frozenset({Role.MATRIX, Role.CORE, Role.CONVOLUTION, Role.HEAD})
"""Roles of stacks of matrices."""

ROUNDING = 1e-10
"""Relative error of a sum in double precision."""


def every_parameter_has_one_role(layer: nn.Module, _inputs: Inputs) -> None:
    """None is left out, none is named twice, and none is made up."""
    named = sorted(entry.name for entry in anatomy(layer, "check_layer"))
    there = sorted(name for name, _ in layer.named_parameters(remove_duplicate=False))
    expect(named == there, f"roles of {named}, but the parameters are {there}")
    unknown = set(parts(layer)) - set(there)
    expect(not unknown, f"{sorted(unknown)} are no parameters")


def roles_say_what_is_scaled(layer: nn.Module, _inputs: Inputs) -> None:
    """Matrices have a fan, and only they have blocks."""
    for name, _, _, part in anatomy(layer, "check_layer"):
        matrix = part.role in MATRICES
        expect(matrix == (part.fan is not None), f"{name}, {part.role.value}: the fan {part.fan}")
        expect(matrix or part.blocks is None, f"{name}, {part.role.value}, has blocks")
        expect(part.fan is None or min(part.fan[:2]) > 0, f"{name} has the fan {part.fan}")


def blocks_invert(layer: nn.Module, _inputs: Inputs) -> None:
    """A parameter is its stack of matrices, and back; vectors are no matrices."""
    for name, _, p, part in anatomy(layer, "check_layer"):
        view = part.blocks
        if view is not None:
            M = view.split(p.detach())
            expect(view.two_sided, f"the blocks of {name} are vectors")
            expect(tuple(M.shape) == view.stack, f"{name} makes {tuple(M.shape)}, not {view.stack}")
            expect(torch.equal(view.merge(M), p), f"the blocks of {name} do not make it again")


def taps_make_the_gradient_of_each_example(layer: nn.Module, inputs: Inputs) -> None:
    """`sum_s g_s a_s.T` is what autograd gives for each example, with the bias joint or apart."""
    layer, inputs = doubled(layer, inputs)
    outputs, columns = one_by_one(layer, inputs)
    for joint in (True, False):
        for names, use in _seen(layer, inputs, columns, joint).items():
            found = gradients(use, [layer.get_parameter(name) for name in names])
            for name, dW in zip(names, found, strict=True):
                exact = _autograd(outputs, layer.get_parameter(name), columns)
                expect_close(dW, exact, f"the gradients of {name}", ROUNDING)


def taps_are_the_sides_of_the_blocks(layer: nn.Module, inputs: Inputs) -> None:
    """The rows and columns of a block are the outputs and inputs of its tap."""
    layer, inputs = doubled(layer, inputs)
    outputs, columns = one_by_one(layer, inputs)
    found = _seen(layer, inputs, columns, False)
    for names, use in found.items():
        view = parts(layer)[names[0]].blocks
        if view is not None:
            exact = _autograd(outputs, layer.get_parameter(names[0]), columns)
            for dW, M in zip(outer(use), exact, strict=True):
                expect_close(dW, view.split(M), f"the blocks of {names[0]}", ROUNDING)


def taps_read_inputs_alone(layer: nn.Module, inputs: Inputs) -> None:
    """Without gradients the inputs are the same, and types and devices are those of the input."""
    _, columns = one_by_one(layer, inputs)
    with_gradients = _seen(layer, inputs, columns, False)
    for names, use in _seen(layer, inputs, None, False).items():
        first, second = use.inputs, with_gradients[names].inputs
        expect(use.gradients is None, f"{names} have gradients without a backward pass")
        if isinstance(first, OneHot) or isinstance(second, OneHot):
            expect(torch.equal(first[0], second[0]), f"the inputs of {names} depend on gradients")
            continue
        expect(first.dtype == columns.dtype, f"the inputs of {names} are {first.dtype}")
        expect(first.device == columns.device, f"the inputs of {names} are on {first.device}")
        expect_close(_moment(first), _moment(second), f"the inputs of {names} alone", 1e-5)


def features_are_the_last_axes(layer: nn.Module, inputs: Inputs) -> None:
    """If it is said how many axes are features, examples and positions may be any of the others."""
    layer, inputs = doubled(layer, inputs)
    said = {part.features for part in parts(layer).values() if part.is_seen} - {None}
    if said and isinstance(inputs[0], torch.Tensor):
        x = inputs[0]
        (features,) = said
        expect(0 <= features < x.ndim, f"{features} axes of {x.ndim} are features")
        with torch.no_grad():
            found, wanted = (layer(z, *inputs[1:]) for z in (x[:, None], x))
        expect_close(found, wanted[:, None], "the output with one more axis")


def another_forward_is_another_layer(layer: nn.Module, _inputs: Inputs) -> None:
    """A subclass is its parent, unless it computes something else: then nothing is known."""
    same, other = copy.deepcopy(layer), copy.deepcopy(layer)
    same.__class__ = type("Renamed", (type(layer),), {})
    other.__class__ = type("Other", (type(layer),), {"forward": lambda *_: None})
    roles = {name: part.role for name, part in parts(layer).items()}
    expect({n: p.role for n, p in parts(same).items()} == roles, "a subclass is another layer")
    known = {name for name, part in parts(other).items() if part.role is not Role.ELEMENTWISE}
    expect(not known, f"with another forward it still knows {sorted(known)}")
    if any(p.ndim > 1 for p in layer.parameters(recurse=False)):
        expect_refusal(lambda: anatomy(other, "check_layer"), "another forward")


LAYER_LAWS = (
    every_parameter_has_one_role,
    roles_say_what_is_scaled,
    blocks_invert,
    taps_make_the_gradient_of_each_example,
    taps_are_the_sides_of_the_blocks,
    taps_read_inputs_alone,
    features_are_the_last_axes,
    another_forward_is_another_layer,
)
"""Every law of a layer."""


def check_layer(
    layer: nn.Module, *inputs: Any, laws: Iterable[Callable[..., None]] = LAYER_LAWS
) -> None:
    """Check what `nn.parts` says of a layer against what the layer does.

    Args:
        layer: The layer, with parameters that are neither zero nor one.
        inputs: What it is called with, at least two examples first.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken, or the layer is unknown; the message names the law.

    Examples:
        >>> check_layer(nn.Linear(3, 2), torch.randn(4, 3))
    """
    for law in laws:
        enforce(law, str(layer), layer, inputs)


def doubled(layer: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """The same in double precision."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return copy.deepcopy(layer).double(), tuple(wide)


def one_by_one(layer: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output, and random gradients by it of one example after the other, `(N, N, ...)`."""
    outputs = layer(*inputs)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    G = torch.randn_like(outputs)
    mask = torch.eye(len(G), dtype=G.dtype, device=G.device)
    return outputs, mask.view(len(G), len(G), *[1] * (G.ndim - 1)) * G


def _seen(layer: nn.Module, inputs: Inputs, columns: Tensor | None, joint: bool) -> dict[Any, Use]:
    """What the layer says of one call; nothing of one that is not read."""
    if not any(part.is_seen for part in parts(layer).values()):
        return {}
    with torch.no_grad():
        return uses(layer, inputs[0], columns, joint)


def _moment(X: Tensor) -> Tensor:
    """The mean of `a a.T` over examples and positions."""
    flat = X.flatten(1, 2)
    return flat.mT @ flat / flat.shape[1]


def outer(use: Use) -> Tensor:
    """`dW` of example `k` by the gradients of column `k`, as `(K, b, o, i)`."""
    if use.gradients is None:
        raise AssertionError("there are no gradients")
    if isinstance(use.inputs, OneHot):  # pairs of an example and a token; of others it is zero
        X = nn.functional.one_hot(use.inputs.indices, use.inputs.size).to(use.gradients)
        return torch.einsum("bnkso,ni->kboi", use.gradients, X)
    own = use.gradients.diagonal(0, 1, 2)  # b s o n
    return torch.einsum("bson,bnsi->nboi", own, use.inputs)


def gradients(use: Use, parameters: list[nn.Parameter]) -> list[Tensor]:
    """`dW` of each parameter `(K, ...)`; the block of several is `[weight bias]`, row by row."""
    dW = outer(use)
    dW = dW.mT if use.transposed else dW
    rows = parameters[-1].numel() if len(parameters) > 1 else 1
    widths = [p.numel() // rows for p in parameters]
    split = dW.reshape(len(dW), rows, -1).split(widths, -1)
    return [t.reshape(len(dW), *p.shape) for t, p in zip(split, parameters, strict=True)]


def _autograd(outputs: Tensor, p: nn.Parameter, columns: Tensor) -> Tensor:
    """The gradient of a parameter for each column."""
    found = [torch.autograd.grad(outputs, p, c, retain_graph=True)[0] for c in columns]
    return torch.stack(found)
