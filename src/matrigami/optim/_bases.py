"""Two-sided products, and eigenvector bases that follow a slowly changing moment.

One step of orthogonal iteration, `Q <- qr(L Q)`, instead of an eigendecomposition, as in SOAP (Vyas
et al. 2024, arXiv:2409.11321). A refresh is a transaction: a basis that is not orthogonal or not
finite is never taken.

Shapes: b = blocks, m = rows, n = columns; symmetric matrices are m x m.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

LARGE = 128
"""Rows from which stacks are transposed one by one."""

BLOCK = 64
"""Columns that are made orthonormal together."""


class Refresh(NamedTuple):
    """The next basis, which of its columns came from where, and whether it may be used."""

    basis: Float[Tensor, "b m m"]
    order: Int64[Tensor, "b m"]
    sound: Bool[Tensor, " b"]


def eigenbasis(L: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """Eigenvectors, those of the largest eigenvalues first.

    Examples:
        >>> eigenbasis(torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])).abs()
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    return eigenpairs(L)[1].flip(-1)


def eigenpairs(A: Float[Tensor, "b m m"]) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m m"]]:
    """Ascending eigenvalues and eigenvectors; the vectors of what is not finite are NaN."""
    finite = torch.linalg.vector_norm(A, dim=(-2, -1)).isfinite()
    safe = A.where(finite[:, None, None], torch.eye(A.shape[-1], dtype=A.dtype, device=A.device))
    try:
        e, Q = torch.linalg.eigh(safe)
    except RuntimeError:  # LAPACK: clustered eigenvalues in single precision
        e, Q = (S.to(A.dtype) for S in torch.linalg.eigh(safe.double()))
    return e, Q.where(finite[:, None, None], torch.nan)


def refreshed(L: Float[Tensor, "b m m"], Q: Float[Tensor, "b m m"]) -> Refresh:
    """Orthogonal iteration; the columns are first sorted by their Rayleigh quotients.

    Examples:
        >>> L, Q = torch.diag(torch.tensor([4.0, 1.0]))[None], torch.eye(2)[None]
        >>> refreshed(L, Q).order, bool(refreshed(L, Q).sound)
        (tensor([[0, 1]]), True)
    """
    X = L @ Q
    order = (Q * X).sum(-2).argsort(dim=-1, descending=True, stable=True)
    X = row_major(X.gather(-1, order[:, None].expand_as(X)).mT).mT
    basis = orthonormal(X) if X.device.type == "cpu" else torch.linalg.qr(X).Q
    return Refresh(row_major(basis), order, orthogonal(basis))


def orthonormal(X: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """The orthogonal factor of each matrix, by the cheapest way that is accurate for it.

    Block Gram-Schmidt, once more if that was not enough, Householder for the rest. Asking which is
    needed would make the host wait for another device.
    """
    basis = _gram_schmidt(X)
    for again in (True, False):
        bad = (~orthogonal(basis)).nonzero().flatten()
        if not len(bad):
            break
        basis[bad] = _gram_schmidt(basis[bad]) if again else torch.linalg.qr(X[bad]).Q
    return basis


def sorted_rows(X: Float[Tensor, "b m n"], order: Int64[Tensor, "b m"]) -> Float[Tensor, "b m n"]:
    """The rows of each matrix in an order of its own."""
    return X[torch.arange(len(X), device=X.device)[:, None], order]


def row_major(X: Float[Tensor, "b m n"]) -> Float[Tensor, "b m n"]:
    """Contiguous. Torch transposes a matrix by blocks, two to three times faster than a stack."""
    if X.is_contiguous() or X.device.type != "cpu" or X.shape[-1] < LARGE:
        return X.contiguous()
    out = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    for mine, matrix in zip(out, X, strict=True):
        mine.copy_(matrix)
    return out


def orthogonal(Q: Float[Tensor, "b m m"]) -> Bool[Tensor, " b"]:
    """Whether `Q' Q` leaves a test vector as it is, up to rounding; NaN does not."""
    m = Q.shape[-1]
    x = torch.cos(1.7 * torch.arange(1, m + 1, dtype=Q.dtype, device=Q.device))[:, None]
    error = torch.linalg.vector_norm(Q.mT @ (Q @ x) - x, dim=(-2, -1))
    return error <= 100 * m**0.5 * torch.finfo(Q.dtype).eps * torch.linalg.vector_norm(x)


def _gram_schmidt(X: Float[Tensor, "b m m"]) -> Float[Tensor, "b m m"]:
    """The orthogonal factor by blocks of columns, in 0.4 of the time of Householder's.

    Within a block by Cholesky of its Gram matrix, which squares the condition of the block alone;
    then what it spans is taken from all later blocks, so that the small columns near an eigenbasis
    lose what they have of the large ones. Where too little is left of a column, the result is not
    orthogonal. Source: Stathopoulos and Wu (2002), block Gram-Schmidt with Cholesky QR.
    """
    X = X / torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    rows = X.mT
    for i in range(0, rows.shape[-2], BLOCK):
        own, later = rows[:, i : i + BLOCK], rows[:, i + BLOCK :]
        C = torch.linalg.cholesky_ex(own @ own.mT).L
        own.copy_(torch.linalg.solve_triangular(C.mT, own.mT, upper=True, left=False).mT)
        later.baddbmm_(later @ own.mT, own, alpha=-1)
    return X


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
    """Each matrix times a power of 2 that brings its largest entry to between 1/2 and 1, or near.

    So no square of an entry under- or overflows, and nothing is rounded. Zero stays zero.

    Examples:
        >>> of_moderate_size(torch.tensor([[[3e-30, 0.0]]])).amax()
        tensor(0.9507)
        >>> of_moderate_size(torch.tensor([[[1e-300]]], dtype=torch.float64)).item() > 0.5
        True
    """
    exponent = torch.frexp(G.abs().amax((-2, -1), keepdim=True)).exponent
    lowest = math.frexp(torch.finfo(G.dtype).tiny)[1]
    exponent = exponent.clamp(lowest, 1 - lowest)  # of which the powers are normal numbers
    return G * torch.ldexp(torch.ones_like(G[..., :1, :1]), -exponent)  # ldexp of all is slow
