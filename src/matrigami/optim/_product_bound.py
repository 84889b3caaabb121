"""A bound on the step of a product: what its factors may move so that the matrix moves by little.

Orthogonal updates of norm `r` move `W = U V.T` by up to `r (|U| + |V| + r)`: with the weights, not
by the learning rate alone. Here all factors of a layer move by the same `r`, the largest with

    p(s + r) - p(s) <= h,    s_i = |C_i|,

where `p` is the polynomial of `norm_terms`, and `h` is the step that a dense matrix of the size of
the product would take. So `||W(C - D) - W(C)||_2 <= h`, with all orders; weight decay, which
multiplies each factor by a number below 1, comes on top. `p` is convex and rises, so Newton's
method from above ends above the root, and the chord from 0 to there cuts below it. For two factors
and `r <= 1` it is Spectron's `r = h / (s_1 + s_2 + 1)` (arXiv:2602.12429) or more.

Norms are bounded from above, not estimated: `||A||_2^(2^k) <= ||A^(2^k)||_F` of the Gram matrix.

Shapes: b = blocks, m = rows, n = columns.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import (
    BlockView,
    LinearOperator,
    NormTerm,
    contractions,
    mapped,
    named_tensors,
    norm_terms,
)
from matrigami.optim._bases import of_moderate_size
from matrigami.optim.distributed import Exchange, Groups, Update, local

SQUARINGS = 4
"""Of a Gram matrix: its norm is overestimated by at most `m^(1/32)`, the root by `m^(1/64)`."""

STEPS = 30
"""Of Newton's method, at most; it doubles the digits."""


@dataclass(eq=False)
class Layer:
    """A product whose tensors an optimiser moves.

    Args:
        product: The matrix, with the parameters as tensors.
        step: The norm by which it may move.
        rates: The learning rate of each tensor that is moved, and whether it is a stack of
            matrices, by its place.
    """

    product: LinearOperator
    step: float = float("inf")
    rates: dict[int, tuple[float, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What depends on sizes alone."""
        blank = mapped(self.product, lambda t: torch.empty(t.shape, device="meta"))
        self.views: list[BlockView] = [part.matrix.view for part in contractions(blank)]
        self.tensors = list(named_tensors(self.product).values())
        self.terms = norm_terms(self.product)


class ProductBounds:
    """The bounds of all layers of an optimiser whose groups say which products there are."""

    def __init__(self) -> None:
        self.layers: dict[LinearOperator, Layer] = {}

    def shortened(self, updates: list[Update], groups: Groups, exchange: Exchange) -> list[Update]:
        """The updates, those of the factors of a product as long as the bound allows."""
        layers = self._layers(groups)
        known = {u.parameter: u for u in updates}
        norms = itertools.chain.from_iterable(_norms(x, known, exchange) for x in layers)
        sizes = iter(_numbers(list(norms)))
        shares: dict[Tensor, float] = {}
        for layer in layers:
            pairs = [(next(sizes), next(sizes)) for _ in layer.tensors]
            for t, share in _shares(layer, pairs).items():
                shares[t] = min(share, shares.get(t, share))  # of a tensor of two products
        return [_scaled(u, shares.get(u.parameter)) for u in updates]

    def _layers(self, groups: Groups) -> list[Layer]:
        """The products of some groups, with the rates that their tensors have now."""
        found: dict[LinearOperator, Layer] = {}
        rates: dict[Tensor, tuple[float, bool]] = {}
        for group in groups:
            lr = float(group["lr"])
            wholes: Sequence[Any] = group.get("wholes") or ()
            for p, view, whole in zip(group["params"], group["views"], wholes, strict=False):
                if whole is None or whole.product is None or not group["bound"]:
                    continue
                layer = found.get(whole.product)
                if layer is None:
                    layer = found[whole.product] = self._layer(whole.product)
                rates[p] = (lr, view is not None)
                layer.step = min(layer.step, lr * group["scale"](whole.outputs, whole.inputs))
        for layer in found.values():  # a tied tensor has the place of the first product only
            layer.rates = {i: rates[t] for i, t in enumerate(layer.tensors) if t in rates}
        return list(found.values())

    def _layer(self, product: LinearOperator) -> Layer:
        """A layer whose rates are to be told; what depends on sizes alone is kept."""
        if product not in self.layers:
            self.layers[product] = Layer(product)
        layer = self.layers[product]
        layer.step = float("inf")
        return layer


def _scaled(update: Update, share: float | None) -> Update:
    """An update times its share, if it is a factor's."""
    return update if share is None else update._replace(direction=update.direction * share)


def _numbers(norms: Sequence[Tensor]) -> list[float]:
    """What tensors of several devices hold; one wait for them."""
    moved = [x.to(norms[0].device, torch.float64) for x in norms]
    return torch.stack(moved).tolist() if moved else []


def _norms(
    layer: Layer, known: Mapping[Tensor, Update], exchange: Exchange
) -> Iterator[Float[Tensor, ""]]:
    """Bounds of the norms of each tensor and of its move."""
    for t, view in zip(layer.tensors, layer.views, strict=True):
        part = local(t.detach())
        move = known[t].direction if t in known else torch.zeros_like(part)
        for x in (part, move):
            yield norm_at_most(view.split(exchange.whole(t, x)))


def _shares(layer: Layer, norms: Sequence[tuple[float, float]]) -> dict[Tensor, float]:
    """The factor of each update, by the norms of tensors and of their updates.

    A matrix moves by all that the bound allows; what takes Adam is never made longer.
    """
    r = largest_move(layer.terms, [size for size, _ in norms], layer.step)
    shares: dict[Tensor, float] = {}
    for place, (lr, is_matrix) in layer.rates.items():
        move = lr * norms[place][1]
        if move > 0:
            share = r / move
            shares[layer.tensors[place]] = share if is_matrix else min(1.0, share)
    return shares


def largest_move(terms: Sequence[NormTerm], sizes: Sequence[float], step: float) -> float:
    """The largest `r` with `p(s + r) - p(s) <= h`, from below.

    Args:
        terms: Of `p`.
        sizes: `s`.
        step: `h`.

    Examples:
        >>> from matrigami.operators import NormTerm
        >>> round(largest_move([NormTerm(1.0, (0, 1))], [2.0, 1.0], 0.31), 6)  # 2.1 * 1.1 - 2
        0.1
    """
    if step <= 0 or not terms:
        return 0.0
    r = step
    while _growth(terms, sizes, r)[0] < step:
        r *= 2
    for _ in range(STEPS):
        grown, slope = _growth(terms, sizes, r)
        new = r - (grown - step) / slope
        if not new < r * (1 - 1e-9):
            break
        r = new
    return r * min(1.0, step / _growth(terms, sizes, r)[0])


def _growth(terms: Sequence[NormTerm], sizes: Sequence[float], r: float) -> tuple[float, float]:
    """`p(s + r) - p(s)`, without cancellation, and its derivative by `r`."""
    value = slope = 0.0
    for constant, factors in terms:
        grown, rising, product = 0.0, 0.0, constant  # of the factors so far
        for i in factors:
            rising = rising * (sizes[i] + r) + product + grown
            grown = grown * (sizes[i] + r) + product * r
            product *= sizes[i]
        value, slope = value + grown, slope + rising
    return value, slope


def norm_at_most(X: Float[Tensor, "b m n"]) -> Float[Tensor, ""]:
    """An upper bound on the largest spectral norm of some matrices; of zeros it is 0.

    Examples:
        >>> norm_at_most(torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None])
        tensor(3.)
    """
    if not X.numel():
        return X.new_zeros(())
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    Y = of_moderate_size(X)
    unit = X.abs().amax((-2, -1)) / Y.abs().amax((-2, -1)).clamp_min(0.25)
    A = Y @ Y.mT if Y.shape[-2] <= Y.shape[-1] else Y.mT @ Y
    bound, power = torch.ones_like(unit), 1.0
    for _ in range(SQUARINGS + 1):
        size = torch.linalg.vector_norm(A, dim=(-2, -1)).clamp_min(torch.finfo(A.dtype).tiny)
        bound = bound * size**power
        A = A / size[:, None, None]
        A, power = A @ A, power / 2
    return (bound.sqrt() * unit).amax()
