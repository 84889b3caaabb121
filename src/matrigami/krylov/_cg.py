"""Conjugate gradients, for Hermitian positive definite matrices.

Step numbers: Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 9.1
(preconditioned CG).

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from typing import Any

from torch import Tensor, where, zeros_like

from matrigami.krylov._solution import Solution, dot, norms, safe
from matrigami.krylov._systems import Cycle, counted, of_columns, refined
from matrigami.operators import LinearOperator


@counted(max_steps=0)
@of_columns
def cg(
    A: LinearOperator,
    B: Any,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    preconditioner: Any = None,
) -> Solution:
    """Solve `A X = B` for symmetric, or complex Hermitian, positive definite `A`.

    The error in the `A`-norm falls at least as `2 ((sqrt(c) - 1) / (sqrt(c) + 1))^steps` for
    condition number `c`. Where the recurrence has converged and `B - A X` has not, it starts again
    on that residual. The result carries no gradient; `implicit_solve` gives it one.

    Args:
        A: The matrix; definiteness is not checked, a direction of negative curvature ends the
            iteration of its column.
        B: Right-hand sides, `(n,)` or `(..., n, k)`, tensor or array; each is scaled to norm
            one first.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`.
        preconditioner: Approximate inverse, Hermitian positive definite: an operator, or a
            function of a block of vectors.

    Returns:
        Solution, residual history and convergence of each column, in the kind of `B`.

    Raises:
        ValueError: If `A` is not square, or `B` does not fit or is not finite,
            or a count is no whole number.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> A = DenseMatrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> cg(A, torch.ones(3, 1)).steps
        3
    """
    return refined("cg", _cycle, A, B, tol, max_steps, preconditioner)


def _cycle(system: Cycle) -> tuple[Tensor, list[Tensor]]:
    """Conjugate gradients from zero."""
    M = system.inverse or (lambda R: R)
    X, R = zeros_like(system.R), system.R  # 1
    Z = M(R)  # 1
    P, rho = Z, dot(R, Z).real  # 1
    residual, history = norms(R), []
    for step in range(1, system.steps + 1):  # 2
        AP = system.product(P)
        curvature = dot(AP, P).real
        active = (residual > system.goal) & (curvature > 0)
        if not active.any():
            break
        alpha = where(active, rho / safe(curvature), 0)  # 3
        X = X + alpha * P  # 4
        R = R - alpha * AP  # 5
        Z = M(R)  # 6
        rho, last = dot(R, Z).real, rho
        P = Z + rho / safe(last) * P  # 7, 8
        residual = where(active, norms(R), residual)
        history.append(residual)
        if system.is_lost(X, residual, step):
            break
    return X, history
