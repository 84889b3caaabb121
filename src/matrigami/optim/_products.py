"""The products of which SOAP and Shampoo are made: second moments and two-sided products.

Shapes: b = blocks, m = rows, n = columns.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

STRIPE = 128
"""Rows of a stripe of a symmetric product."""


def averaged_gram(
    L: Float[Tensor, "b m m"],
    G: Float[Tensor, "b m n"],
    kept: float,
    added: float,
    H: Float[Tensor, "b m n"] | None = None,
) -> Float[Tensor, "b m m"]:
    """`kept L + added G G'` (or `G H'`, if that is symmetric), right on and below the diagonal.

    On a processor it is made in stripes of rows up to the diagonal, half of the work (at m = n =
    1024 measured as 0.55 of the whole product); what is above stays as it was.

    Examples:
        >>> L = averaged_gram(torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), 1, 1)
        >>> symmetric(L)[0]
        tensor([[5., 2.],
                [2., 1.]])
    """
    m, H = G.shape[-2], G if H is None else H
    if L.device.type != "cpu" or m < 2 * STRIPE:  # a launch costs more than the work it saves
        return torch.baddbmm(L, G, H.mT, beta=kept, alpha=added)
    L = L.clone()
    for i in range(0, m, STRIPE):
        j = i + STRIPE
        L[:, i:j, :j].baddbmm_(G[:, i:j], H[:, :j].mT, beta=kept, alpha=added)
    return L


def symmetric(L: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """The whole of a symmetric matrix of which the lower triangle is right."""
    S = L.clone()
    for i in range(0, L.shape[-1], STRIPE):
        j = i + STRIPE
        S[:, i:j, j:] = L[:, j:, i:j].mT
        S[:, i:j, i:j] = L[:, i:j, i:j].tril() + L[:, i:j, i:j].tril(-1).mT
    return S


def two_sided(
    P: Float[Tensor, "b k m"] | None, G: Float[Tensor, "b m n"], Q: Float[Tensor, "b n l"] | None
) -> Float[Tensor, "b k l"]:
    """`P G Q`; None is the identity."""
    if P is not None:
        G = P @ G
    return G if Q is None else G @ Q


def items(S: Shaped[Tensor, "b *item"], where: list[int]) -> Shaped[Tensor, "k *item"]:
    """Some items of a stack; the stack itself if they are all."""
    return S if len(where) == len(S) else S[where]


def with_items(
    S: Shaped[Tensor, "b *item"], where: list[int], new: Shaped[Tensor, "k *item"]
) -> Shaped[Tensor, "b *item"]:
    """The stack with some items replaced."""
    if len(where) == len(S):
        return new
    return S.index_copy(0, torch.tensor(where, device=S.device), new)


def of_moderate_size(G: Float[Tensor, "b m n"]) -> Float[Tensor, "b m n"]:
    """Each matrix times a power of 2 that brings its largest entry to between 1/2 and 1.

    So no square of an entry under- or overflows, and nothing is rounded. Zero stays zero.

    Examples:
        >>> of_moderate_size(torch.tensor([[[3e-30, 0.0]]])).amax()
        tensor(0.9507)
    """
    exponent = torch.frexp(G.abs().amax((-2, -1), keepdim=True)).exponent
    lowest = torch.frexp(torch.tensor(torch.finfo(G.dtype).tiny)).exponent.item()
    return torch.ldexp(G, -exponent.clamp_min(int(lowest)))
