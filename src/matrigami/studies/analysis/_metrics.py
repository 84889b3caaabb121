"""What a member does: solutions, preconditioning, and what a caller measures."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.krylov import cg
from matrigami.operators import DenseMatrix

Metric = Callable[[Tensor], float]
"""A function of a dense member of the size of the matrix, such as the loss of a network with it."""

CG_TOL = 1e-8
"""Relative residual at which the iteration ends."""

MOST_STEPS = 500
"""After so many steps of CG it has failed."""


def standard_metrics(A: Float[Tensor, "m n"], symmetric: bool) -> dict[str, Metric]:
    """Of a symmetric positive definite matrix: solutions, condition number, steps of CG.

    Args:
        A: The matrix.
        symmetric: Whether it is.
    """
    if not symmetric:
        return {}
    L, info = torch.linalg.cholesky_ex(A)
    if info:
        return {}
    b = torch.randn(len(A), 1, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    x = torch.cholesky_solve(b, L)

    def solution(B: Tensor) -> float:
        """`||B^-1 b - A^-1 b|| / ||A^-1 b||` for a random right-hand side."""
        y, failed = torch.linalg.solve_ex(B, b)
        return float("inf") if failed else float((y - x).norm() / x.norm())

    def condition(B: Tensor) -> float:
        """Of `B^-1 A`: the ratio of the extreme eigenvalues; infinite if `B` is not definite."""
        half = torch.linalg.solve_triangular(L, (B + B.mT) / 2, upper=False)
        M = torch.linalg.solve_triangular(L, half.mT, upper=False)
        values = torch.linalg.eigvalsh((M + M.mT) / 2)
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")

    def steps(B: Tensor) -> float:
        """Of CG preconditioned by `B`; infinite if `B` is not definite or it does not converge."""
        R, failed = torch.linalg.cholesky_ex((B + B.mT) / 2)
        if failed:
            return float("inf")
        found = cg(
            DenseMatrix(A),
            b,
            tol=CG_TOL,
            max_steps=MOST_STEPS,
            preconditioner=lambda r: torch.cholesky_solve(r, R),
        )
        return float(len(found.residuals) - 1) if bool(found.converged.all()) else float("inf")

    return {"solution error": solution, "condition": condition, "CG steps": steps}


def measured(B: Float[Tensor, "m n"], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """All metrics of one member."""
    return {name: float(metric(B)) for name, metric in metrics.items()}
