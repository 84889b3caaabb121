"""What is known of H2 matrices beyond products: their diagonal, sums, and solutions.

`solve` runs conjugate gradients, preconditioned by a randomised Nystroem approximation, and MINRES
or GMRES where the matrix is not positive definite; derivatives come from the adjoint equation.

Shapes: l = leaves of a stack, p = their rows, q = columns of their block, n = rows = columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Inexact, Int
from torch import Tensor

from matrigami.krylov import cg, implicit_solve, is_large, solve_iteratively
from matrigami.operators import (
    DiagonalMatrix,
    LinearOperator,
    Places,
    add,
    diagonal,
    diagonal_by_entries,
    lu_solve,
    scale,
    solve,
)
from matrigami.structures._h2 import H2Matrix, PlacedBlocksMatrix

__all__ = ["by_conjugate_gradients", "nystroem_inverse"]

RANK = 128
"""Eigenvalues that the preconditioner takes away: one product with that many vectors."""

DIRECT = 1024
"""Rows up to which all entries take less time than conjugate gradients."""

Preconditioner = Callable[[Tensor], Tensor]
"""An approximate inverse of a block of vectors."""


def _each(places: Places, size: int, device: torch.device) -> Int[Tensor, "o e p"]:
    """Every row by its own number."""
    index = places.on(device)
    if index.ndim == 3:
        return index
    return index[..., None] * size + torch.arange(size, device=device)


def _on_diagonal(B: PlacedBlocksMatrix) -> tuple[Int[Tensor, "o e p"], Bool[Tensor, "o e p q"]]:
    """The rows of a matrix, and which of its entries are on the diagonal."""
    p, q = B.blocks.shape[-2:]
    rows, columns = _each(B.rows, p, B.device), _each(B.columns, q, B.device)
    here = (rows[..., :, None] == columns[..., None, :]) & (rows < min(B.size))[..., None]
    return rows, here


@diagonal.register
def _(A: PlacedBlocksMatrix) -> Inexact[Tensor, "*batch d"]:
    rows, here = _on_diagonal(A)
    d = (A.blocks[..., :, None, :, :] * here).sum(-1).flatten(-3, -1)  # ... o e p
    zeros = d.new_zeros(*d.shape[:-1], max(A.size) + 1)
    return zeros.index_add(-1, rows.flatten().clamp(max=max(A.size)), d)[..., : min(A.size)]


@diagonal.register
def _(A: H2Matrix) -> Inexact[Tensor, "*batch d"]:
    """From the near field, if that holds it: every pair of points is either near or far."""
    d = min(A.size)
    seen = torch.zeros(d + 1, dtype=torch.bool, device=A.device)
    for B in _leaves(A):
        rows, here = _on_diagonal(B)
        seen[rows[here.any(-1)]] = True
    if not seen[:d].all():
        return diagonal_by_entries(A)
    return torch.stack([diagonal(B) for B in A.near]).sum(0)


def _leaves(A: H2Matrix) -> list[PlacedBlocksMatrix]:
    """The blocks of leaves, one place for each: not a diagonal that was added."""
    parts = [B for B in A.near if isinstance(B, PlacedBlocksMatrix)]
    return [B for B in parts if B.rows.index.ndim == 3 and B.rows.shape[1] == 1]


@add.register(where=lambda A, B: A.size[0] == A.size[1])
def _(A: H2Matrix, B: DiagonalMatrix) -> H2Matrix:
    """The diagonal is near."""
    index = Places(torch.arange(A.size[0])[:, None])
    blocks = B.diagonal[..., None, None].expand(*A.shape[:-2], A.size[0], 1, 1)
    near = PlacedBlocksMatrix(blocks, index, index, A.size)
    return H2Matrix((*A.near, near), A.left, A.couplings, A.right, A.down, A.up, A.size)


@add.register
def _(A: DiagonalMatrix, B: H2Matrix) -> LinearOperator:
    return add(B, A)


@scale.register
def _(A: H2Matrix, factor: Tensor) -> H2Matrix:
    near, couplings = (tuple([scale(B, factor) for B in parts]) for parts in (A.near, A.couplings))
    return H2Matrix(near, A.left, couplings, A.right, A.down, A.up, A.size)  # pyright: ignore[reportArgumentType]


@solve.register(where=lambda A, *_: A.size[0] > DIRECT)
def _(A: H2Matrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, by_conjugate_gradients)


def by_conjugate_gradients(A: Any, B: Tensor) -> Tensor:
    """Conjugate gradients if the matrix looks positive definite, and they converge."""
    inverse = nystroem_inverse(A)
    if inverse is not None:
        found = cg(A, B, preconditioner=inverse)
        if found.converged.all():
            return found.X
    return solve_iteratively(A, B) if is_large(A) else lu_solve(A.dense(), B)


@torch.no_grad()
def nystroem_inverse(A: LinearOperator, rank: int = RANK) -> Preconditioner | None:
    """A preconditioner that takes away the leading eigenvalues of a positive definite matrix.

    From the products `Y = A G` with Gaussian `G`: `A ~ Y (G.T Y)^-1 Y.T = U diag(v) U.T`, and the
    inverse applied is `U diag(v_r / v) U.T + I - U U.T`, after which the condition number is about
    that of the rest of the spectrum. Source: Frangella, Tropp and Udell (2021), arXiv:2110.02820.

    Returns:
        The map, or None if `A` is not symmetric and positive definite.
    """
    n = A.shape[-1]
    generator = torch.Generator(A.device).manual_seed(0)
    G = torch.randn(n, min(rank, n), generator=generator, dtype=A.dtype, device=A.device)
    G = torch.linalg.qr(G).Q
    Y = A @ G
    core = G.mH @ Y
    if not torch.allclose(core, core.mH, rtol=1e-8, atol=1e-8 * float(core.abs().max())):
        return None
    L, info = torch.linalg.cholesky_ex(core)
    if info.any():
        return None
    F = torch.linalg.solve_triangular(L, Y.mH, upper=False).mH
    U, values, _ = torch.linalg.svd(F, full_matrices=False)
    weights = ((values[..., -1:] / values).square() - 1)[..., None]
    return lambda R: R + U @ (weights * (U.mH @ R))
