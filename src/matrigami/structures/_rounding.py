"""The nearest member of a lower rank, from the factors: the matrix itself is never formed.

A block `U V.T` of rank `r` is cut to its largest singular values between orthonormal bases of its
factors, in `O((m + n) r^2)`. Block by block that is the projection for HODLR, block low rank,
Monarch, block tensor trains of two cores and einsums: their blocks do not overlap. Onto low rank
the leading singular vectors lead, wherever a structure knows its own.

Shapes: m = rows, n = columns, r, s = old and new rank; those of the factors as in their files.
"""

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    LinearOperator,
    Structure,
    columns,
    conj,
    differentiated,
    is_big,
    norm,
    resolve_rank,
    round_to,
    svd,
)
from matrigami.structures._block_low_rank import (
    BlockLowRank,
    BlockLowRankMatrix,
    tiles_worth_most,
)
from matrigami.structures._block_low_rank_layouts import tile_factors
from matrigami.structures._block_tensor_train import (
    BlockTensorTrain,
    BlockTensorTrainMatrix,
    all_ranks,
)
from matrigami.structures._einsum import Einsum, EinsumMatrix
from matrigami.structures._hodlr import HODLR, HODLRMatrix, levels_worth_most
from matrigami.structures._hodlr_factors import siblings
from matrigami.structures._low_rank import LowRank, LowRankMatrix, lower_rank, orthogonalized
from matrigami.structures._monarch import Monarch, MonarchMatrix

__all__ = []

Pair = tuple[Tensor, Tensor]


def _filled(U: Inexact[Tensor, "*batch m r"], V: Inexact[Tensor, "*batch n r"], rank: int) -> Pair:
    """The factors of the nearest blocks of a rank, with zeros where there are fewer columns."""
    A = lower_rank(LowRankMatrix(U, V), rank)
    pad = (0, rank - A.U.shape[-1])
    return torch.nn.functional.pad(A.U, pad), torch.nn.functional.pad(A.V, pad)


def _plain(A: LinearOperator) -> bool:
    """Whether factors may be made orthogonal: the derivative of QR needs full ranks."""
    return is_big(A) or not differentiated(A)


def _same_leaves(A: HODLRMatrix, recipe: Any) -> bool:
    """Whether the recipe asks for the blocks that are there."""
    if not isinstance(recipe, HODLR) or not _plain(A):
        return False
    levels, p, q = recipe._sizes(*A.shape[-2:])
    return len(A.left) == levels and A.leaves.shape[-3:] == (2**levels, p, q)


@round_to.register(where=_same_leaves)
def _(A: HODLRMatrix, recipe: Any) -> HODLRMatrix:
    _, p, q = recipe._sizes(*A.shape[-2:])
    levels = [(U, siblings(V)) for U, V in zip(A.left, A.right, strict=True)]
    if recipe.rank is None:
        pairs = _to_tolerance(levels, recipe.tol * norm(A.detach()))
    else:
        rank = resolve_rank(recipe.rank, min(p, q), str(recipe)) if A.left else 0
        pairs = [_filled(U, V, rank) for U, V in levels]
    left = tuple([U for U, _ in pairs])
    return HODLRMatrix(A.leaves.clone(), left, tuple([siblings(V) for _, V in pairs]))


def _to_tolerance(levels: list[Pair], error: Tensor) -> list[Pair]:
    """The fewest columns of all levels that leave out no more than an error."""
    bases = [orthogonalized(LowRankMatrix(U, V)) for U, V in levels]
    prices = [U.shape[-2] + V.shape[-2] for U, V in levels]
    cores = levels_worth_most([core for _, core, _ in bases], error, prices)
    return [(Q1 @ L, Q2 @ R.mT) for (Q1, _, Q2), (L, R) in zip(bases, cores, strict=True)]


def _same_tiles(A: BlockLowRankMatrix, recipe: Any) -> bool:
    """Whether the recipe asks for the tiles that are there."""
    b = recipe.tile if isinstance(recipe, BlockLowRank) else 0
    return A.left.shape[-2] == A.right.shape[-2] == b and _plain(A)


@round_to.register(where=_same_tiles)
def _(A: BlockLowRankMatrix, recipe: Any) -> BlockLowRankMatrix:
    m, n = A.shape[-2:]
    recipe._grid(m, n)
    U, V = tile_factors(A)
    if recipe.rank is None:
        left, values, right = svd(LowRankMatrix(U, V))
        root = values.sqrt()[..., None, :]
        parts = left.dense() * root, values, (right.dense().conj() * root).mT
        return tiles_worth_most(recipe, parts, m * n)
    U, V = _filled(U, V, resolve_rank(recipe.rank, recipe.tile, str(recipe)))
    left, right = U.transpose(-3, -2).flatten(-2), V.movedim(-4, -2).flatten(-2)
    return BlockLowRankMatrix(left, right)


def _of_two(left: Tensor, right: Tensor, rank: int) -> Pair:
    """Factors `left[i j g r]`, `right[g r i a]` with tiles of another rank."""
    U = left.transpose(-3, -2)  # ... i g j r
    V = right.movedim((-4, -3, -2, -1), (-3, -1, -4, -2))  # ... i g a r
    U, V = _filled(U, V, rank)
    return U.transpose(-3, -2), V.movedim((-3, -1, -4, -2), (-4, -3, -2, -1))


def _same_blocks(A: MonarchMatrix, recipe: Any) -> bool:
    """Whether the recipe asks for the tiles that are there, in their layout."""
    if not isinstance(recipe, Monarch) or not _plain(A):
        return False
    M, N, b, _ = recipe._sizes(*A.shape[-2:])
    layout = (recipe.interleaved, False) == (A.interleaved_rows, A.interleaved_columns)
    return layout and A.shape[-2:] == (M, N) and A.left.shape[-4] == A.right.shape[-4] == b


@round_to.register(where=_same_blocks)
def _(A: MonarchMatrix, recipe: Any) -> MonarchMatrix:
    rank = recipe._sizes(*A.shape[-2:])[-1]
    return MonarchMatrix(*_of_two(A.left, A.right, rank), recipe.interleaved)


def _same_cores(A: BlockTensorTrainMatrix, recipe: Any) -> bool:
    """Whether the recipe asks for two cores of these sizes, in this layout."""
    if not isinstance(recipe, BlockTensorTrain) or len(A.cores) != 2 or not _plain(A):
        return False
    layout = (recipe.interleaved, False) == (A.reversed_rows, A.reversed_columns)
    sizes = list(zip(*recipe._axes(*A.shape[-2:]), strict=True))
    return layout and [C.shape[-3:-1] for C in A.cores] == sizes


@round_to.register(where=_same_cores)
def _(A: BlockTensorTrainMatrix, recipe: Any) -> BlockTensorTrainMatrix:
    first, second = A.cores
    left, right = second[..., 0, :, 0, :, :, :], first[..., :, 0, :, :, :, 0]
    rows, columns = recipe._axes(*A.shape[-2:])
    left, right = _of_two(left, right, all_ranks(rows, columns, recipe.rank, str(recipe))[1])
    cores = (right[..., :, None, :, :, :, None], left[..., None, :, None, :, :, :])
    return BlockTensorTrainMatrix(cores, recipe.interleaved)


def _same_dims(A: EinsumMatrix, recipe: Any) -> bool:
    """Whether the recipe asks for these sizes but the rank, in this layout."""
    if not isinstance(recipe, Einsum) or not _plain(A):
        return False
    layout = (recipe.interleaved, False) == (A.interleaved_rows, A.interleaved_columns)
    return layout and tuple(recipe._sizes(*A.shape[-2:])[:6]) == A.dims[:6]


@round_to.register(where=_same_dims)
def _(A: EinsumMatrix, recipe: Any) -> EinsumMatrix:
    alpha, beta, _, delta, eps, _, _ = A.dims
    U = A.A.movedim((-5, -4, -3, -2, -1), (-4, -1, -5, -3, -2))  # ... phi gamma delta alpha rho
    V = A.B.movedim((-5, -4, -3, -2, -1), (-5, -3, -4, -2, -1))  # ... phi gamma eps beta rho
    U, V = _filled(U.flatten(-3, -2), V.flatten(-3, -2), recipe._sizes(*A.shape[-2:])[-1])
    U, V = U.unflatten(-2, (delta, alpha)), V.unflatten(-2, (eps, beta))
    return EinsumMatrix(
        U.movedim((-4, -1, -5, -3, -2), (-5, -4, -3, -2, -1)),
        V.movedim((-5, -3, -4, -2, -1), (-5, -4, -3, -2, -1)),
        recipe.interleaved,
    )


@round_to.register(
    where=lambda A, recipe: (
        isinstance(recipe, LowRank) and type(A) in svd.rules and not differentiated(A)
    )
)
def _(A: LinearOperator, recipe: Structure) -> LowRankMatrix:
    """The leading singular vectors, each scaled by the root of its value."""
    U, values, V = svd(A)
    rank = min(recipe._rank(*A.shape[-2:]), values.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]
    order = values.argsort(dim=-1, descending=True)[..., :rank]
    root = values.take_along_dim(order, -1).sqrt()[..., None, :]
    left, right = columns(U, order) * root, columns(conj(V), order) * root
    return LowRankMatrix(left.to(A.dtype), right.to(A.dtype))
