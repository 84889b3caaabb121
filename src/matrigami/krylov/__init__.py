"""Krylov methods: solve, eigenvalues, functions and estimates by products alone."""

from matrigami.krylov._cg import cg
from matrigami.krylov._eigenpairs import largest_eigenpairs
from matrigami.krylov._estimates import (
    Estimate,
    stochastic_diagonal,
    stochastic_logdet,
    stochastic_trace,
)
from matrigami.krylov._exponential import exp_multiply
from matrigami.krylov._gmres import gmres
from matrigami.krylov._implicit import implicit_solve
from matrigami.krylov._lanczos import Tridiagonal, lanczos
from matrigami.krylov._lsmr import lsmr
from matrigami.krylov._minres import minres
from matrigami.krylov._rules import DENSE_LIMIT, is_large, solve_iteratively
from matrigami.krylov._solution import Solution
from matrigami.krylov._symmetry import is_hermitian, is_symmetric

__all__ = [
    "DENSE_LIMIT",
    "Estimate",
    "Solution",
    "Tridiagonal",
    "cg",
    "exp_multiply",
    "gmres",
    "implicit_solve",
    "is_hermitian",
    "is_large",
    "is_symmetric",
    "lanczos",
    "largest_eigenpairs",
    "lsmr",
    "minres",
    "solve_iteratively",
    "stochastic_diagonal",
    "stochastic_logdet",
    "stochastic_trace",
]
