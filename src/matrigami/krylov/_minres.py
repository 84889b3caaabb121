"""MINRES, for symmetric matrices, definite or not.

Step numbers: Greenbaum (1997), Iterative Methods for Solving Linear Systems, Algorithm 4 (after
Paige and Saunders 1975).

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.krylov._solution import Solution, check_system, dot, finished, norms, safe
from matrigami.operators import LinearOperator


def minres(
    A: LinearOperator,
    B: Float[Tensor, "... n k"],
    *,
    tol: float | None = None,
    max_steps: int | None = None,
) -> Solution:
    """Solve `A X = B` for symmetric `A`, with the least residual norm at each step.

    Args:
        A: The matrix; its symmetry is not checked.
        B: Right-hand sides.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`.

    Returns:
        Solution, residual history and convergence of each column.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> indefinite = DenseMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> minres(indefinite, torch.tensor([[1.0], [2.0]])).X.round(decimals=3)
        tensor([[2.],
                [1.]])
    """
    tol = check_system(A, B, tol)
    X, beta = B.new_zeros(B.shape), norms(B)
    size = safe(beta)
    q_old, q = torch.zeros_like(B), B / size  # 1: Lanczos vectors
    p_old, p = torch.zeros_like(B), torch.zeros_like(B)  # 1: search directions
    eta, off = beta, torch.zeros_like(beta)  # 1: right-hand side of the triangular system
    c_old, c, s_old, s = (torch.full_like(beta, value) for value in (1.0, 1.0, 0.0, 0.0))
    history = [beta / size]
    for _ in range(10 * A.shape[-1] if max_steps is None else max_steps):
        active = history[-1] > tol
        if not active.any():
            break
        v = A.matmat(q) - off * q_old  # 2: Lanczos step
        diagonal = dot(v, q)
        v = v - diagonal * q
        off_next = norms(v)
        above2 = s_old * off  # 3: the two last rotations on the new column of T
        above1 = c_old * off
        above1, pivot = c * above1 + s * diagonal, -s * above1 + c * diagonal
        c_old, s_old = c, s
        radius = torch.hypot(pivot, off_next)  # 4: the new rotation
        c, s = pivot / safe(radius), off_next / safe(radius)
        p_old, p = p, (q - above1 * p - above2 * p_old) / safe(radius)  # 5: new direction
        X = X + torch.where(active, c * eta, 0) * p  # 6: new iterate
        eta = -s * eta
        q_old, q, off = q, v / safe(off_next), off_next
        history.append(torch.where(active, eta.abs() / size, history[-1]))
    return finished(X, history, tol)
