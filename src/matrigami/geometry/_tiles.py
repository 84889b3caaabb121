"""Block low rank from products with a matrix alone, or from its entries.

By products: random vectors in one column block after the other, `Y = A G`, show the range of every
tile, those in the row blocks `Z = A.H F` its other side, and `A ~ Y (F.H Y)^+ Z.H` (generalised
Nystroem: Nakatsukasa 2020, arXiv:2009.11392). The diagonal comes last, by the columns of the
identity repeated in every tile. By entries: cross approximation of all tiles in lockstep.

Shapes: h = tiles along an edge, b = their rows, k = vectors, r = rank, e = tiles beside the
diagonal.
"""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.geometry._ordered import Entries, Ordered, ordered
from matrigami.geometry.particles._cross import cross_factors
from matrigami.geometry.particles._points import Numbers
from matrigami.operators import LinearOperator
from matrigami.structures import BlockLowRankMatrix, joined_tiles

START = 16
"""Random vectors of a tile at first; twice as many where the ranks are not below them."""

OVERSAMPLED = 8
"""Vectors beyond the rank that is found."""

MORE = 1.5
"""Vectors of the transpose for each of the matrix: with as many the middle could be singular."""

SAFE = 20
"""By how much crosses are finer than the tolerance: partial pivoting stops early on small tiles."""

ROUNDED = 1e-13
"""Singular values of the middle over the largest that count as roundings."""


def block_low_rank(
    A: LinearOperator | Entries,
    points: Numbers | None = None,
    *,
    tol: float | None = None,
    size: int | None = None,
    tile: int | None = None,
    seed: int = 0,
) -> LinearOperator:
    """A square matrix as tiles of low rank, with direct `solve` and `logdet` in any dimension.

    Args:
        A: A square value, known by products with it and its transpose: 2.5 (r + 8) for each of the
            `n / tile` tiles along an edge, and a tile more; or a function `(rows, columns) ->
            entries`. Where products are dear, make them of `hierarchical(A, points)` first, and
            tiles of that.
        points: The place of each row, `(n, d)`, by which rows are ordered so that a tile is a box;
            by default they are in a good order already.
        tol: Relative error in the Frobenius norm, roughly; by default 1e-6, or a hundred roundings
            if that is more.
        size: Rows, where `A` is a function and there are no points.
        tile: Rows of a tile at most; by default the root of their number, which stores least.
        seed: Of the random vectors.

    Returns:
        A `BlockLowRankMatrix`, cropped and permuted where needed; not differentiable in `A`. Of
        products it is measured before it is returned.

    Raises:
        ValueError: If `A` is not square, not finite, or the error is missed.

    Examples:
        >>> x = torch.rand(300, 2, dtype=torch.float64)
        >>> T = block_low_rank(lambda i, j: torch.exp(-(x[i] - x[j]).norm(dim=-1)), x, tol=1e-4)
        >>> T.shape
        (300, 300)
    """
    given = ordered("block_low_rank", A, points, tol, size, tile)
    with torch.no_grad():
        h = given.leaves[0]
        row, column = (~torch.eye(h, dtype=torch.bool, device=given.order.device)).nonzero().T
        if isinstance(A, LinearOperator):
            found = _sampled(given, row, column, seed)
        else:
            found = _crossed(given, row, column)
        return given.delivered(found)


def _crossed(A: Ordered, row: Int[Tensor, " e"], column: Int[Tensor, " e"]) -> BlockLowRankMatrix:
    """From some rows and columns of each tile."""
    places = torch.arange(A.leaves[0] * A.leaves[1], device=A.order.device, dtype=torch.float64)
    grid = places.reshape(*A.leaves, 1)
    D = A.entries(grid, grid)
    U, V = (D.new_zeros(0, A.leaves[1], 1),) * 2
    if len(row):
        U, V = cross_factors(A.finite, grid[row], grid[column], A.tol / SAFE)
    size = float(D.square().sum() + ((U.mT @ U) * (V.mT @ V)).sum()) ** 0.5
    return _with_diagonal(D, *_truncated(row, column, U, V, A.tol / 2 * size))


def _sampled(
    A: Ordered, row: Int[Tensor, " e"], column: Int[Tensor, " e"], seed: int
) -> BlockLowRankMatrix:
    """From products."""
    (h, b), like = A.leaves, A.zero()
    error, k = A.tol * A.norm(seed), min(START, b)
    generator = torch.Generator(like.device).manual_seed(seed)
    eye = torch.eye(b, dtype=like.dtype, device=like.device)
    while True:
        G, F = (
            torch.randn(h, b, w, generator=generator, dtype=like.dtype, device=like.device)
            for w in (k, int(MORE * k))
        )
        Y = _by_tiles(A, eye.expand(h, b, b) if k == b else G, transposed=False)[row, column]
        if k == b:
            U, V = Y, eye.expand_as(Y)
            break
        allowed = error / h * k**0.5
        if int(torch.linalg.matrix_rank(Y, atol=allowed).max()) + OVERSAMPLED <= k:
            Z = _by_tiles(A, F.conj(), transposed=True).conj()[column, row]
            rounded = allowed * F.shape[-1] ** 0.5 / 10
            U, V = Y @ torch.linalg.pinv(F[row].mH @ Y, atol=rounded, rtol=ROUNDED), Z.conj()
            break
        k = min(2 * k, b)
    row, column, U, V = _truncated(row, column, U, V, error / 2)
    every = eye.repeat(h, 1)
    D = A.times(every)
    if len(row):
        D = D - joined_tiles(row, column, U, V, (h, h)).matmat(every)
    return _with_diagonal(D.reshape(h, b, b), row, column, U, V)


def _by_tiles(
    A: Ordered, G: Inexact[Tensor, "h b k"], *, transposed: bool
) -> Inexact[Tensor, "h h b k"]:
    """Each tile times the vectors of its column block: by row block, and column block."""
    h, b, k = G.shape
    X = torch.diag_embed(G.movedim(0, -1)).permute(2, 0, 3, 1)  # h b h k
    Y = A.times(X.reshape(h * b, h * k), transposed=transposed)
    return Y.reshape(h, b, h, k).transpose(1, 2)


def _truncated(
    row: Int[Tensor, " e"],
    column: Int[Tensor, " e"],
    U: Inexact[Tensor, "e b r"],
    V: Inexact[Tensor, "e b r"],
    error: float,
) -> tuple[Int[Tensor, " f"], Int[Tensor, " f"], Inexact[Tensor, "f b"], Inexact[Tensor, "f b"]]:
    """The fewest terms of all tiles up to an error of all: where they are, and both sides."""
    (P, R), (Q, S) = torch.linalg.qr(U), torch.linalg.qr(V)
    W, values, Zh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    ascending, order = values.square().flatten().sort()
    kept = torch.empty(values.numel(), dtype=torch.bool, device=values.device)
    kept[order] = ascending.cumsum(0) > error**2
    tile, term = kept.reshape(values.shape).nonzero(as_tuple=True)
    left, right = (P @ (W * values[..., None, :])).mT, Zh @ Q.mT
    return row[tile], column[tile], left[tile, term], right[tile, term]


def _with_diagonal(
    D: Inexact[Tensor, "h b b"],
    row: Int[Tensor, " f"],
    column: Int[Tensor, " f"],
    U: Inexact[Tensor, "f b"],
    V: Inexact[Tensor, "f b"],
) -> BlockLowRankMatrix:
    """The terms, and the diagonal as its columns times those of the identity."""
    h, b, _ = D.shape
    diagonal = torch.arange(h, device=D.device).repeat_interleave(b)
    eye = torch.eye(b, dtype=D.dtype, device=D.device).repeat(h, 1)
    U, V = torch.cat([D.mT.flatten(0, 1), U]), torch.cat([eye, V])
    places = torch.cat([diagonal, row]), torch.cat([diagonal, column])
    return joined_tiles(*places, U, V, (h, h))
