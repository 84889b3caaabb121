"""What one use of a layer tells about its parameters: inputs on one side, gradients on the other.

Backprop contains a Kronecker structure: the gradient of a linear map `s = W a` on one example is
`sum_s g_s a_s.T`, a sum over the positions on which the same weights act. `uses` brings every kind
of layer to that form, as a batch of blocks: one for a dense layer, one per group of a convolution,
one per feature of a norm, and those of `contractions` for each tensor of a structured layer.

Shapes: b = blocks, N = examples, K = columns of gradients (classes, or drawn labels), S = shared
positions, i = inputs and o = outputs of a block, d = features.
"""

import math
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn import StructuredLinear
from matrigami.operators import contractions


class OneHot(NamedTuple):
    """Inputs that are unit vectors: row `u` is the unit vector `indices[u]` of `size`."""

    indices: Tensor
    size: int


class Use(NamedTuple):
    """Inputs and gradients of one use: `dW[n, k] = sum_s gradients[n, k, s] inputs[n, s].T`.

    Args:
        inputs: What the blocks see.
        gradients: What comes back, or None where there was no backward pass.
        transposed: The parameter stores `(i, o)` matrices instead of `(o, i)`.
    """

    inputs: "Float[Tensor, 'b N S i'] | OneHot"
    gradients: Float[Tensor, "b N K S o"] | None
    transposed: bool = False


Uses = dict[tuple[str, ...], Use]
"""By the names of the layer's parameters that share a block: a weight, with its bias if joint."""


@singledispatch
def uses(layer: Any, x: Tensor, g: Tensor | None, joint: bool) -> Uses:  # noqa: ARG001 - one signature for all layers
    """One use of a layer, for each of its blocks of parameters.

    Register a rule for a layer of your own with `@uses.register`.

    Args:
        layer: The layer.
        x: Its input, `(N, ...)`.
        g: Gradients with respect to its output, `(K, N, ...)`, or None.
        joint: Whether a bias is one more column of its weight.

    Raises:
        TypeError: If there is no rule for this kind of layer.
    """
    raise TypeError(unsupported(type(layer).__name__))


def unsupported(what: str) -> str:
    """What to say of a trainable parameter without a rule."""
    return (
        f"curvature was asked for the parameters of {what}.\n"
        "How they enter the model is not known.\n"
        "Freeze them with requires_grad_(False), or register a rule: "
        "@matrigami.curvature.uses.register."
    )


def known(layer: nn.Module) -> bool:
    """Whether there is a rule for a layer."""
    return uses.dispatch(type(layer)) is not uses.dispatch(object)


def _with_ones(x: Tensor) -> Tensor:
    """One more input that is always one."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _positions(g: Tensor | None) -> Tensor | None:
    """`(K, N, ..., o)` as `(1, N, K, S, o)`."""
    return None if g is None else g.reshape(*g.shape[:2], -1, g.shape[-1]).transpose(0, 1)[None]


def _affine(layer: Any, inputs: Tensor, gradients: Tensor | None, joint: bool) -> Uses:
    """A weight and perhaps a bias, from blocks of inputs and gradients."""
    if layer.bias is None:
        return {("weight",): Use(inputs, gradients)}
    if joint:
        return {("weight", "bias"): Use(_with_ones(inputs), gradients)}
    return {("weight",): Use(inputs, gradients), ("bias",): _bias(inputs, gradients)}


def _bias(inputs: Tensor, gradients: Tensor | None) -> Use:
    """A bias on its own: the weight of an input that is always one."""
    return Use(inputs.new_ones(*inputs.shape[:3], 1), gradients)


@uses.register
def _(layer: nn.Linear, x: Tensor, g: Tensor | None, joint: bool) -> Uses:
    if x.ndim == 1:
        x, g = x[None], None if g is None else g[:, None]
    return _affine(layer, x.reshape(1, len(x), -1, x.shape[-1]), _positions(g), joint)


@uses.register(nn.Conv1d)
@uses.register(nn.Conv2d)
def _(layer: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor | None, joint: bool) -> Uses:
    """A convolution is a linear layer on patches (KFC: Grosse and Martens 2016, arXiv:1602.01407).

    Groups are blocks.
    """
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, padding, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    patches = nn.functional.unfold(x, kernel, dilation, 0, stride)  # pyright: ignore[reportArgumentType]
    inputs = patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2)  # b N S i
    if g is not None:
        g = g.flatten(3).unflatten(2, (layer.groups, -1)).permute(2, 1, 0, 4, 3)  # b N K S o
    return _affine(layer, inputs, g, joint)


@uses.register
def _(layer: nn.Embedding, x: Tensor, g: Tensor | None, joint: bool) -> Uses:  # noqa: ARG001
    """Inputs are unit vectors. Positions with the same token in one example are summed first."""
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        raise TypeError(unsupported(f"an Embedding with max_norm or scale_grad_by_freq: {layer}"))
    tokens = x.reshape(len(x), -1)
    examples = torch.arange(len(x), device=x.device)[:, None]
    pairs = examples * layer.num_embeddings + tokens
    if layer.padding_idx is not None:
        pairs = pairs[tokens != layer.padding_idx]
    kept, place = pairs.flatten().unique(return_inverse=True)
    inputs = OneHot(kept % layer.num_embeddings, layer.num_embeddings)
    if g is None:
        return {("weight",): Use(inputs, None, transposed=True)}
    rows = g.reshape(len(g), -1, g.shape[-1])
    if layer.padding_idx is not None:
        rows = rows[:, (tokens != layer.padding_idx).flatten()]
    sums = rows.new_zeros(len(g), len(kept), g.shape[-1]).index_add_(1, place, rows)
    return {("weight",): Use(inputs, sums.transpose(0, 1)[None, :, :, None], transposed=True)}


def _scale_and_shift(layer: Any, normalised: Tensor, g: Tensor | None) -> Uses:
    """Exact blocks of `weight[f], bias[f]` for each feature: the gradient on one example itself.

    Shapes: normalised `N S d`, g `K N S d`.
    """
    names = tuple(name for name in ("weight", "bias") if getattr(layer, name, None) is not None)
    N, _, d = normalised.shape
    if g is None:
        return {names: Use(normalised.new_ones(d, N, 1, 1), None)}
    parts = [(g * normalised).sum(2), g.sum(2)][: len(names)]
    gradients = torch.stack(parts, -1).permute(2, 1, 0, 3)[:, :, :, None]  # d N K 1 2
    return {names: Use(normalised.new_ones(d, N, 1, 1), gradients)}


@uses.register(nn.LayerNorm)
@uses.register(nn.RMSNorm)
def _(layer: nn.LayerNorm | nn.RMSNorm, x: Tensor, g: Tensor | None, joint: bool) -> Uses:  # noqa: ARG001
    shape, d = list(layer.normalized_shape), math.prod(layer.normalized_shape)
    if isinstance(layer, nn.LayerNorm):
        normalised = nn.functional.layer_norm(x, shape, None, None, layer.eps)
    else:
        normalised = nn.functional.rms_norm(x, shape, None, layer.eps)
    flat = None if g is None else g.reshape(*g.shape[:2], -1, d)
    return _scale_and_shift(layer, normalised.reshape(len(x), -1, d), flat)


@uses.register(nn.BatchNorm1d)
@uses.register(nn.BatchNorm2d)
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, g: Tensor | None, joint: bool) -> Uses:  # noqa: ARG001
    """In training mode the statistics of the batch are taken as constants."""
    batch = layer.training or layer.running_mean is None
    statistics = (None, None) if batch else (layer.running_mean, layer.running_var)
    normalised = nn.functional.batch_norm(x, *statistics, None, None, batch, 0.0, layer.eps)
    flat = None if g is None else g.reshape(*g.shape[:3], -1).transpose(2, 3)
    return _scale_and_shift(layer, normalised.reshape(*x.shape[:2], -1).transpose(1, 2), flat)


@uses.register
def _(layer: StructuredLinear, x: Tensor, g: Tensor | None, joint: bool) -> Uses:  # noqa: ARG001
    """Each tensor of the weight by its contraction; the bias on its own."""
    if layer.rms_cap:
        raise TypeError(unsupported(f"a StructuredLinear with rms_cap: {layer}"))
    N, (K, A) = len(x), (0 if g is None else len(g), layer.matrix())
    X = x.reshape(-1, layer.in_features).mT
    G = None if g is None else g.reshape(-1, layer.out_features).mT
    found: Uses = {}
    for name, (C, before, after) in zip(layer.factor_names, contractions(A), strict=True):
        if not C.row_major and not C.column_major:
            raise TypeError(unsupported(f"{name}, whose axes are neither row- nor column-major"))
        Z = C.split_inputs(X if before is None else before @ X)  # b s i NS
        inputs = Z.unflatten(-1, (N, -1)).permute(0, 3, 4, 1, 2).flatten(2, 3)
        gradients = None
        if G is not None:
            H = C.split_outputs(G if after is None else after.T @ G)  # b s o KNS
            H = H.unflatten(-1, (K, N, -1)).permute(0, 4, 3, 5, 1, 2)
            gradients = H.flatten(3, 4)
        found[(name,)] = Use(inputs, gradients, transposed=not C.row_major)
    if layer.bias is not None:
        found[("bias",)] = _bias(X.mT.reshape(1, N, -1, X.shape[0])[..., :1], _positions(g))
    return found
