"""MINRES, for Hermitian matrices, definite or not.

Step numbers: Greenbaum (1997), Iterative Methods for Solving Linear Systems, Algorithm 4 (after
Paige and Saunders 1975). The tridiagonal matrix of a Hermitian one is real, so are the rotations.

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from typing import Any

import torch
from torch import Tensor

from matrigami.krylov._solution import Solution, dot, norms, safe
from matrigami.krylov._systems import Cycle, counted, of_columns, refined
from matrigami.operators import LinearOperator


@counted(max_steps=0)
@of_columns
def minres(
    A: LinearOperator,
    B: Any,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
) -> Solution:
    """Solve `A X = B` for symmetric, or complex Hermitian, `A`, with the least residual norm.

    Where the recurrence has converged and `B - A X` has not, it starts again on that residual.
    The result carries no gradient; `implicit_solve` gives it one.

    Args:
        A: The matrix; its symmetry is not checked.
        B: Right-hand sides, `(n,)` or `(..., n, k)`, tensor or array; each is scaled to norm
            one first.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`.

    Returns:
        Solution, residual history and convergence of each column, in the kind of `B`.

    Raises:
        ValueError: If `A` is not square, or `B` does not fit or is not finite,
            or a count is no whole number.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> indefinite = DenseMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> minres(indefinite, torch.tensor([[1.0], [2.0]])).X.round(decimals=3)
        tensor([[2.],
                [1.]])
    """
    return refined("minres", _cycle, A, B, tol, max_steps)


def _cycle(system: Cycle) -> tuple[Tensor, list[Tensor]]:
    """MINRES from zero."""
    B = system.R
    X, beta = torch.zeros_like(B), norms(B)
    q_old, q = torch.zeros_like(B), B / safe(beta)  # 1: Lanczos vectors
    p_old, p = torch.zeros_like(B), torch.zeros_like(B)  # 1: search directions
    eta, off = beta, torch.zeros_like(beta)  # 1: right-hand side of the triangular system
    c_old, c, s_old, s = (torch.full_like(beta, value) for value in (1.0, 1.0, 0.0, 0.0))
    residual, history, size = beta, [], torch.zeros_like(beta)
    tiny = 4 * torch.finfo(beta.dtype).eps
    active = residual > system.goal
    for step in range(1, system.steps + 1):
        if not active.any():
            break
        v = system.product(q) - off * q_old  # 2: Lanczos step
        diagonal = dot(v, q).real
        v = v - diagonal * q
        off_next = norms(v)
        above2 = s_old * off  # 3: the two last rotations on the new column of T
        above1 = c_old * off
        above1, pivot = c * above1 + s * diagonal, -s * above1 + c * diagonal
        size = torch.maximum(size, torch.hypot(diagonal, off_next))
        slope = torch.hypot(pivot, c * off_next)  # |A R| / |R| (Choi, Paige and Saunders 2011)
        active = active & (slope > tiny * size)  # else no solution leaves less
        c_old, s_old = c, s
        radius = torch.hypot(pivot, off_next)  # 4: the new rotation
        c, s = pivot / safe(radius), off_next / safe(radius)
        p_old, p = p, (q - above1 * p - above2 * p_old) / safe(radius)  # 5: new direction
        X = X + torch.where(active, c * eta, 0) * p  # 6: new iterate
        eta = -s * eta
        q_old, q, off = q, v / safe(off_next), off_next
        residual = torch.where(active, eta.abs(), residual)
        history.append(residual)
        active = active & (residual > system.goal)
        if system.is_lost(X, residual, step):
            break
    return X, history
