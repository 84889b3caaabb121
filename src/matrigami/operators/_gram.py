"""Symmetric products `G G.T`: on a processor half of the work of a product, in stripes of rows.

Each stripe ends at the diagonal (at m = n = 1024 measured as 0.55 of the whole product); what is
above is a copy. On other devices a launch costs more than the work that it saves.

Shapes: b = matrices, m = rows, n = columns.
"""

import torch
from jaxtyping import Float
from torch import Tensor

STRIPE = 128
"""Fewest rows of a stripe; a large matrix has eight of them."""


def stripes(m: int) -> range:
    """Where the stripes of `m` rows begin."""
    return range(0, m, max(STRIPE, -(-m // 8)))


def gram(X: Float[Tensor, "b n m"]) -> Float[Tensor, "b m m"]:
    """`X.T X`, equal to its transpose in every bit, as damping asks of factors."""
    if X.device.type != "cpu" or X.shape[-1] < 2 * STRIPE:
        whole = X.mT @ X
        return (whole + whole.mT) / 2
    return _mirror(averaged_gram(None, X.mT))


def averaged_gram(
    L: Float[Tensor, "b m m"] | None,
    G: Float[Tensor, "b m n"],
    kept: float = 0.0,
    added: float = 1.0,
    H: Float[Tensor, "b m n"] | None = None,
) -> Float[Tensor, "b m m"]:
    """`kept L + added G G.T` (or `G H.T`, if that is symmetric), right on and below the diagonal.

    What is above means nothing. None stands for zero.

    Examples:
        >>> L = averaged_gram(torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), 1, 1)
        >>> mirrored(L)[0]
        tensor([[5., 2.],
                [2., 1.]])
    """
    m, H = G.shape[-2], G if H is None else H
    blank = L is None
    L = G.new_empty(*G.shape[:-1], m) if L is None else L
    kept = 0.0 if blank else kept
    if L.device.type != "cpu" or m < 2 * STRIPE:
        return torch.baddbmm(L, G, H.mT, beta=kept, alpha=added)
    L = L if blank else L.clone()
    for i in stripes(m):
        j = i + stripes(m).step
        L[:, i:j, :j].baddbmm_(G[:, i:j], H[:, :j].mT, beta=kept, alpha=added)
    return L


def mirrored(L: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """The whole of a symmetric matrix of which the lower triangle is right."""
    return _mirror(L.clone())


def _mirror(S: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """The same in place."""
    for i in stripes(S.shape[-1]):
        j = i + stripes(S.shape[-1]).step
        below = S[:, j:, i:j].contiguous()  # a stride of 2^k would fall into few lines of the cache
        S[:, i:j, j:] = below.mT
        own = S[:, i:j, i:j]
        own.copy_(own.tril() + own.tril(-1).mT)
    return S
