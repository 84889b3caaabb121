"""Block cyclic reduction: every second block is eliminated, again and again, in batches.

With the odd blocks gone, the even ones make a block tridiagonal matrix of half the size, and the
determinant is that of all blocks that went: `log2(h)` steps, each differentiable, on any device.
There is no pivoting between blocks. Source: Hockney (1965), J. ACM 12(1); Heller (1976), SIAM J.
Numer. Anal. 13(4), for its stability.

Shapes: h = blocks of w rows.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._kernels import lu_slogdet, lu_solve


def reduced_slogdet(
    L: Inexact[Tensor, "*batch h w w"],
    D: Inexact[Tensor, "*batch h w w"],
    U: Inexact[Tensor, "*batch h w w"],
) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Sign and logarithm of the determinant of a block tridiagonal matrix.

    Args:
        L: What is left of each diagonal block; a power of two of them.
        D: The diagonal blocks.
        U: What is right of them.
    """
    if D.shape[-3] == 1:
        return lu_slogdet(D[..., 0, :, :])
    odd = slice(1, None, 2)
    sign, log = lu_slogdet(D[..., odd, :, :])
    to_left, to_right = (lu_solve(D[..., odd, :, :], F[..., odd, :, :]) for F in (L, U))
    L, D, U = L[..., ::2, :, :], D[..., ::2, :, :], U[..., ::2, :, :]
    pad = torch.nn.functional.pad
    before_left, before_right = (
        pad(F[..., :-1, :, :], (0, 0, 0, 0, 1, 0)) for F in (to_left, to_right)
    )
    D = D - L @ before_right - U @ to_left
    sign_rest, log_rest = reduced_slogdet(-L @ before_left, D, -U @ to_right)
    return sign.prod(-1) * sign_rest, log.sum(-1) + log_rest
