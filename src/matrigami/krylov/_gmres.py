"""Restarted GMRES, for any nonsingular matrix.

Step numbers: Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 6.11 (restarted
GMRES) with the Gram-Schmidt of Algorithm 6.9 done twice, and the least-squares problem solved by
rotations (section 6.5.3).

Shapes: n = rows = columns, k = right-hand sides, solved independently; j = basis vectors.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.krylov._solution import Preconditioner, Solution, check_system, finished, norms, safe
from matrigami.operators import LinearOperator


def gmres(
    A: LinearOperator,
    B: Float[Tensor, "... n k"],
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    restart: int = 50,
    preconditioner: Preconditioner | None = None,
) -> Solution:
    """Solve `A X = B` for any square `A`, with the least residual norm in each cycle.

    Args:
        A: The matrix.
        B: Right-hand sides.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`, over all cycles.
        restart: Steps of one cycle; `restart + 1` blocks of the size of `B` are kept.
        preconditioner: Approximate inverse, applied on the right, so that residuals are the true
            ones.

    Returns:
        Solution, residual history and convergence of each column.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> A = DenseMatrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> gmres(A, torch.tensor([[3.0], [1.0]])).X.round(decimals=3)
        tensor([[1.],
                [1.]])
    """
    tol = check_system(A, B, tol)
    M = preconditioner or (lambda R: R)
    X, size = B.new_zeros(B.shape), safe(norms(B))
    history = [norms(B) / size]
    left = 10 * A.shape[-1] if max_steps is None else max_steps
    while left > 0 and (history[-1] > tol).any():
        R = B - A.matmat(X)  # 1
        X, estimates = _cycle(A, M, X, R, min(restart, left, A.shape[-1]), tol * size)
        history += [torch.minimum(e / size, history[-1]) for e in estimates[:-1]]
        history.append(norms(B - A.matmat(X)) / size)  # the true residual ends a cycle
        left -= len(estimates)
        if (
            len(history) > len(estimates) + 1
            and not (history[-1] < history[-1 - len(estimates)]).any()
        ):
            break  # a cycle without progress: restarting repeats it
    return finished(X, history, tol)


def _cycle(
    A: LinearOperator, M: Preconditioner, X: Tensor, R: Tensor, steps: int, target: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One cycle from the residual `R`: the new iterate, and the residual norms of its steps."""
    beta = norms(R)
    V = [R / safe(beta)]  # 1
    g, triangle = [beta], []
    rotations: list[tuple[Tensor, Tensor]] = []
    estimates: list[Tensor] = []
    for j in range(steps):  # 2
        W = A.matmat(M(V[j]))  # 3
        column, W = _orthogonalise(V, W)  # 4-7
        h = norms(W)  # 8
        V.append(W / safe(h))  # 9
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = (
                c * column[i] + s * column[i + 1],
                -s * column[i] + c * column[i + 1],
            )
        radius = torch.hypot(column[j], h)
        c, s = column[j] / safe(radius), h / safe(radius)
        rotations.append((c, s))
        column[j] = radius
        g[j], last = c * g[j], -s * g[j]
        g.append(last)
        triangle.append(column)
        estimates.append(last.abs())
        if (estimates[-1] <= target).all():
            break
    return X + M(_combination(V, triangle, g)), estimates  # 12


def _orthogonalise(V: list[Tensor], W: Tensor) -> tuple[list[Tensor], Tensor]:
    """Coefficients against the basis, and the rest; twice, which is enough (Giraud et al. 2005)."""
    basis = torch.stack(V)  # j ... n k
    first = (basis * W).sum(-2, keepdim=True)
    W = W - (basis * first).sum(0)
    second = (basis * W).sum(-2, keepdim=True)
    return list((first + second).unbind(0)), W - (basis * second).sum(0)


def _combination(V: list[Tensor], triangle: list[list[Tensor]], g: list[Tensor]) -> Tensor:
    """The basis times the solution of the triangular least-squares system, by back substitution."""
    j = len(triangle)
    y: list[Tensor] = [torch.zeros_like(g[0])] * j
    for i in reversed(range(j)):
        rest = sum((triangle[c][i] * y[c] for c in range(i + 1, j)), torch.zeros_like(g[0]))
        y[i] = torch.where(triangle[i][i] == 0, 0, (g[i] - rest) / safe(triangle[i][i]))
    return torch.stack([v * c for v, c in zip(V[:j], y, strict=True)]).sum(0)
