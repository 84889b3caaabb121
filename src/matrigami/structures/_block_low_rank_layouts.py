"""Tiles of equal rank, Monarch matrices and block tensor trains: the same numbers in three layouts.

Shapes: i = row blocks of p rows, g = column blocks of q columns, r = rank of a tile.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from matrigami.operators import LinearOperator, Places
from matrigami.structures._block_low_rank import BlockLowRankMatrix
from matrigami.structures._block_tensor_train import BlockTensorTrainMatrix
from matrigami.structures._monarch import MonarchMatrix
from matrigami.structures._permuted import PermutedMatrix

__all__ = ["as_block_low_rank", "as_monarch"]


def as_block_low_rank(A: MonarchMatrix | BlockTensorTrainMatrix) -> LinearOperator:
    """A Monarch matrix, or a block tensor train of two cores, as tiles: the same numbers.

    The rank of a tile is that of the chain: 1 for Monarch with `sqrt(n)` blocks, `r` for BTT(r).
    Interleaved axes are a perfect shuffle around the tiles: a `PermutedMatrix` then.

    Args:
        A: The matrix, or a stack.

    Raises:
        ValueError: If the train has more than two cores.

    Examples:
        >>> from matrigami.structures import Monarch
        >>> as_block_low_rank(Monarch(blocks=2, interleaved=False).init(4, 6))
        BlockLowRankMatrix(4x6, 20 parameters)
    """
    train = A.train if isinstance(A, MonarchMatrix) else A
    if len(train.cores) != 2:
        raise ValueError(
            f"as_block_low_rank(A): A is a train of {len(train.cores)} cores.\n"
            "Only two cores make one grid of tiles."
        )
    first, second = train.cores
    L = second[..., 0, :, 0, :, :, :]  # ... i p g r
    R = first[..., :, 0, :, :, :, 0].movedim(-1, -3).transpose(-2, -1)  # ... g q i r
    tiles = BlockLowRankMatrix(L.flatten(-2, -1), R.flatten(-2, -1))
    if not (train.reversed_rows or train.reversed_columns):
        return tiles
    rows = _shuffle(L.shape[-4], L.shape[-3], train.reversed_rows, L)
    columns = _shuffle(R.shape[-4], R.shape[-3], train.reversed_columns, R)
    return PermutedMatrix(tiles, Places(rows), Places(columns))


def _shuffle(blocks: int, size: int, shuffled: bool, like: Tensor) -> Int[Tensor, " n"]:
    """The place in the blocks of each row of the interleaved layout."""
    order = torch.arange(blocks * size, device=like.device)
    return order.reshape(blocks, size).mT.flatten() if shuffled else order


def as_monarch(A: BlockLowRankMatrix) -> MonarchMatrix:
    """Tiles of equal rank as a Monarch matrix of the blocked layout: the same numbers.

    Raises:
        ValueError: If the ranks differ.

    Examples:
        >>> as_monarch(BlockLowRankMatrix(torch.ones(2, 3, 2), torch.ones(2, 1, 2)))
        MonarchMatrix(6x2, 16 parameters)
    """
    if A.link is not None:
        raise ValueError(
            f"as_monarch(A): the tiles of A, a {A!r}, differ in rank.\n"
            "Project with BlockLowRank(tile, rank) first."
        )
    i, g = A.left.shape[-3], A.right.shape[-3]
    right = A.right.unflatten(-1, (i, -1)).transpose(-3, -2).movedim(-1, -3)  # ... g r i a
    return MonarchMatrix(A.left.unflatten(-1, (g, -1)), right, interleaved_rows=False)
