"""What the blocks of torch's layers see: their inputs, and the gradients of their outputs.

Backprop contains a Kronecker structure: the gradient of a linear map `s = W a` on one example is
`sum_s g_s a_s.T`, a sum over the positions on which the same weights act. Each function here brings
one kind of layer to that form.

Shapes: b = blocks, N = examples, K = columns of gradients, S = shared positions, i = inputs and o =
outputs of a block, d = features.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn._anatomy import OneHot, Use
from matrigami.operators import Contraction


def batched(x: Tensor, g: Tensor | None, axes: int) -> tuple[Tensor, Tensor | None]:
    """An input of `axes` axes without examples as one example."""
    if x.ndim > axes:
        return x, g
    return x[None], None if g is None else g[:, None]


def positions(g: Tensor | None) -> Tensor | None:
    """`(K, N, ..., o)` as `(1, N, K, S, o)`."""
    return None if g is None else g.reshape(*g.shape[:2], -1, g.shape[-1]).transpose(0, 1)[None]


def linear_use(x: Tensor, g: Tensor | None, *, transposed: bool = False) -> Use:
    """Of a matrix that acts on the last axis."""
    x, g = batched(x, g, 1)
    return Use(x.reshape(1, len(x), -1, x.shape[-1]), positions(g), transposed)


def constant_use(x: Tensor, g: Tensor | None) -> Use:
    """Of a vector that is added to the last axis: the weight of an input that is always one."""
    x, g = batched(x, g, 1)
    return Use(x.new_ones(1, len(x), x.shape[1:-1].numel(), 1), positions(g))


def core_use(
    part: Contraction, X: Float[Tensor, "*stack n c"], G: Tensor | None, examples: int
) -> Use:
    """Of one tensor of a product, from the vectors on both sides of the product, as columns.

    Args:
        part: How the tensor enters the product, or the products of a stack.
        X: Inputs of the product, all positions of the first example first, `c = N S`.
        G: Gradients of its outputs, `(*stack, m, K, c)`, or None.
        examples: How many, `N`.
    """
    C, before, after = part
    Z = C.split_inputs(X if before is None else before @ X)  # stack b s i NS
    Z = Z.reshape(-1, *Z.shape[-3:]).unflatten(-1, (examples, -1))
    inputs = Z.permute(0, 3, 4, 1, 2).flatten(2, 3)
    if G is None:
        return Use(inputs, None, transposed=not C.row_major)
    columns, G = G.shape[-2], G.flatten(-2)
    H = C.split_outputs(G if after is None else after.T @ G)  # stack b s o KNS
    H = H.reshape(-1, *H.shape[-3:]).unflatten(-1, (columns, examples, -1))
    H = H.permute(0, 4, 3, 5, 1, 2)
    return Use(inputs, H.flatten(3, 4), transposed=not C.row_major)


def patches(x: Float[Tensor, "..."], layer: Any) -> Float[Tensor, "*batch S i"]:
    """The entries of `(*batch, c, *sizes)` under the kernel of a convolution, by its positions."""
    axes = len(layer.kernel_size)
    windows = x
    sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    for axis, (kernel, dilation, stride) in enumerate(sizes, start=x.ndim - axes):
        span = dilation * (kernel - 1) + 1
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    first = x.ndim - axes  # of the positions; the taps follow them, the channels come before
    order = (*range(first - 1), *range(first, first + axes), first - 1)
    windows = windows.permute(*order, *range(first + axes, first + 2 * axes))
    return windows.flatten(-axes - 1).flatten(first - 1, first + axes - 2)


def convolution_use(layer: Any, x: Tensor, g: Tensor | None) -> Use:
    """A convolution is a linear layer on patches (KFC: Grosse and Martens 2016, arXiv:1602.01407).

    Groups are blocks.
    """
    axes = len(layer.kernel_size)
    x, g = batched(x, g, axes + 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    inputs = patches(x.unflatten(1, (layer.groups, -1)), layer).transpose(0, 1)  # b N S i
    if g is None:
        return Use(inputs, None)
    g = g.flatten(3).unflatten(2, (layer.groups, -1)).permute(2, 1, 0, 4, 3)  # b N K S o
    return Use(inputs, g)


def transposed_convolution_use(layer: Any, x: Tensor, g: Tensor | None) -> Use:
    """Each position makes a patch of the output: a linear layer, and a sum where patches meet."""
    axes = len(layer.kernel_size)
    x, g = batched(x, g, axes + 1)
    inputs = x.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2)  # b N S i
    if g is None:
        return Use(inputs, None, transposed=True)
    margin = [p for side in reversed(layer.padding) for p in (side, side)]
    g = nn.functional.pad(g.unflatten(2, (layer.groups, -1)), margin)
    g = _first(g, x.shape[2:], layer)
    gradients = patches(g, layer).permute(2, 1, 0, 3, 4)  # b N K S o
    return Use(inputs, gradients, transposed=True)


def _first(g: Tensor, sizes: torch.Size, layer: Any) -> Tensor:
    """Cut what no position of the input reaches: the additional side of the output."""
    for axis, size in enumerate(sizes, start=g.ndim - len(sizes)):
        i = axis - g.ndim + len(sizes)
        span = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        g = g.narrow(axis, 0, (size - 1) * layer.stride[i] + span)
    return g


def channel_use(layer: Any, x: Tensor, g: Tensor | None) -> Use:
    """Of the bias of a transposed convolution, which is added where patches have met."""
    axes = len(layer.kernel_size)
    x, g = batched(x, g, axes + 1)
    if g is None:
        return Use(x.new_ones(1, len(x), 1, 1), None)  # its positions are not seen
    gradients = g.flatten(3).permute(1, 0, 3, 2)[None]  # 1 N K S o
    return Use(x.new_ones(1, len(x), gradients.shape[3], 1), gradients)


def embedding_use(layer: Any, x: Tensor, g: Tensor | None) -> Use:
    """Inputs are unit vectors. Positions with the same token in one example are summed first."""
    tokens = x.reshape(len(x), -1)
    return _tokens_use(layer, tokens, None if g is None else g.reshape(len(g), -1, g.shape[-1]))


def bag_use(layer: Any, x: Tensor, g: Tensor | None) -> Use:
    """Bags of one length: each token of a bag has the bag's gradient, or its share of it.

    Raises:
        TypeError: If the bags are given by offsets, which are not seen here.
    """
    if x.ndim != 2:
        raise TypeError(
            f"curvature: an EmbeddingBag had an input of shape {tuple(x.shape)}.\n"
            "Bags that are given by offsets cannot be read.\nGive bags of one length, (N, L)."
        )
    if g is None:
        return _tokens_use(layer, x, None)
    counts = torch.full_like(x[:, 0], x.shape[1])
    if layer.padding_idx is not None:
        counts = (x != layer.padding_idx).sum(1).clamp_min(1)
    share = 1 / counts.to(g)[:, None] if layer.mode == "mean" else g.new_ones(len(x), 1)
    rows = (g * share)[:, :, None].expand(-1, -1, x.shape[1], -1)
    return _tokens_use(layer, x, rows.flatten(1, 2))


def _tokens_use(layer: Any, tokens: Tensor, rows: Tensor | None) -> Use:
    """Of a table, from tokens `(N, S)` and the gradients `(K, N S, o)` of its rows."""
    examples = torch.arange(len(tokens), device=tokens.device)[:, None]
    pairs, kept = examples * layer.num_embeddings + tokens, None
    if layer.padding_idx is not None:
        kept = tokens != layer.padding_idx
        pairs = pairs[kept]
    found, place = pairs.flatten().unique(return_inverse=True)
    size = layer.num_embeddings
    inputs = OneHot(found % size, size, found // size, len(tokens))
    if rows is None:
        return Use(inputs, None, transposed=True)
    if kept is not None:
        rows = rows[:, kept.flatten()]
    sums = rows.new_zeros(len(rows), len(found), rows.shape[-1]).index_add_(1, place, rows)
    return Use(inputs, sums.transpose(0, 1)[None, :, :, None], transposed=True)


def scaled_use(
    normalised: Float[Tensor, "N S d"],
    g: Float[Tensor, "K N S d"] | None,
    *,
    scale: bool,
    shift: bool,
) -> Use:
    """Exact blocks of `weight[f], bias[f]` for each feature: the gradient on one example itself."""
    N, _, d = normalised.shape
    ones = normalised.new_ones(d, N, 1, 1)
    if g is None:
        return Use(ones, None)
    sums = [(g * normalised).sum(2)] * scale + [g.sum(2)] * shift
    return Use(ones, torch.stack(sums, -1).permute(2, 1, 0, 3)[:, :, :, None])  # d N K 1 2


def channels_last(y: Float[Tensor, "..."], before: int) -> Float[Tensor, "..."]:
    """`(..., N, d, *sizes)`, with so many axes before `N`, as `(..., N, S, d)`."""
    return y.reshape(*y.shape[: before + 2], -1).transpose(before + 1, before + 2)


def last_features(d: int, y: Float[Tensor, "..."], before: int) -> Float[Tensor, "..."]:
    """The last axes as `d` features, those between them and the examples as positions."""
    return y.reshape(*y.shape[: before + 1], -1, d)
