"""A tensor train of lower ranks, and its norm, core by core: the matrix itself is never formed.

The cores are made orthogonal from the last to the first by QR; then, from the first to the last,
the singular values between two cores are cut off. Each cut is the best one, the whole within
`sqrt(cores - 1)` of it, as for a dense matrix, and the work linear in the number of cores.
Source: Oseledets (2011), SIAM J. Sci. Comput. 33(5), algorithm 2.

Shapes: s, r = ranks before and behind a core, m, n = its rows and columns.
"""

from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    is_big,
    is_differentiated,
    norm,
    root_of_squares,
    round_to,
    truncated_svd,
)
from matrigami.structures._tensor_train import TensorTrain, TensorTrainMatrix

__all__ = []


def _same_axes(A: TensorTrainMatrix, recipe: TensorTrain) -> bool:
    """Whether the cores of a train are those of the recipe; derivatives of QR need full ranks."""
    if not isinstance(recipe, TensorTrain) or (is_differentiated(*A.cores) and not is_big(A)):
        return False
    rows, columns = recipe._axes(*A.shape[-2:])
    return [C.shape[-3:-1] for C in A.cores] == list(zip(rows, columns, strict=True))


@round_to.register(where=_same_axes)
def _(A: TensorTrainMatrix, recipe: Any) -> TensorTrainMatrix:
    cores = _orthogonalized(A)
    axes = recipe._axes(*A.shape[-2:])
    for i, rank in enumerate(recipe._ranks(*axes)[1:-1]):
        s, m, n, r = cores[i].shape[-4:]
        kept = min(rank, s * m * n, r)
        M = cores[i].flatten(-4, -2)
        left, rest = truncated_svd(M, kept, balanced=i == len(cores) - 2)
        following = torch.einsum("...ab,...bmnr->...amnr", rest, cores[i + 1])
        cores[i] = _filled(left, rank).unflatten(-2, (s, m, n))
        wide = _filled(following.flatten(-3, -1).mT, rank).mT
        cores[i + 1] = wide.unflatten(-1, following.shape[-3:])
    return TensorTrainMatrix(tuple(cores))


@norm.register(where=is_big)
def _(A: TensorTrainMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """That of the first core, once the others are orthogonal: no digits cancel in a difference.

    Its derivative comes from Gram matrices of the ranks, core by core.
    """
    G = A.cores[0].new_ones(*A.shape[:-2], 1, 1)
    for C in A.cores:
        half = torch.einsum("...smnr,...st->...tmnr", C, G)
        G = torch.einsum("...tmnr,...tmnu->...ru", half, C.conj())
    with torch.no_grad():
        value = torch.linalg.vector_norm(_orthogonalized(A)[0], dim=(-4, -3, -2, -1))
    return root_of_squares(G[..., 0, 0].real, value)


def _orthogonalized(A: TensorTrainMatrix) -> list[Inexact[Tensor, "*batch s m n r"]]:
    """The cores of the same matrix, all but the first with orthonormal rows."""
    cores = [C.expand(*A.shape[:-2], *C.shape[-4:]) for C in A.cores]
    for i in range(len(cores) - 1, 0, -1):
        m, n, r = cores[i].shape[-3:]
        Q, R = torch.linalg.qr(cores[i].flatten(-3, -1).mH)
        cores[i] = Q.mH.unflatten(-1, (m, n, r))
        cores[i - 1] = torch.einsum("...smna,...ab->...smnb", cores[i - 1], R.mH)
    return cores


def _filled(F: Tensor, rank: int) -> Tensor:
    """Columns of zeros up to the rank of the recipe."""
    return torch.nn.functional.pad(F, (0, rank - F.shape[-1]))
