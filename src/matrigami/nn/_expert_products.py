"""Products of two factors for many experts, each with its own vectors, and their weighted sums.

`y_t = sum_s w_ts L_e R_e x_t`, with `e` the expert in slot `s` of vector `t`. Some of the vectors
at a time go all the way from the input to the output, and back, in the cache. They are copied as
rows and results are added as rows, which costs a quarter of bringing them into columns. What is
between the factors is all that is kept for the gradients.

Weights come as logarithms: what is between the factors times its gradient, summed, is the gradient
of the logarithm. No product is kept for it, and nothing divided by a weight, which may be zero.

Shapes: c = vectors, s = active experts, p = c s pairs, E = experts, k = pairs of one expert; g, a,
r, i, j as in `two_factors`, n = g a, m = i j.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from matrigami.operators import TwoFactors, two_factors
from matrigami.operators._two_factors import is_batch

NEAR = 2**20
"""Numbers in the vectors that are handled together: four megabytes in single precision."""
LEAST = 128
"""Pairs that an expert has among them on average, or calls cost more than the cache saves."""


class Portion(NamedTuple):
    """Vectors that are handled together.

    Args:
        vectors: Which.
        size: How many pairs they are in.
        experts: Those they need, the pairs of each, and where these are among the pairs of all.
    """

    vectors: slice
    size: int
    experts: list[tuple[int, slice, slice]]


class Pairs(NamedTuple):
    """Vectors and their experts, in the order of the computation.

    Args:
        order: The pair, as it stands in the table of experts.
        places: The vector of each pair.
        found: Where in its portion each pair of the table is.
        portions: What is handled together.
    """

    order: Int[Tensor, "p"]
    places: Int[Tensor, "p"]
    found: Int[Tensor, "c s"]
    portions: list[Portion]


def pairs_of(experts: Int[Tensor, "c s"], count: int, features: int) -> Pairs:
    """Sort the pairs by their portion, and there by expert.

    Args:
        experts: Those of each vector.
        count: How many experts there are.
        features: Numbers in a vector.
    """
    c, s = experts.shape
    size = max(1, NEAR // features, LEAST * count // s)
    portion = torch.arange(c)[:, None] // size
    keys = (portion * count + experts).flatten()
    order = keys.argsort(stable=True)
    found = torch.empty_like(order).scatter_(0, order, torch.arange(c * s)).view(c, s)
    counts = torch.bincount(keys, minlength=-(-c // size) * count).view(-1, count).tolist()
    portions = [_portion(i * size, min(size, c - i * size), s, own) for i, own in enumerate(counts)]
    return Pairs(order, order // s, found - portion * size * s, portions)


def _portion(start: int, size: int, slots: int, counts: list[int]) -> Portion:
    """So many vectors from there on."""
    experts, first, here = [], start * slots, 0
    for e, count in enumerate(counts):
        if count:
            at = slice(first + here, first + here + count)
            experts.append((e, at, slice(here, here + count)))
        here += count
    return Portion(slice(start, start + size), size * slots, experts)


def expert_products(
    X: Float[Tensor, "c n"],
    logs: Float[Tensor, "c s"],
    experts: Int[Tensor, "c s"],
    factors: TwoFactors,
) -> Float[Tensor, "c m"]:
    """The weighted sums of the products, differentiable any number of times.

    Args:
        X: The vectors.
        logs: Logarithms of the weights.
        experts: Those of each vector.
        factors: Those of all experts, `E g r i a` and `E i j g r`.
    """
    R, L, *layout = factors
    pairs = pairs_of(experts, len(R), max(X.shape[1], L.shape[1] * L.shape[2]))
    given = X.contiguous(), logs, R, L
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Products.apply(*given, layout, pairs)  # pyright: ignore[reportReturnType]
    Y, _ = _forward(*given, layout, pairs, keep=False)
    return Y


class _Products(torch.autograd.Function):
    """The sums and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, logs: Tensor, R: Tensor, L: Tensor, layout: list[bool], pairs: Pairs
    ) -> Tensor:
        """Keep what is between the factors."""
        Y, between = _forward(X, logs, R, L, layout, pairs, keep=True)
        ctx.save_for_backward(X, logs, R, L, *between)
        ctx.layout, ctx.pairs = layout, pairs
        return Y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of vectors, logarithms and factors."""
        (X, logs, R, L, *between), (dY,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled() or is_batch(dY):
            return (*_derivatives((X, logs, R, L), dY, ctx), None, None)
        return (*_backward((X, logs, R, L), iter(between), dY.contiguous(), ctx), None, None)


def _forward(
    X: Tensor, logs: Tensor, R: Tensor, L: Tensor, layout: list[bool], pairs: Pairs, *, keep: bool
) -> tuple[Float[Tensor, "c m"], list[Float[Tensor, "g ri k"]]]:
    """The sums, and what is between the factors of each expert if it is to be kept."""
    rows, columns = layout
    first, second, weights, between = *_matrices(R, L), logs.exp(), []
    Y = X.new_empty(len(X), L.shape[1] * L.shape[2])
    for vectors, size, experts in pairs.portions:
        V = X.new_empty(size, Y.shape[1])
        for e, at, here in experts:
            U = _blocks(X.index_select(0, pairs.places[at]), R.shape[1], columns)
            Z = torch.bmm(first[e], U.mT)
            _blocks(V[here], L.shape[1], rows).copy_(torch.bmm(_turned(Z, R).mT, second[e].mT))
            between += [Z] if keep else []
        Y[vectors] = _summed(pairs.found[vectors], V, weights[vectors])
    return Y, between


def _backward(
    given: tuple[Tensor, ...], between: Iterator[Tensor], dY: Float[Tensor, "c m"], ctx: Any
) -> tuple[Tensor, ...]:
    """The gradients."""
    (X, logs, R, L), pairs, (rows, columns) = given, ctx.pairs, ctx.layout
    weights = logs.exp().flatten()[pairs.order]
    dX, dlogs, dR, dL = (t.new_empty(t.shape) for t in (X, weights, R, L))
    first, second, d_first, d_second = *_matrices(R, L), *_matrices(dR.zero_(), dL.zero_())
    for vectors, size, experts in pairs.portions:
        V = X.new_empty(size, X.shape[1])
        for e, at, here in experts:
            place, Z = pairs.places[at, None], next(between)
            G = _blocks(_summed(place, dY, weights[at, None]), L.shape[1], rows).contiguous()
            U = _blocks(X.index_select(0, place[:, 0]), R.shape[1], columns).contiguous()
            d_second[e].baddbmm_(G.mT, _turned(Z, R).mT)
            dZ = torch.empty_like(Z)
            torch.bmm(second[e].mT, G.mT, out=_turned(dZ, R))
            dlogs[at] = (dZ * Z).sum((0, 1))
            d_first[e].baddbmm_(dZ, U)
            _blocks(V[here], R.shape[1], columns).copy_(torch.bmm(dZ.mT, first[e]))
        dX[vectors] = _summed(pairs.found[vectors], V)
    return dX, torch.empty_like(dlogs).scatter_(0, pairs.order, dlogs).view_as(logs), dR, dL


def _summed(
    places: Int[Tensor, "k s"], V: Float[Tensor, "p m"], weights: Float[Tensor, "k s"] | None = None
) -> Float[Tensor, "k m"]:
    """Weighted sums of some of the rows."""
    return embedding_bag(places, V, mode="sum", per_sample_weights=weights)


def _matrices(
    R: Float[Tensor, "E g r i a"], L: Float[Tensor, "E i j g r"]
) -> tuple[Float[Tensor, "E g ri a"], Float[Tensor, "E i j gr"]]:
    """Both factors as stacks of matrices."""
    return R.flatten(2, 3), L.flatten(3, 4)


def _turned(Z: Float[Tensor, "g ri k"], R: Float[Tensor, "E g r i a"]) -> Float[Tensor, "i gr k"]:
    """What the second factor reads and writes."""
    _, g, r, i, _ = R.shape
    return Z.view(g * r, i, -1).transpose(0, 1)


def _blocks(U: Float[Tensor, "k n"], blocks: int, interleaved: bool) -> Float[Tensor, "g k a"]:
    """Rows block by block, a view."""
    if interleaved:
        return U.unflatten(1, (-1, blocks)).permute(2, 0, 1)
    return U.unflatten(1, (blocks, -1)).transpose(0, 1)


def _derivatives(given: tuple[Tensor, ...], dY: Tensor, ctx: Any) -> list[Tensor | None]:
    """The gradients by operations that have derivatives themselves."""
    pairs, needed = ctx.pairs, ctx.needs_input_grad[:4]
    with torch.enable_grad():
        X, logs, R, L = own = [t.view_as(t) for t in given]  # as logarithms are functions of X
        Y, weights = X.new_zeros(len(X), L.shape[1] * L.shape[2]), logs.exp().flatten()
        for portion in pairs.portions:
            for e, at, _ in portion.experts:
                factors = TwoFactors(R[e], L[e], *ctx.layout)
                products = two_factors(X[pairs.places[at]].mT, **factors._asdict())
                Y = Y.index_add(0, pairs.places[at], (products * weights[pairs.order[at]]).mT)
        wanted = [t for t, is_needed in zip(own, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(Y, wanted, dY, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]
