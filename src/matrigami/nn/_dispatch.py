"""The vectors of each expert, and the sum of their gradients.

Autograd would join the gradients of all experts, which come in another order than their vectors,
before it adds them up; here each is added where it belongs, as it is.

Shapes: c = vectors, p = c a, a = active experts, k = vectors of an expert, n = features.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from matrigami.operators._two_factors import is_batch, is_watched


def dispatch(
    X: Float[Tensor, "c n"], places: Int[Tensor, "p"], counts: list[int]
) -> tuple[Tensor, ...]:
    """For each expert, its rows of `X`, `k n`.

    Args:
        X: The vectors.
        places: Which vectors the experts get, one expert after the other; each a vector once.
        counts: How many each gets.
    """
    X = X.contiguous()
    if is_watched() or not (X.requires_grad and torch.is_grad_enabled()):
        return embedding(places, X).split(counts)
    return _Dispatch.apply(X, places, counts)  # pyright: ignore[reportReturnType]


class _Dispatch(torch.autograd.Function):
    """Rows of a matrix, and the sum of their gradients, in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, places: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        """Copy."""
        ctx.save_for_backward(places)
        ctx.shape, ctx.counts = X.shape, counts
        return embedding(places, X).split(counts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Add up."""
        (places,) = ctx.saved_tensors
        parts, first = zip(places.split(ctx.counts), grad_outputs, strict=True), grad_outputs[0]
        if torch.is_grad_enabled() or is_batch(first):
            dX = first.new_zeros(*first.shape[:-2], *ctx.shape)
            for place, dR in parts:
                dX = dX.index_add(-2, place, dR)
            return dX, None, None
        dX = first.new_zeros(ctx.shape)
        for place, dR in parts:
            dX.index_add_(0, place, dR.contiguous())
        return dX, None, None
