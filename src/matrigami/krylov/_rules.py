"""Answers for matrices too large to be made dense, by products alone.

These register on `LinearOperator`, so they stand between a structure's own rule and the dense
default.

Shapes: n = rows = columns, k = right-hand sides.
"""

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov._gmres import gmres
from matrigami.krylov._implicit import implicit_solve
from matrigami.krylov._lanczos import largest_eigenpairs
from matrigami.krylov._minres import minres
from matrigami.krylov._solution import Solution
from matrigami.operators import (
    DenseMatrix,
    Eigh,
    LinearOperator,
    diagonal,
    eigh,
    entries,
    solve,
)

DENSE_LIMIT = 4096 * 4096
"""Entries up to which a matrix is made dense (128 MiB in double precision)."""

CHUNK = 256
"""Columns of the identity multiplied at a time where a diagonal is read off by products."""


def is_large(A: LinearOperator, *_: Any) -> bool:
    """Whether a value is too large to be made dense; one that is dense already is not."""
    return A.shape[-2] * A.shape[-1] > DENSE_LIMIT and not isinstance(A, DenseMatrix)


def is_symmetric(A: LinearOperator, generator: torch.Generator | None = None) -> bool:
    """Whether `x.T A y = y.T A x` for random vectors: almost surely a symmetric matrix."""
    n = A.shape[-1]
    generator = torch.Generator(A.device).manual_seed(0) if generator is None else generator
    X = torch.randn(n, 2, generator=generator, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        G = X.mT @ A.matmat(X)
    return bool(
        torch.allclose(
            G,
            G.mT,
            rtol=1e3 * torch.finfo(A.dtype).eps,
            atol=1e3 * torch.finfo(A.dtype).eps * float(G.abs().max()),
        )
    )


def solve_iteratively(
    A: LinearOperator, B: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """Solve by MINRES if `A` is symmetric, else by GMRES; differentiable throughout.

    Raises:
        RuntimeError: If the iteration did not converge.
    """
    return implicit_solve(A, B, _iterate)


def _iterate(A: LinearOperator, B: Tensor) -> Tensor:
    """Choose the method and insist on convergence."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    B = B.expand(*batch, *B.shape[-2:])
    symmetric = is_symmetric(A)
    found: Solution = (minres if symmetric else gmres)(A, B)
    if not found.converged.all():
        raise RuntimeError(
            f"solve was asked of {A!r}, which is too large to be made dense.\n"
            f"{'MINRES' if symmetric else 'GMRES'} reached a relative residual of "
            f"{float(found.residuals[-1].max()):.1e} in {found.steps} steps.\n"
            "Call matrigami.krylov.cg, minres or gmres with a preconditioner or a looser tol."
        )
    return found.X


@solve.register(where=is_large)
def _(A: LinearOperator, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve_iteratively(A, B)


@diagonal.register(where=is_large)
def _(A: LinearOperator) -> Inexact[Tensor, "*batch d"]:
    d = min(A.shape[-2:])
    columns = torch.arange(d, device=A.device)
    return entries(A, columns, columns)


@eigh.register(where=lambda A, k=None: k is not None and is_large(A))
def _(A: LinearOperator, k: int | None = None) -> Eigh:
    return largest_eigenpairs(A, k)
