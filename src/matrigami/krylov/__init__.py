"""Krylov methods: solve, eigenvalues and log-determinants by products alone."""

from matrigami.krylov._cg import cg
from matrigami.krylov._gmres import gmres
from matrigami.krylov._implicit import implicit_solve
from matrigami.krylov._lanczos import (
    Estimate,
    Tridiagonal,
    lanczos,
    largest_eigenpairs,
    stochastic_lanczos,
)
from matrigami.krylov._minres import minres
from matrigami.krylov._rules import DENSE_LIMIT, is_large, is_symmetric, solve_iteratively
from matrigami.krylov._solution import Solution

__all__ = [
    "DENSE_LIMIT",
    "Estimate",
    "Solution",
    "Tridiagonal",
    "cg",
    "gmres",
    "implicit_solve",
    "is_large",
    "is_symmetric",
    "lanczos",
    "largest_eigenpairs",
    "minres",
    "solve_iteratively",
    "stochastic_lanczos",
]
