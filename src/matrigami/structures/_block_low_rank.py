"""Block low rank (BLR): a grid of tiles, each of low rank.

`A = diag(left) P diag(right).T`: every column block is compressed into coefficients by its `right`,
a permutation hands them over, and every row block expands by its `left` those that belong to it.
With equal ranks the permutation is a perfect shuffle, a view, and `A` is a Monarch matrix of the
blocked layout; with ranks that differ it is a list of indices.

Storage and cost per vector: `p + q` for each rank of each tile, `r n (m / p + ...)` in all; square
tiles of side `b` in an `n x n` matrix: `2 r n^2 / b`. Projection: one SVD for each tile, the best
approximation for the given ranks; with a budget or a tolerance the singular values of all tiles
compete, which is the best choice of ranks too: no other one has a smaller error with as many
numbers. A near tile of full rank takes part, and loses what is not worth its `p + q` numbers; kept
whole it would be exact, and take twice its dense size. Where most near tiles have full rank take
HODLR or H2, which store them dense. `solve` and `slogdet` of large ones by block LU
(`_block_low_rank_factors.py`). Source: Amestoy, Buttari, L'Excellent and Mary
(2017), SIAM J. Sci. Comput. 39(4); as layers, Monarch (rank 1) and BTT (rank r), Qiu et al. (2024),
arXiv:2406.06248.

Shapes: i = row blocks of p rows, g = column blocks of q columns, r = rank of a tile, t, s =
coefficients of a row block and of a column block, m = rows, n = columns, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor

from matrigami.krylov import implicit_solve, is_large, solve_iteratively
from matrigami.operators import (
    Contraction,
    CroppedMatrix,
    Fan,
    LinearOperator,
    Places,
    Structure,
    add,
    composed,
    contraction,
    contractions,
    cropped,
    differentiated,
    entries,
    example,
    fans,
    padded_size,
    project,
    resolve_rank,
    scale,
    slogdet,
    solve,
    truncated_svd,
)
from matrigami.structures._block_low_rank_factors import tiles_slogdet, tiles_solve
from matrigami.structures._sparse import SparseMatrix

__all__ = ["BlockLowRank", "BlockLowRankMatrix", "joined_tiles"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockLowRankMatrix(LinearOperator):
    """A grid of low-rank tiles.

    Args:
        left: For each row block, the columns by which its coefficients expand.
        right: For each column block, the columns that make its coefficients.
        link: For each coefficient of each row block its place `g s` among those of the column
            blocks, and `g s` in all for none; None for equal ranks: `s = i r`, `t = g r`.

    Examples:
        >>> BlockLowRankMatrix(torch.ones(2, 3, 2), torch.ones(2, 1, 2)).shape
        (6, 2)
    """

    left: Inexact[Tensor, "*batch i p t"]
    right: Inexact[Tensor, "*batch g q s"]
    link: Places | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(self.left.shape[:-3], self.right.shape[:-3])
        (i, p), (g, q) = self.left.shape[-3:-1], self.right.shape[-3:-1]
        return (*batch, i * p, g * q)

    @property
    def rank(self) -> int:
        """The rank of a tile; of the largest one where they differ it is at most this."""
        return max(self.left.shape[-1] // self.right.shape[-3], 1)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Two batched products around a permutation."""
        g, q, _ = self.right.shape[-3:]
        Z = self.right.mT @ X.unflatten(-2, (g, q))  # ... g s k
        if self.link is None:
            i = self.left.shape[-3]
            Z = Z.unflatten(-2, (i, -1)).transpose(-4, -3).flatten(-3, -2)  # ... i (g r) k
        else:
            Z = torch.nn.functional.pad(Z.flatten(-3, -2), (0, 0, 0, 1))[
                ..., self.link.on(X.device), :
            ]
        return (self.left @ Z).flatten(-3, -2)

    @property
    def T(self) -> "BlockLowRankMatrix":
        """Left and right change places, and the permutation is inverted."""
        link = None if self.link is None else Places(_inverted(self.link.index, self.right))
        return BlockLowRankMatrix(self.right, self.left, link)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        i, g = self.left.shape[-3], self.right.shape[-3]
        if self.link is not None:
            return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))
        L, R = self.left.unflatten(-1, (g, -1)), self.right.unflatten(-1, (i, -1))
        D = torch.einsum("...ipgr,...gqir->...ipgq", L, R)
        return D.flatten(-4, -3).flatten(-2, -1)


def _inverted(link: Int[Tensor, "i t"], right: Tensor) -> Int[Tensor, "g s"]:
    """The place of each coefficient of a column block among those of the row blocks."""
    g, _, s = right.shape[-3:]
    places = torch.full((g * s + 1,), link.numel(), device=link.device, dtype=link.dtype)
    order = torch.arange(link.numel(), device=link.device, dtype=link.dtype)
    return places.scatter(0, link.flatten(), order)[:-1].reshape(g, s)


@example("blr", tile=4, rank=1)
@dataclass(frozen=True)
class BlockLowRank(Structure):
    """Matrices of `tile x tile` blocks of low rank; a size that tiles do not divide is padded.

    Exactly one of `rank`, `budget` and `tol` is given; only with `rank` the shapes are known before
    the matrix is, so that members can be drawn.

    Args:
        tile: Rows and columns of a tile.
        rank: The rank of every tile, an int or a fraction of `tile`.
        budget: Stored numbers as a fraction of the dense matrix: ranks go where they are worth
            most.
        tol: Relative error in the Frobenius norm of the whole: the fewest numbers that reach it.
            No tile is exempt, dense ones on the diagonal neither.

    Examples:
        >>> BlockLowRank(tile=4, rank=1).init(8, 8)
        BlockLowRankMatrix(8x8, 32 parameters)
    """

    tile: int
    rank: float | None = None
    budget: float | None = None
    tol: float | None = None

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If no rank is given, or it does not fit.
        """
        i, g = self._grid(m, n)
        if self.rank is None:
            raise ValueError(
                f"{self} cannot be drawn as {m}x{n}: the ranks follow from a matrix.\n"
                "Use project(recipe, W), or give a rank."
            )
        r = resolve_rank(self.rank, self.tile, str(self))
        left, right = empty(i, self.tile, g * r), empty(g, self.tile, i * r)
        return cropped(BlockLowRankMatrix(left, right), m, n)

    def _grid(self, m: int, n: int) -> tuple[int, int]:
        """Row and column blocks.

        Raises:
            ValueError: If the tile is empty, or not exactly one of the three ways is given.
        """
        given = [name for name in ("rank", "budget", "tol") if getattr(self, name) is not None]
        if self.tile < 1 or len(given) != 1:
            raise ValueError(
                f"{self}: the tile has {self.tile} rows, and {', '.join(given) or 'no rank'} "
                "is given.\n"
                "Give a tile of at least 1, and one of rank, budget and tol."
            )
        return padded_size(m, self.tile) // self.tile, padded_size(n, self.tile) // self.tile


@fans.register
def _(A: BlockLowRankMatrix) -> tuple[Fan, ...]:
    (p, t), (q, s) = A.left.shape[-2:], A.right.shape[-2:]
    return Fan(t, p, last=True), Fan(q, s)


@contractions.register
def _(A: BlockLowRankMatrix) -> tuple[Contraction, ...]:
    (i, p, t), (g, q, s) = A.left.shape[-3:], A.right.shape[-3:]
    if A.link is None:
        r = t // g
        sizes = {"i": i, "p": p, "g": g, "q": q, "r": r}
        right = contraction(A.right, "g q (i r)", "g q", "g i r", **sizes)
        left = contraction(A.left, "i p (g r)", "g i r", "i p", **sizes)
        return Contraction(left, right), Contraction(right, None, left)
    right = contraction(A.right, "g q s", "g q", "g s", g=g, q=q, s=s)
    left = contraction(A.left, "i p t", "i t", "i p", i=i, p=p, t=t)
    link = _selection(A.link.on(A.device), g * s, A.left)
    return (
        composed(Contraction(left), before=link @ right),
        composed(Contraction(right), after=left @ link),
    )


def _selection(link: Int[Tensor, "i t"], size: int, like: Tensor) -> SparseMatrix:
    """The permutation as a matrix of ones."""
    places = link.flatten()
    used = places < size
    ones = like.new_ones(int(used.sum()))
    pointers = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    return SparseMatrix(ones, places[used], pointers, (len(places), size))


def _same_tiles(A: BlockLowRankMatrix, B: BlockLowRankMatrix) -> bool:
    """Whether two matrices have one grid, and equal ranks in it."""
    grids = [(M.left.shape[-3:-1], M.right.shape[-3:-1], M.link) for M in (A, B)]
    return grids[0] == grids[1] and A.link is None


@add.register(where=_same_tiles)
def _(A: BlockLowRankMatrix, B: BlockLowRankMatrix) -> BlockLowRankMatrix:
    """The ranks add up, tile by tile."""
    i, g = A.left.shape[-3], A.right.shape[-3]
    return BlockLowRankMatrix(_beside(A.left, B.left, g), _beside(A.right, B.right, i))


def _beside(F: Tensor, G: Tensor, blocks: int) -> Tensor:
    """The factors of two sums, tile by tile one after the other."""
    batch = torch.broadcast_shapes(F.shape[:-3], G.shape[:-3])
    parts = [M.expand(*batch, *M.shape[-3:]).unflatten(-1, (blocks, -1)) for M in (F, G)]
    return torch.cat(parts, -1).flatten(-2, -1)


@scale.register
def _(A: BlockLowRankMatrix, factor: Tensor) -> BlockLowRankMatrix:
    return BlockLowRankMatrix(A.left * factor[..., None, None, None], A.right, A.link)


@entries.register(where=lambda A, rows, columns: A.link is None)
def _(A: BlockLowRankMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    (i, p), (g, q) = A.left.shape[-3:-1], A.right.shape[-3:-1]
    L, R = A.left.unflatten(-1, (g, -1)), A.right.unflatten(-1, (i, -1))
    above, before = rows // p, columns // q
    return (L[..., above, rows % p, before, :] * R[..., before, columns % q, above, :]).sum(-1)


def _factorizable(A: LinearOperator, *_: Any) -> bool:
    """Whether this is a large square matrix, or the corner of one, of square tiles."""
    M: Any = A.padded if isinstance(A, CroppedMatrix) else A
    if not isinstance(M, BlockLowRankMatrix) or A.shape[-1] != A.shape[-2] or len(A.shape) > 2:
        return False
    return M.left.shape[-3:-1] == M.right.shape[-3:-1] and is_large(A)


def _by_tiles(A: Any, B: Tensor) -> Tensor:
    """Block LU where that applies: the derivative may ask for stacks."""
    if not _factorizable(A) or B.ndim > 2 or not B.numel():
        return solve_iteratively(A, B)
    return tiles_solve(A.padded if isinstance(A, CroppedMatrix) else A, A.shape[-1], B)


@solve.register(where=_factorizable)
def _(A: BlockLowRankMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, _by_tiles)


@solve.register(where=_factorizable)
def _(A: CroppedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, _by_tiles)


def _has_log_determinant(A: Any) -> bool:
    """Whether tiles have it, and its derivative if that is asked for: where they are real."""
    return _factorizable(A) and not (A.dtype.is_complex and differentiated(A))


@slogdet.register(where=_has_log_determinant)
def _(A: BlockLowRankMatrix) -> tuple[Inexact[Tensor, ""], Inexact[Tensor, ""]]:
    return tiles_slogdet(A, A.shape[-1])


@slogdet.register(where=_has_log_determinant)
def _(A: CroppedMatrix) -> tuple[Inexact[Tensor, ""], Inexact[Tensor, ""]]:
    return tiles_slogdet(A.padded, A.rows)


@project.register
def _(recipe: BlockLowRank, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    i, g = recipe._grid(m, n)
    b = recipe.tile
    D = torch.nn.functional.pad(W, (0, g * b - n, 0, i * b - m))
    tiles = D.unflatten(-2, (i, b)).unflatten(-1, (g, b)).transpose(-3, -2)  # ... i g p q
    if recipe.rank is not None:
        L, R = truncated_svd(tiles, resolve_rank(recipe.rank, b, str(recipe)))
        left = L.movedim(-3, -2).flatten(-2, -1)
        right = R.movedim((-4, -3, -2, -1), (-2, -4, -1, -3)).flatten(-2, -1)
        return cropped(BlockLowRankMatrix(left, right), m, n)
    L, R = truncated_svd(tiles, b)
    values = torch.linalg.svdvals(tiles.detach())
    return cropped(tiles_worth_most(recipe, (L, values, R), m * n), m, n)


def tiles_worth_most(
    recipe: BlockLowRank, parts: tuple[Tensor, Tensor, Tensor], entries: int
) -> BlockLowRankMatrix:
    """Of tiles `L R` with their singular values those columns that the recipe pays for."""
    L, values, R = parts
    kept = _worth_most(values, recipe.tol, recipe.budget, entries / (2 * recipe.tile))
    return _linked(L, R, kept)


def _worth_most(
    values: Float[Tensor, "*batch i g b"], tol: float | None, budget: float | None, dense: float
) -> Bool[Tensor, "i g b"]:
    """The singular values to keep: all tiles compete, for every one costs the same."""
    energy = values.square().flatten(0, -4).sum(0) if values.ndim > 3 else values.square()
    sizes, order = energy.flatten().sort(descending=True, stable=True)
    if tol is None:
        count = math.floor((budget or 0.0) * dense)
    else:
        left_out = sizes.flip(0).cumsum(0).flip(0)  # by keeping those before
        count = int((left_out > tol**2 * sizes.sum()).sum())
    kept = torch.zeros(energy.numel(), dtype=torch.bool, device=energy.device)
    kept[order[: max(count, 1)]] = True
    return kept.reshape(energy.shape)


def _linked(
    L: Inexact[Tensor, "*batch i g p b"],
    R: Inexact[Tensor, "*batch i g b q"],
    kept: Bool[Tensor, "i g b"],
) -> BlockLowRankMatrix:
    """The kept columns of all tiles."""
    row, column, index = kept.nonzero(as_tuple=True)
    U, V = L.transpose(-2, -1)[..., row, column, index, :], R[..., row, column, index, :]
    return joined_tiles(row, column, U, V, (kept.shape[0], kept.shape[1]))


def joined_tiles(
    row: Int[Tensor, " e"],
    column: Int[Tensor, " e"],
    U: Inexact[Tensor, "*batch e p"],
    V: Inexact[Tensor, "*batch e q"],
    grid: tuple[int, int],
) -> BlockLowRankMatrix:
    """The sum of `U_e V_e.T`, each in the tile at its row block and its column block.

    Examples:
        >>> one, ones = torch.tensor([1]), torch.ones(1, 2)
        >>> joined_tiles(one, 0 * one, ones, 3 * ones, (2, 1)).dense()
        tensor([[0., 0.],
                [0., 0.],
                [3., 3.],
                [3., 3.]])
    """
    (i, g), batch = grid, U.shape[:-2]
    in_row, in_column = counted(row), counted(column)
    t, s = (int(place.max()) + 1 if len(place) else 0 for place in (in_row, in_column))
    left = U.new_zeros(*batch, i * t, U.shape[-1]).index_add(-2, row * t + in_row, U)
    right = V.new_zeros(*batch, g * s, V.shape[-1]).index_add(-2, column * s + in_column, V)
    link = torch.full((i, t), g * s, device=U.device)
    link[row, in_row] = column * s + in_column
    return BlockLowRankMatrix(
        left.unflatten(-2, (i, t)).mT, right.unflatten(-2, (g, s)).mT, Places(link)
    )


def counted(owner: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """The place of each among those of one owner."""
    ascending, order = owner.sort(stable=True)
    place = torch.arange(len(owner), device=owner.device)
    return torch.empty_like(owner).scatter(
        0, order, place - torch.searchsorted(ascending, ascending)
    )
