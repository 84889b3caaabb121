"""Restarted GMRES, for any nonsingular matrix.

Step numbers: Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 6.11 (restarted
GMRES) with the Gram-Schmidt of Algorithm 6.9 done twice, and the least-squares problem solved by
rotations (section 6.5.3; complex ones, section 6.5.9).

Shapes: n = rows = columns, k = right-hand sides, solved independently; j = basis vectors.
"""

from typing import Any

import torch
from torch import Tensor

from matrigami.krylov._solution import Solution, norms, safe
from matrigami.krylov._systems import Cycle, counted, of_columns, refined
from matrigami.operators import LinearOperator


@counted(max_steps=0, restart=1)
@of_columns
def gmres(
    A: LinearOperator,
    B: Any,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    restart: int = 50,
    preconditioner: Any = None,
) -> Solution:
    """Solve `A X = B` for any square `A`, with the least residual norm in each cycle.

    The result carries no gradient; `implicit_solve` gives it one.

    Args:
        A: The matrix, real or complex.
        B: Right-hand sides, `(n,)` or `(..., n, k)`, tensor or array; each is scaled to norm
            one first.
        tol: Relative residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`, over all cycles.
        restart: Steps of one cycle; `restart + 1` blocks of the size of `B` are kept.
        preconditioner: Approximate inverse, an operator or a function of a block of vectors;
            applied on the right, so that residuals are the true ones.

    Returns:
        Solution, residual history and convergence of each column, in the kind of `B`.

    Raises:
        ValueError: If `A` is not square, or `B` does not fit or is not finite,
            or a count is no whole number.

    Examples:
        >>> import torch
        >>> from matrigami.operators import DenseMatrix
        >>> A = DenseMatrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> gmres(A, torch.tensor([[3.0], [1.0]])).X.round(decimals=3)
        tensor([[1.],
                [1.]])
    """
    most = min(restart, A.shape[-1])
    return refined(
        "gmres", lambda system: _cycle(system, most), A, B, tol, max_steps, preconditioner
    )


def _cycle(system: Cycle, most: int) -> tuple[Tensor, list[Tensor]]:
    """One cycle from zero."""
    M = system.inverse or (lambda R: R)
    beta = norms(system.R)
    V = [system.R / safe(beta)]  # 1
    g, triangle = [beta.to(system.R.dtype)], []
    rotations: list[tuple[Tensor, Tensor]] = []
    history: list[Tensor] = []
    for j in range(min(most, system.steps)):  # 2
        W = system.product(M(V[j]))  # 3
        column, W = _orthogonalise(V, W)  # 4-7
        h = norms(W)  # 8
        V.append(W / safe(h))  # 9
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = _rotated(c, s, column[i], column[i + 1])
        radius = torch.hypot(column[j].abs(), h)
        c, s = column[j] / safe(radius), h / safe(radius)
        rotations.append((c, s))
        column[j] = radius.to(W.dtype)
        g[j], last = _rotated(c, s, g[j], torch.zeros_like(g[j]))
        g.append(last)
        triangle.append(column)
        history.append(last.abs())
        if (history[-1] <= system.goal).all():
            break
    return M(_combination(V, triangle, g)), history  # 12


def _rotated(c: Tensor, s: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation by complex `c` and real `s`, applied to a pair."""
    return c.conj() * x + s * y, c * y - s * x


def _orthogonalise(V: list[Tensor], W: Tensor) -> tuple[list[Tensor], Tensor]:
    """Coefficients against the basis with a place for the next, and the rest.

    Twice is enough (Giraud et al. 2005).
    """
    basis = torch.stack(V)  # j ... n k
    first = (basis.conj() * W).sum(-2, keepdim=True)
    W = W - (basis * first).sum(0)
    second = (basis.conj() * W).sum(-2, keepdim=True)
    return list((first + second).unbind(0)), W - (basis * second).sum(0)


def _combination(V: list[Tensor], triangle: list[list[Tensor]], g: list[Tensor]) -> Tensor:
    """The basis times the solution of the triangular least-squares system, by back substitution."""
    j = len(triangle)
    y: list[Tensor] = [torch.zeros_like(g[0])] * j
    for i in reversed(range(j)):
        rest = sum((triangle[c][i] * y[c] for c in range(i + 1, j)), torch.zeros_like(g[0]))
        y[i] = torch.where(triangle[i][i] == 0, 0, (g[i] - rest) / safe(triangle[i][i]))
    return torch.stack([v * c for v, c in zip(V[:j], y, strict=True)]).sum(0)
