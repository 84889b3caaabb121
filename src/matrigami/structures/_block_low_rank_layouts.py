"""Tiles of equal rank, Monarch matrices and block tensor trains: the same numbers in three layouts.

Shapes: i = row blocks of p rows, g = column blocks of q columns, r = rank of a tile.
"""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.operators import LinearOperator, Places, add
from matrigami.structures._block_low_rank import BlockLowRankMatrix, counted
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


def tile_factors(
    A: BlockLowRankMatrix,
) -> tuple[Inexact[Tensor, "*batch i g p r"], Inexact[Tensor, "*batch i g q r"]]:
    """The factors of every tile, with zeros where ranks differ.

    Examples:
        >>> from matrigami.structures import BlockLowRank
        >>> U, V = tile_factors(BlockLowRank(tile=2, rank=1).init(4, 6))
        >>> U.shape, V.shape
        (torch.Size([2, 3, 2, 1]), torch.Size([2, 3, 2, 1]))
    """
    (i, p), (g, q, s) = A.left.shape[-3:-1], A.right.shape[-3:]
    if A.link is None:
        U = A.left.unflatten(-1, (g, -1)).transpose(-3, -2)  # ... i g p r
        return U, A.right.unflatten(-1, (i, -1)).movedim(-2, -4)
    link = A.link.on(A.device)
    row, place = (link < g * s).nonzero(as_tuple=True)
    column = link[row, place]
    owner = row * g + column // s
    at = counted(owner)
    r = int(at.max()) + 1 if len(at) else 0
    parts = []
    for columns, size in (
        (A.left.mT[..., row, place, :], p),
        (A.right.mT.flatten(-3, -2)[..., column, :], q),
    ):
        F = columns.new_zeros(*columns.shape[:-2], i * g * r, size)
        F = F.index_add(-2, owner * r + at, columns)
        parts.append(F.unflatten(-2, (i, g, r)).mT)
    return parts[0], parts[1]


def _one_grid(A: BlockLowRankMatrix, B: BlockLowRankMatrix) -> bool:
    """Whether two matrices have tiles of one size, with ranks of their own."""
    grids = [(M.left.shape[-3:-1], M.right.shape[-3:-1]) for M in (A, B)]
    return grids[0] == grids[1] and not (A.link is None and B.link is None)


@add.register(where=_one_grid)
def _(A: BlockLowRankMatrix, B: BlockLowRankMatrix) -> BlockLowRankMatrix:
    """The coefficients of both side by side, each handed over as before."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    g, sizes = A.right.shape[-3], [M.right.shape[-1] for M in (A, B)]
    links = [
        _moved(_link(M), g, size, (start, sum(sizes)))
        for M, size, start in zip((A, B), sizes, (0, sizes[0]), strict=True)
    ]
    left, right = (
        torch.cat([F.expand(*batch, *F.shape[-3:]) for F in pair], -1)
        for pair in ((A.left, B.left), (A.right, B.right))
    )
    return BlockLowRankMatrix(left, right, Places(torch.cat(links, -1)))


def _link(A: BlockLowRankMatrix) -> Int[Tensor, "i t"]:
    """The places of the coefficients, of equal ranks too."""
    if A.link is not None:
        return A.link.on(A.device)
    (i, t), (g, s) = (F.shape[-3::2] for F in (A.left, A.right))
    places = torch.arange(g * s, device=A.device).reshape(g, i, -1)
    return places.transpose(0, 1).reshape(i, t)


def _moved(link: Int[Tensor, "i t"], g: int, s: int, to: tuple[int, int]) -> Int[Tensor, "i t"]:
    """The places where each column block has more coefficients, these from a start on."""
    start, size = to
    column, at = link // max(s, 1), link % max(s, 1)
    return torch.where(link < g * s, column * size + start + at, g * size)
