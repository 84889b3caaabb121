"""Monarch: two block-diagonal matrices around perfect shuffles.

`W[(j, i), (g, a)] = sum_r left[i, j, g, r] right[g, r, i, a]`: a `b x b` grid of tiles of rank
`r`, one for each output block `i` and input block `g`; the output axes are interleaved, `(j, i)`,
as in the paper, or blocked, `(i, j)`. It is a block tensor train of two cores, which gives it its
rules.

Storage and cost per vector: `r b (m + n)`, for the square default `r = min(m, n) / b^2` about `2
n^2 / b`. Projection: one truncated SVD for each tile, the best approximation for any block counts
and rank. A square Monarch matrix whose blocks are square is solved block by block. Source: Dao et
al. (2022), arXiv:2204.00595; in the blocked layout, Qiu et al. (2024), arXiv:2406.06248.

Shapes: m = rows, n = columns, b = blocks, r = rank of a tile, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Fan,
    LinearOperator,
    Structure,
    TwoFactors,
    add,
    as_two_factors,
    chained,
    contraction,
    contractions,
    cropped,
    diagonal,
    entries,
    example,
    fans,
    inverse,
    is_big,
    is_written_in_place,
    norm,
    padded_size,
    project,
    resolve_blocks,
    resolve_rank,
    scale,
    slogdet,
    solve,
    two_factors,
)
from matrigami.structures._block_tensor_train import (
    BlockTensorTrainMatrix,
    block_tensor_train_svd,
    layout,
)

__all__ = ["Monarch", "MonarchMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class MonarchMatrix(LinearOperator):
    """The matrix of tiles `left[i, :, g] @ right[g, :, i]`.

    Args:
        left: Second factor, `b_out` output blocks of `j` rows.
        right: First factor, `b_in` input blocks of `a` columns.
        interleaved_rows: Output axes `(j, i)` instead of `(i, j)`.
        interleaved_columns: Input axes `(a, g)` instead of `(g, a)`.
    """

    left: Inexact[Tensor, "*batch i j g r"]
    right: Inexact[Tensor, "*batch g r i a"]
    interleaved_rows: bool = True
    interleaved_columns: bool = False

    @property
    def train(self) -> BlockTensorTrainMatrix:
        """The same matrix as a block tensor train, sharing storage."""
        cores = (self.right[..., :, None, :, :, :, None], self.left[..., None, :, None, :, :, :])
        return BlockTensorTrainMatrix(cores, self.interleaved_rows, self.interleaved_columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return self.train.shape

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Two batched products on views."""
        if is_written_in_place(X, self.right, self.left) and self.right.ndim == self.left.ndim == 4:
            return two_factors(X, **_factors(self)._asdict())
        return self.train.matmat(X)

    @property
    def T(self) -> "MonarchMatrix":
        """Swap the factors and the layouts."""
        return _monarch(self.train.T)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.train.dense()


@example("monarch", blocks=2, pad=True)
@dataclass(frozen=True)
class Monarch(Structure):
    """Monarch matrices with `blocks x blocks` tiles.

    Args:
        blocks: Number of input and of output blocks, or a fraction of `min(m, n)`.
        rank: Rank of a tile, an int or a fraction of full; by default the largest for which both
            factors have square or smaller blocks, `ceil(min(m, n) / blocks^2)`, as in Dao et al.
            (2022).
        interleaved: Output axes interleaved (the paper's) or blocked (no shuffle of the output,
            faster).
        pad: Pad a size that the blocks do not divide, instead of refusing it.

    Examples:
        >>> Monarch(blocks=4).init(16, 16)
        MonarchMatrix(16x16, 128 parameters)
    """

    blocks: float
    rank: float | None = None
    interleaved: bool = True
    pad: bool = False

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If the blocks do not divide the size (unless `pad`), or the rank is out of
                range.
        """
        M, N, b, r = self._sizes(m, n)
        left = empty(b, M // b, b, r)
        right = empty(b, r, b, N // b)
        return cropped(MonarchMatrix(left, right, self.interleaved), m, n)

    def _sizes(self, m: int, n: int) -> tuple[int, int, int, int]:
        """Padded rows and columns, the number of blocks and the rank of a tile."""
        b = resolve_blocks(self.blocks, m, n, str(self))
        if (m % b or n % b) and not self.pad:
            raise ValueError(
                f"{self} cannot be {m}x{n}: {b} blocks do not divide it.\n"
                "Give a number of blocks that divides both sizes, or pad=True."
            )
        M, N = padded_size(m, b), padded_size(n, b)
        full = min(M, N) // b
        rank = max(math.ceil(full / b), 1) if self.rank is None else self.rank
        return M, N, b, resolve_rank(rank, full, str(self))


def _monarch(train: BlockTensorTrainMatrix) -> MonarchMatrix:
    """A train of two cores as left and right factor."""
    first, second = train.cores
    return MonarchMatrix(
        second[..., 0, :, 0, :, :, :],
        first[..., :, 0, :, :, :, 0],
        train.reversed_rows,
        train.reversed_columns,
    )


@as_two_factors.register
def _factors(A: MonarchMatrix) -> TwoFactors:
    return TwoFactors(A.right, A.left, A.interleaved_rows, A.interleaved_columns)


@fans.register
def _(A: MonarchMatrix) -> tuple[Fan, ...]:
    return tuple(reversed(fans(A.train)))


@contractions.register
def _(A: MonarchMatrix) -> tuple[Contraction, ...]:
    (i, j, g, r), a = A.left.shape[-4:], A.right.shape[-1]
    sizes = {"i": i, "j": j, "g": g, "r": r, "a": a}
    columns, rows = (
        "a g" if A.interleaved_columns else "g a",
        "j i" if A.interleaved_rows else "i j",
    )
    right = contraction(A.right, "g r i a", columns, "g r i", **sizes)
    left = contraction(A.left, "i j g r", "g r i", rows, **sizes)
    return tuple(reversed(chained(right, left)))


@add.register(where=lambda A, B: layout(A.train) == layout(B.train))
def _(A: MonarchMatrix, B: MonarchMatrix) -> MonarchMatrix:
    return _monarch(add(A.train, B.train))  # pyright: ignore[reportArgumentType]


@scale.register
def _(A: MonarchMatrix, factor: Tensor) -> LinearOperator:
    return _monarch(scale(A.train, factor))  # pyright: ignore[reportArgumentType]


@solve.register
def _(A: MonarchMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve(A.train, B)


@inverse.register
def _(A: MonarchMatrix) -> LinearOperator:
    inverted = inverse(A.train)
    return _monarch(inverted) if isinstance(inverted, BlockTensorTrainMatrix) else inverted


@slogdet.register
def _(A: MonarchMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return slogdet(A.train)


@entries.register
def _(A: MonarchMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return entries(A.train, rows, columns)


@diagonal.register
def _(A: MonarchMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal(A.train)


@norm.register(where=is_big)
def _(A: MonarchMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return norm(A.train)


@project.register
def _(recipe: Monarch, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    M, N, b, r = recipe._sizes(m, n)
    D = torch.nn.functional.pad(W, (0, N - n, 0, M - m))
    if recipe.interleaved:
        D = D.unflatten(-2, (M // b, b)).transpose(-3, -2).flatten(-3, -2)
    cores = block_tensor_train_svd(D, (b, M // b), (N // b, b), r, str(recipe))
    return cropped(_monarch(BlockTensorTrainMatrix(cores, recipe.interleaved)), m, n)
