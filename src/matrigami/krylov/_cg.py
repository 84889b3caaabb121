"""Conjugate gradients, for symmetric positive definite matrices.

Step numbers: Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 9.1
(preconditioned CG).

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from jaxtyping import Float
from torch import Tensor, where

from matrigami.krylov._solution import (
    Preconditioner,
    Solution,
    check_system,
    dot,
    finished,
    norms,
    safe,
)
from matrigami.operators import LinearOperator


def cg(
    A: LinearOperator,
    B: Float[Tensor, "... n k"],
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    preconditioner: Preconditioner | None = None,
) -> Solution:
    """Solve `A X = B` for symmetric positive definite `A`.

    The error in the `A`-norm falls at least as `2 ((sqrt(c) - 1) / (sqrt(c) + 1))^steps` for
    condition number `c`.

    Args:
        A: The matrix; definiteness is not checked, a direction of negative curvature ends the
            iteration of its column.
        B: Right-hand sides.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`.
        preconditioner: Approximate inverse, symmetric positive definite.

    Returns:
        Solution, residual history and convergence of each column.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> A = DenseMatrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> cg(A, torch.ones(3, 1)).steps
        3
    """
    tol = check_system(A, B, tol)
    M = preconditioner or (lambda R: R)
    X, R = B.new_zeros(B.shape), B.clone()  # 1
    Z = M(R)  # 1
    P, rho = Z, dot(R, Z)  # 1
    size = safe(norms(B))
    history = [norms(R) / size]
    for _ in range(10 * A.shape[-1] if max_steps is None else max_steps):  # 2
        AP = A.matmat(P)
        curvature = dot(AP, P)
        active = (history[-1] > tol) & (curvature > 0)
        if not active.any():
            break
        alpha = where(active, rho / safe(curvature), 0)  # 3
        X = X + alpha * P  # 4
        R = R - alpha * AP  # 5
        Z = M(R)  # 6
        rho, last = dot(R, Z), rho
        P = Z + rho / safe(last) * P  # 7, 8
        history.append(where(active, norms(R) / size, history[-1]))
    return finished(X, history, tol)
