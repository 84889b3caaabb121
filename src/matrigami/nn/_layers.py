"""The parts of torch's own layers.

One rule for each kind of layer: roles, blocks, fans, and the taps of `_taps.py`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from matrigami.nn._anatomy import Part, Parts, Role, Tap, Use, Whole, parts, shape_of
from matrigami.nn._taps import (
    bag_use,
    channel_use,
    channels_last,
    convolution_use,
    embedding_use,
    last_features,
    linear_use,
    scaled_use,
    transposed_convolution_use,
)
from matrigami.operators import BlockView, Fan, stacked_view, transposed_view


def weight_part(role: Role, view: BlockView, tap: Tap | None = None, **more: Any) -> Part:
    """A parameter whose blocks each map their columns to their rows.

    Args:
        role: What it does.
        view: How it is a stack of matrices.
        tap: How its inputs and gradients are read.
        more: Other fields of the part.

    Examples:
        >>> weight_part(Role.MATRIX, stacked_view((6, 2), 3)).fan
        Fan(inputs=2, outputs=2, order=1, last=False)
    """
    blocks = view if view.two_sided else None
    return Part(role, blocks, Fan(view.columns, view.rows), tap=tap, **more)


def affine(weight: Part) -> Parts:
    """A weight, and a bias that is one more column of it."""
    if weight.tap is None:
        return {"weight": weight, "bias": Part(Role.BIAS, refused=weight.refused)}
    bias = Part(Role.BIAS, column_of="weight", features=weight.features)
    return {"weight": weight, "bias": bias}


@parts.register
def _(layer: nn.Linear) -> Parts:
    view = stacked_view(shape_of(layer))
    return affine(weight_part(Role.MATRIX, view, linear_use, features=1))


@parts.register
def _(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Parts:
    """One block for each group; the taps of the kernel are inputs."""
    shape = shape_of(layer)
    view = stacked_view(shape, layer.groups)
    depthwise = layer.groups > 1 and shape[1] == 1  # its blocks do not grow with the width
    whole = Whole(view.columns, view.rows, growth=(0, 0) if depthwise else (1, 1))
    tap = partial(convolution_use, layer)
    return affine(weight_part(Role.CONVOLUTION, view, tap, whole=whole))


@parts.register
def _(layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Parts:
    """Inputs are stored first, and the taps of the kernel are outputs."""
    view = transposed_view(shape_of(layer), layer.groups)
    return {
        "weight": weight_part(Role.CONVOLUTION, view, partial(transposed_convolution_use, layer)),
        "bias": Part(Role.BIAS, tap=partial(channel_use, layer)),
    }


@parts.register
def _(layer: nn.Bilinear) -> Parts:
    """One form for each output, of two inputs; a call is read by its first input only."""
    shape = shape_of(layer)
    m, first, second = shape
    view = BlockView(shape, shape, (0, 1, 2), m, first, second)
    whole = Whole(first * second, m, growth=(2, 1))
    fan, blocks = Fan(first * second, m), view if view.two_sided else None
    return affine(Part(Role.MATRIX, blocks, fan, whole, refused="with two inputs"))


@parts.register
def _(layer: nn.MultiheadAttention) -> Parts:
    """Queries, keys and values are three matrices, in one tensor or in three.

    The last projection is a child whose weight is used without calling it.
    """
    found: Parts = {}
    for name, p in layer.named_parameters(recurse=False):
        if p.ndim == 2:
            view = stacked_view(tuple(p.shape), 3 if name == "in_proj_weight" else 1)
            found[name] = weight_part(Role.MATRIX, view)
        else:
            found[name] = Part(Role.BIAS)
    inner = parts(layer.out_proj)
    found |= {f"out_proj.{name}": part for name, part in inner.items()}
    return {
        name: _unseen(part, "whose projections are fused (nn.separate_(model) parts them)")
        for name, part in found.items()
    }


def _unseen(part: Part, why: str) -> Part:
    """A part whose inputs and gradients cannot be read."""
    return replace(part, tap=None, column_of="", refused=why)


@parts.register
def _(
    layer: nn.RNN | nn.LSTM | nn.GRU | nn.RNNCell | nn.LSTMCell | nn.GRUCell,
) -> Parts:
    """The weights of the gates are stored one below the other; the projection has none."""
    found: Parts = {}
    for name, p in layer.named_parameters(recurse=False):
        gates = max(1, len(p) // layer.hidden_size)
        view = stacked_view(tuple(p.shape), gates) if p.ndim == 2 else None
        found[name] = weight_part(Role.MATRIX, view) if view else Part(Role.BIAS)
    return {name: _unseen(part, "whose steps are fused") for name, part in found.items()}


@parts.register
def _(layer: nn.Embedding) -> Parts:
    """Rows of tokens are inputs; the table is stored with inputs first."""
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        return {"weight": Part(Role.EMBEDDING, refused="with max_norm or scale_grad_by_freq")}
    return {"weight": Part(Role.EMBEDDING, tap=partial(embedding_use, layer), features=0)}


@parts.register
def _(layer: nn.EmbeddingBag) -> Parts:
    """Sums or means of rows."""
    if layer.scale_grad_by_freq or layer.max_norm is not None or layer.mode == "max":
        why = "with max_norm, scale_grad_by_freq or the mode max"
        return {"weight": Part(Role.EMBEDDING, refused=why)}
    return {"weight": Part(Role.EMBEDDING, tap=partial(bag_use, layer))}


def scale_and_shift(
    layer: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    features: Callable[[Tensor, int], Tensor],
    role: Role = Role.NORM,
    *,
    last: int | None = None,
) -> Parts:
    """A `weight`, and perhaps a `bias`, of each feature: both in one block for each.

    Args:
        layer: The layer.
        normalise: From the input to what `weight` is multiplied with.
        features: `(..., N, S, d)` from a tensor like the output, with so many axes before `N`.
        role: What the weight does.
        last: How many of the last axes are features, if all others are alike.
    """
    names = [n for n in ("weight", "bias") if getattr(layer, n, None) is not None]

    def tap(x: Tensor, g: Tensor | None) -> Use:
        """The gradients of scale and shift on each example."""
        y, back = features(normalise(x), 0), None if g is None else features(g, 1)
        return scaled_use(y, back, scale="weight" in names, shift="bias" in names)

    return {name: Part(role, tap=tap, features=last) for name in names}


@parts.register
def _(layer: nn.LayerNorm) -> Parts:
    shape = list(layer.normalized_shape)
    normalise = partial(nn.functional.layer_norm, normalized_shape=shape, eps=layer.eps)
    features = partial(last_features, math.prod(shape))
    return scale_and_shift(layer, normalise, features, last=len(shape))


@parts.register
def _(layer: nn.RMSNorm) -> Parts:
    shape = list(layer.normalized_shape)
    normalise = partial(nn.functional.rms_norm, normalized_shape=shape, eps=layer.eps)
    features = partial(last_features, math.prod(shape))
    return scale_and_shift(layer, normalise, features, last=len(shape))


@parts.register
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> Parts:
    """In training mode the statistics of the batch are taken as constants."""

    def normalise(x: Tensor) -> Tensor:
        """With the statistics that the layer uses."""
        batch = layer.training or layer.running_mean is None
        statistics = (None, None) if batch else (layer.running_mean, layer.running_var)
        return nn.functional.batch_norm(x, *statistics, None, None, batch, 0.0, layer.eps)

    return scale_and_shift(layer, normalise, channels_last)


@parts.register
def _(_layer: nn.SyncBatchNorm) -> Parts:
    """Its statistics are those of all processes."""
    part = Part(Role.NORM, refused="with statistics of other processes")
    return {"weight": part, "bias": part}


@parts.register
def _(layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) -> Parts:
    def normalise(x: Tensor) -> Tensor:
        """With the statistics of each example, or the running ones."""
        own = layer.training or not layer.track_running_stats
        statistics = (None, None) if own else (layer.running_mean, layer.running_var)
        return nn.functional.instance_norm(x, *statistics, use_input_stats=own, eps=layer.eps)

    def features(y: Tensor, before: int) -> Tensor:
        """Of one example, too, as the layer takes it."""
        single = y.ndim - before == layer._get_no_batch_dim()
        return channels_last(y.unsqueeze(before) if single else y, before)

    return scale_and_shift(layer, normalise, features)


@parts.register
def _(layer: nn.GroupNorm) -> Parts:
    normalise = partial(nn.functional.group_norm, num_groups=layer.num_groups, eps=layer.eps)
    return scale_and_shift(layer, normalise, channels_last)


@parts.register
def _(layer: nn.PReLU) -> Parts:
    """One slope for all channels, or one for each: the gain of the negative part."""

    def features(y: Tensor, before: int) -> Tensor:
        """One feature, or the channels."""
        if layer.num_parameters > 1 and y.ndim - before > 1:
            return channels_last(y, before)
        return y.reshape(*y.shape[: before + 1], -1, layer.num_parameters)

    return scale_and_shift(layer, lambda x: x.clamp_max(0), features, Role.GAIN)
