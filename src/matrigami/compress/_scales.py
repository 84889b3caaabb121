"""Scales fitted to codes by least squares, in the metric of the moments.

Shapes: m = rows, n = columns, g = groups of a row.
"""

from dataclasses import replace

import torch
from torch import Tensor

from matrigami.compress._grid import QuantizedMatrix, spread
from matrigami.compress._moments import relative

CG_STEPS = 12
"""Conjugate-gradient steps of a two-sided fit."""


def refitted(value: QuantizedMatrix, W: Tensor, A: Tensor, B: Tensor | None) -> QuantizedMatrix:
    """The scales that are best for the codes, by least squares; one that would vanish stays.

    They move by what the errors ask for, a small number: the products may be of single precision.
    """
    Q = replace(value, scale=torch.ones_like(value.scale)).dense()
    E = W - value.dense()
    if B is None:
        asked = _summed(Q * (E @ A), value.group)[..., None].double()
        move = torch.linalg.solve(_gram(Q, A, value.group).double(), asked)[..., 0].to(W)
    else:
        move = _two_sided_move(Q, E, A, B, value.group)
    moved = value.scale + move
    return replace(value, scale=torch.where(moved > 0, moved, value.scale))


def _gram(Q: Tensor, A: Tensor, size: int) -> Tensor:
    """For every row `Q_g A Q_h.T` of its groups g, h; the diagonal is kept off zero."""
    starts = range(0, Q.shape[-1], size)
    upper = [
        _summed((Q[..., i : i + size] @ A[..., i : i + size, i:]) * Q[..., i:], size)
        for i in starts
    ]
    pad = torch.nn.functional.pad
    N = torch.stack([pad(row, (g, 0)) for g, row in enumerate(upper)], -2)
    d = N.diagonal(dim1=-2, dim2=-1)
    off = torch.where(d > 0, 1e-6 * d, torch.ones_like(d))
    return N + N.triu(1).mT + torch.diag_embed(off)


def _summed(X: Tensor, size: int) -> Tensor:
    """Sums over the columns of each group."""
    n = X.shape[-1]
    return torch.nn.functional.pad(X, (0, -n % size)).unflatten(-1, (-1, size)).sum(-1)


def _two_sided_move(Q: Tensor, E: Tensor, A: Tensor, B: Tensor, size: int) -> Tensor:
    """Conjugate gradients for `sum_g Q (B (Q s) A) = sum_g Q (B E A)`, Jacobi-scaled."""
    n = Q.shape[-1]
    own = _summed(
        (Q @ A.tril(-1).mul(2).add(torch.diag_embed(A.diagonal(dim1=-2, dim2=-1)))) * Q, size
    )
    scaling = (own * B.diagonal(dim1=-2, dim2=-1)[..., None]).clamp_min(1e-30)
    r = _summed(Q * (B @ E @ A), size)
    move, z = torch.zeros_like(r), r / scaling
    p, rho = z, (r * z).sum((-2, -1), keepdim=True)
    for _ in range(CG_STEPS):
        q = _summed(Q * (B @ (Q * spread(p, size, n)) @ A), size)
        step = relative(rho, (p * q).sum((-2, -1), keepdim=True))
        move, r = move + step * p, r - step * q
        z = r / scaling
        rho, last = (r * z).sum((-2, -1), keepdim=True), rho
        p = z + relative(rho, last) * p
    return move
