"""The factors of a square block low-rank matrix: block LU, its panels recompressed.

With `A = (I + L) D (I + D^-1 U)`, `D` the blocks on the diagonal, panel `k` is

    D_k = A_kk - sum L_kl U_lk
    U_kj = A_kj - sum L_kl U_lj
    L_ik = (A_ik - sum L_il U_lk) D_k^-1

with sums over `l < k`: all of its tiles in one batch, compressed by a randomised range finder up
to an absolute tolerance, or kept whole where that would not save. Source: Amestoy, Buttari,
L'Excellent and Mary (2017), SIAM J. Sci. Comput. 39(4); the range finder: Halko, Martinsson and
Tropp (2011).
There is no pivoting between tiles; a solution is refined, and refused by the caller if that fails.

Shapes: h = tiles along an edge, b = rows of a tile, r = rank, a = tiles of a panel, k = right-hand
sides.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from matrigami.krylov import gmres, solve_iteratively
from matrigami.operators import LinearOperator, cropped

__all__ = ["TileFactors"]

LOOSE = 1e-8
"""Of a solution, which is refined: relative error of the factors in the Frobenius norm."""

TIGHT = 1e-14
"""Of a determinant, which is not, and of a solution where the loose factors were no help."""

REFINEMENTS = 4
"""Solutions with the residual before GMRES takes over."""

STEPS = 200
"""Most steps of it."""

ACCURATE, POOR = 1e-12, 1e-6
"""Relative residual of a solution, and of one with an ill-conditioned matrix."""

PROVEN = 1e-9
"""Backward error of factors up to which a determinant is believed."""

OVERSAMPLED = 8
"""Columns of a sketch beyond the rank that is expected."""

Factors = tuple[Tensor, Tensor]
"""`X, Y` of a panel of tiles `X Y.T`, each `(a, b, r)`."""


class TileFactors(NamedTuple):
    """Block LU.

    Attributes:
        diagonal: LU of each block on the diagonal, and its pivots.
        lower: For each panel the tiles below the diagonal.
        upper: For each panel the tiles to its right.
    """

    diagonal: list[tuple[Tensor, Tensor]]
    lower: list[Factors]
    upper: list[Factors]

    def solve(self, B: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
        """Forwards, and backwards, panel by panel."""
        tiles = list(B.unflatten(0, (len(self.diagonal), -1)).unbind(0))
        for k, (X, Y) in enumerate(self.lower):
            if len(X):
                below = torch.stack(tiles[k + 1 :]) - X @ (Y.mT @ tiles[k])
                tiles[k + 1 :] = below.unbind(0)
        for k in range(len(tiles) - 1, -1, -1):
            P, Q = self.upper[k]
            right = (P @ (Q.mT @ torch.stack(tiles[k + 1 :]))).sum(0) if len(P) else 0
            tiles[k] = torch.linalg.lu_solve(*self.diagonal[k], tiles[k] - right)
        return torch.cat(tiles)

    def slogdet(self) -> tuple[Inexact[Tensor, ""], Inexact[Tensor, ""]]:
        """The product of the determinants of the blocks on the diagonal."""
        sign = torch.ones((), dtype=self.diagonal[0][0].dtype, device=self.diagonal[0][0].device)
        logs = []
        for LU, pivots in self.diagonal:
            d = torch.diagonal(LU)
            moves = pivots != torch.arange(1, len(d) + 1, device=d.device, dtype=pivots.dtype)
            sign = sign * (1 - 2 * (moves.sum() % 2)) * d.sgn().prod()
            logs.append(d.abs().log().sum())
        return sign, torch.stack(logs).sum()


class Tiles(NamedTuple):
    """A grid of tiles.

    Attributes:
        diagonal: The blocks on the diagonal, `(h, b, b)`.
        left: Of each tile, zero on the diagonal, `(h, h, b, r)`: row block, column block.
        right: The same, so that a tile is `left right.T`.
    """

    diagonal: Inexact[Tensor, "h b b"]
    left: Inexact[Tensor, "h h b r"]
    right: Inexact[Tensor, "h h b r"]

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm."""
        apart = (self.left.mH @ self.left) * (self.right.mH @ self.right).conj()
        return (self.diagonal.abs().square().sum() + apart.sum().real.clamp(min=0)).sqrt()


@torch.no_grad()
def tiles_of(A: Any, rows: int) -> Tiles:
    """The tiles of a block low-rank matrix, ones on the diagonal behind the last row.

    Args:
        A: Square, of square tiles.
        rows: Those of its corner that count.
    """
    (h, b, t), device = A.left.shape, A.device
    link = _regular_link(A) if A.link is None else A.link.on(device)
    s = A.right.shape[-1]
    row = torch.arange(h, device=device)[:, None].expand(h, t)
    used, owner = link < h * s, (link // s).clamp(max=h - 1)
    counted = torch.nn.functional.one_hot(torch.where(used, owner, h), h + 1).cumsum(1)
    index = counted.gather(2, torch.where(used, owner, h)[..., None])[..., 0] - 1
    keep = (torch.arange(h * b, device=device) < rows).reshape(h, b, 1)
    left, right = (A.left * keep).mT, (A.right * keep).mT.flatten(0, 1)  # h t b, (h s) b

    def tiled(here: Tensor, columns: Tensor, grid: int) -> list[Tensor]:
        """Both factors of the tiles that are chosen."""
        rank = int(index[here].max()) + 1 if here.any() else 1
        places, zeros = (row[here], columns[here], index[here]), A.left.new_zeros(h, grid, rank, b)
        return [zeros.index_put(places, t).mT for t in (left[here], right[link[here]])]

    L, R = tiled(used & (owner == row), torch.zeros_like(owner), 1)
    outside = torch.diag_embed((~keep[..., 0]).to(A.dtype))
    return Tiles((L @ R.mT)[:, 0] + outside, *tiled(used & (owner != row), owner, h))


def _regular_link(A: Any) -> Int[Tensor, "h t"]:
    """The permutation of tiles of equal rank: coefficient `(g, r)` of row block `i` is `(i, r)`."""
    h, _, t = A.left.shape
    places = torch.arange(h * t, device=A.device).reshape(h, h, t // h)
    return places.transpose(0, 1).flatten(1)


@torch.no_grad()
def factorized(tiles: Tiles, tol: float) -> TileFactors:
    """Factorise up to a relative error in the Frobenius norm."""
    h, rank = len(tiles.diagonal), tiles.left.shape[-1]
    error = tol * float(tiles.norm()) / h
    found = TileFactors([], [], [])
    for k in range(h):
        A = tiles.left[k + 1 :, k] @ tiles.right[k + 1 :, k].mT
        A = torch.cat([tiles.diagonal[k : k + 1], A]) - _products(found.lower, found.upper, k, k)
        U = tiles.right[k, k + 1 :] @ tiles.left[k, k + 1 :].mT
        U = U - _products(_swapped(found.upper), _swapped(found.lower), k, k + 1)
        LU = torch.linalg.lu_factor_ex(A[0])[:2]
        X, Y = compressed(A[1:], error, rank)
        Q, P = compressed(U, error, rank)
        found.diagonal.append(LU)
        found.lower.append((X, _divided(Y, *LU)))
        found.upper.append((P, Q))
        rank = max(X.shape[-1], P.shape[-1], 1)
    return found


def _swapped(panels: list[Factors]) -> list[Factors]:
    """The tiles transposed."""
    return [(Y, X) for X, Y in panels]


def _products(outer: list[Factors], inner: list[Factors], k: int, first: int) -> Any:
    """`sum over l of outer_l[i] inner_l[k]` for all tiles `i` from the first on."""
    left, right = [], []
    for place, ((X, Y), (P, Q)) in enumerate(zip(outer, inner, strict=True)):
        i, j = first - place - 1, k - place - 1
        left.append(X[i:] @ (Y[i:].mT @ P[j]))
        right.append(Q[j])
    return torch.cat(left, -1) @ torch.cat(right, -1).mT if left else 0


def _divided(Y: Inexact[Tensor, "a b r"], LU: Tensor, pivots: Tensor) -> Inexact[Tensor, "a b r"]:
    """`D^-T Y`, all tiles as columns of one system."""
    columns = Y.movedim(0, 1).flatten(1).conj()
    solved = torch.linalg.lu_solve(LU, pivots, columns, adjoint=True).conj()
    return solved.unflatten(1, (Y.shape[0], Y.shape[-1])).movedim(1, 0)


def compressed(T: Inexact[Tensor, "a b b"], error: float, rank: int) -> Factors:
    """Factors of the fewest columns for an absolute error of every tile.

    Args:
        T: The tiles.
        error: In the Frobenius norm.
        rank: A guess.
    """
    b, s = T.shape[-1], rank + OVERSAMPLED
    if not len(T):
        return T[..., :0], T[..., :0]
    generator = torch.Generator(T.device).manual_seed(0)
    while s <= b // 2:
        G = torch.randn(b, s, generator=generator, dtype=T.dtype, device=T.device)
        Q = torch.linalg.qr(T @ G).Q
        B = Q.mH @ T
        if float((T - Q @ B).norm(dim=(-2, -1)).max()) <= error:
            U, values, Vh = torch.linalg.svd(B, full_matrices=False)
            tails = values.square().flip(-1).cumsum(-1).flip(-1)
            kept = max(int((tails > error**2).sum(-1).max()), 1)
            return Q @ (U[..., :kept] * values[..., None, :kept]), Vh[..., :kept, :].mT
        s *= 2
    return T, torch.eye(b, dtype=T.dtype, device=T.device).expand_as(T)


def tiles_solve(A: Any, rows: int, B: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
    """A solution by the factors, corrected by its residual or by GMRES.

    Args:
        A: The padded matrix.
        rows: Those that count, as many as `B` has.
        B: Right-hand sides.
    """
    tiles, corner = tiles_of(A, rows), cropped(A, rows, rows)
    for tol in (LOOSE, TIGHT):
        X = _refined(corner, factorized(tiles, tol), B, float(tiles.norm()))
        if X is not None:
            return X
    return solve_iteratively(corner, B)


def _refined(A: LinearOperator, factors: TileFactors, B: Tensor, size: float) -> Tensor | None:
    """Corrections by the residual, then GMRES; None where neither converges.

    A residual that is no more than the rounding of a product with the solution will do, up to a
    point.
    """
    surplus = sum(len(LU) for LU, _ in factors.diagonal) - len(B)

    def approximate(R: Tensor) -> Tensor:
        """The corner of the solution with the padded matrix."""
        return factors.solve(torch.nn.functional.pad(R, (0, 0, 0, surplus)))[: len(R)]

    X, rounding = torch.zeros_like(B), 100 * torch.finfo(B.dtype).eps * size
    for _ in range(REFINEMENTS):
        X = X + approximate(B - A.matmat(X))
        goal = torch.clamp(rounding * X.norm(dim=0), *(c * B.norm(dim=0) for c in (ACCURATE, POOR)))
        if bool(((B - A.matmat(X)).norm(dim=0) <= goal).all()):
            return X
    if not X.isfinite().all():
        return None
    found = gmres(A, B, preconditioner=approximate, max_steps=STEPS)
    return found.X if found.converged.all() else None


class _LogDeterminant(torch.autograd.Function):
    """`log |det A|` of real tiles; its derivative is made of the columns of `A^-1`, by tiles."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, A: Any, rows: int) -> tuple[Tensor, Tensor]:
        """Sign and logarithm."""
        return _checked_factors(type(A)(left, right, A.link), rows).slogdet()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the tiles."""
        left, right, A, ctx.rows = inputs
        ctx.mark_non_differentiable(output[0])
        ctx.link = A.link
        ctx.kind = type(A)
        ctx.save_for_backward(left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`A^-T` where the tiles are: for the columns of one row block after the other."""
        left, right = ctx.saved_tensors
        A = ctx.kind(left, right, ctx.link)
        factors = factorized(tiles_of(A, ctx.rows), TIGHT)
        (h, b, _), s = left.shape, right.shape[-1]
        link = _regular_link(A) if A.link is None else A.link.on(A.device)
        V = torch.nn.functional.pad(right.mT.flatten(0, 1), (0, 0, 0, 1))  # (h s + 1) b
        keep = torch.arange(h * b, device=A.device)[:, None] < ctx.rows
        eye = torch.eye(h * b, b, dtype=A.dtype, device=A.device)
        d_left, d_right = [], torch.zeros_like(V)
        for i in range(h):
            M = factors.solve(eye.roll(i * b, 0)) * keep * keep[i * b : i * b + b].mT
            M = M.unflatten(0, (h, b))[(link[i] // s).clamp(max=h - 1)]  # t q p
            d_left.append(torch.einsum("tqp,tq->pt", M, V[link[i]]))
            d_right = d_right.index_add(0, link[i], torch.einsum("tqp,pt->tq", M, left[i]))
        d_right = d_right[:-1].unflatten(0, (h, s)).mT
        return grad * torch.stack(d_left), grad * d_right, None, None


def tiles_slogdet(A: Any, rows: int) -> tuple[Inexact[Tensor, ""], Inexact[Tensor, ""]]:
    """Sign and logarithm of the determinant; that of real tiles has a derivative.

    Raises:
        ValueError: If the factors, which were not pivoted, are not those of the matrix.
    """
    if A.dtype.is_complex:
        return _checked_factors(A, rows).slogdet()
    return _LogDeterminant.apply(A.left, A.right, A, rows)  # pyright: ignore[reportReturnType]


def _checked_factors(A: Any, rows: int) -> TileFactors:
    """Factors of a determinant.

    Raises:
        ValueError: If they are not those of the matrix.
    """
    tiles = tiles_of(A, rows)
    factors = factorized(tiles, TIGHT)
    generator = torch.Generator(A.device).manual_seed(0)
    X = torch.randn(A.shape[-1], 1, generator=generator, dtype=A.dtype, device=A.device)
    X[rows:] = 0
    corner = cropped(A, rows, rows)
    B = torch.nn.functional.pad(corner.matmat(X[:rows]), (0, 0, 0, len(X) - rows))
    miss = corner.matmat(factors.solve(B)[:rows]) - B[:rows]
    miss = float(miss.norm() / (tiles.norm() * X.norm()))
    if not miss <= PROVEN:
        raise ValueError(
            f"slogdet(A): the factors of {A!r} leave a residual of {miss:.1e}.\n"
            "There is no pivoting between tiles, and this matrix needs it (or is singular).\n"
            "If memory allows, use slogdet(DenseMatrix(A.dense()))."
        )
    return factors
