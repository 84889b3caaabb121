"""LSMR, for least squares with any matrix.

Step numbers: Fong and Saunders (2011), LSMR: An iterative algorithm for sparse least-squares
problems, SIAM J. Sci. Comput. 33, 2950-2971, the algorithm of section 2.8 without damping: a damped
problem is the undamped one of the matrix with `damping I` below it.

Shapes: m = rows, n = columns, k = right-hand sides, solved independently.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matrigami.krylov._solution import Product, Solution, norms, safe, tolerance
from matrigami.krylov._systems import (
    check_system,
    corrected,
    counted,
    exponents,
    ldexp,
    of_columns,
    with_precision,
    working_type,
)
from matrigami.operators import LinearOperator


@counted(max_steps=0)
@of_columns
def lsmr(
    A: LinearOperator,
    B: Any,
    *,
    damping: float = 0.0,
    tol: float | None = None,
    max_steps: int | None = None,
) -> Solution:
    """Minimise `|A X - B|^2 + damping^2 |X|^2`, column by column, for any `m x n` matrix.

    Of all minimisers it finds the one of least norm. The residual of a step is the smaller of
    `|A.H R| / (|A| |R|)` and `|R| / |B|` with `R = B - A X` (stacked with `-damping X`): the
    solution is that of a problem whose matrix, or right-hand side, differs by so much. The last
    one is computed, and the iteration starts again where it is not what the recurrence says. The
    result carries no gradient.

    Args:
        A: The matrix; `A.H` is used too.
        B: Right-hand sides, `(m,)` or `(..., m, k)`, tensor or array; each is scaled to norm
            one first.
        damping: Tikhonov's parameter, in units of `A`.
        tol: Residual at which a column stops; default `eps^(2/3)`.
        max_steps: Default `10 n`.

    Returns:
        Solution, residual history and convergence of each column, in the kind of `B`.

    Raises:
        ValueError: If `B` does not fit or is not finite, or `max_steps` is no whole number.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> line = DenseMatrix(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
        >>> lsmr(line, torch.tensor([[1.0], [3.0], [5.0]])).X.round(decimals=3)
        tensor([[1.],
                [2.]])
    """
    check_system("lsmr", A, B, square=False)
    dtype = working_type(A.dtype, B.dtype)
    asked = torch.promote_types(A.dtype, B.dtype)
    tol = tolerance(dtype) if tol is None else tol
    left = 10 * A.shape[-1] if max_steps is None else max_steps
    with torch.no_grad():
        A = with_precision(A, dtype)
        batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        B = B.to(dtype).expand(*batch, *B.shape[-2:])
        power = exponents(B, -2) if B.numel() else norms(B).to(torch.int64)
        B = ldexp(B, -power)
        size = norms(B)
        problem = _problem(A, B / safe(size), damping)
        X, history = _cycles(problem, tol, left)
        X = ldexp(X * size, power - problem.power).to(asked)
    residual = torch.where(torch.isfinite(X).all(-2, keepdim=True), history[-1], torch.inf)
    residuals = torch.stack([*history[:-1], residual]).squeeze(-2)
    return Solution(X, residuals, residuals[-1] <= tol)


class _Problem(NamedTuple):
    """A least-squares problem of unit scale: both products, and the right-hand side."""

    product: Product
    adjoint: Product
    B: Tensor
    power: Tensor


def _problem(A: LinearOperator, B: Tensor, damping: float) -> _Problem:
    """The problem scaled by a power of two, with the damping below the matrix."""
    (m, n), H = A.shape[-2:], A.H
    power = (
        exponents(H @ B, (-2, -1))
        if B.numel() and n
        else torch.zeros(1, 1, dtype=torch.int64, device=B.device)
    )
    shift = ldexp(torch.full_like(power, damping, dtype=B.dtype.to_real()), -power)

    def product(X: Tensor) -> Tensor:
        """The matrix, and the damping below it."""
        Y = ldexp(A @ X, -power)
        return torch.cat([Y, shift * X], -2) if damping else Y

    def adjoint(Y: Tensor) -> Tensor:
        """The adjoint of both."""
        X = ldexp(H @ Y[..., :m, :], -power)
        return X + shift * Y[..., m:, :] if damping else X

    zeros = B.new_zeros(*B.shape[:-2], n, B.shape[-1])
    return _Problem(product, adjoint, torch.cat([B, zeros], -2) if damping else B, power)


def _cycles(problem: _Problem, tol: float, left: int) -> tuple[Tensor, list[Tensor]]:
    """Correct the solution by what each cycle finds for its residual."""
    R, G = problem.B, problem.adjoint(problem.B)
    norm = safe(norms(G) / safe(norms(R)))  # of the matrix, as far as it was seen

    def judged(R: Tensor, G: Tensor) -> Tensor:
        """The residual of the normal equations, or of the system: `B` is of norm one."""
        return torch.minimum(norms(G) / (norm * safe(norms(R))), norms(R))

    def correct(R: Tensor, residual: Tensor, left: int) -> tuple[Tensor, list[Tensor]]:
        """One cycle from the residual of the columns that are not done."""
        nonlocal norm
        size = norms(R)
        unit = torch.where(residual > tol, R / safe(size), 0)
        D, steps, norm = _cycle(problem, unit, tol, left, norm)
        return size * D, steps

    def measure(X: Tensor) -> tuple[Tensor, Tensor]:
        """The true residual, as it is judged."""
        R = problem.B - problem.product(X)
        return R, judged(R, problem.adjoint(R))

    return corrected(torch.zeros_like(G), R, judged(R, G), tol, left, correct, measure)


def _cycle(
    problem: _Problem, B: Tensor, tol: float, most: int, norm: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """LSMR from zero for unit right-hand sides; also the norm of the matrix as it was seen."""
    beta = norms(B)  # 1
    u = B / safe(beta)
    v = problem.adjoint(u)
    alpha = norms(v)
    v = v / safe(alpha)
    one = torch.ones_like(alpha)
    a, z = alpha, alpha * beta
    rho, rho_, c_, s_ = one, one, one, torch.zeros_like(one)
    h, h_, X = v, torch.zeros_like(v), torch.zeros_like(v)
    history: list[Tensor] = []
    for _ in range(most):  # 2
        active = z.abs() > tol * norm
        if not active.any():
            break
        u = problem.product(v) - alpha * u  # 3
        beta = norms(u)
        u = u / safe(beta)
        norm = torch.maximum(norm, torch.hypot(alpha, beta))
        v = problem.adjoint(u) - beta * v
        alpha = norms(v)
        v = v / safe(alpha)
        rho_old, rho = rho, safe(torch.hypot(a, beta))  # 4
        c, s = a / rho, beta / rho
        theta, a = s * alpha, c * alpha
        theta_, rho_old_ = s_ * rho, rho_  # 5
        rho_ = safe(torch.hypot(c_ * rho, theta))
        c_, s_ = c_ * rho / rho_, theta / rho_
        zeta, z = c_ * z, -s_ * z
        h_ = h - theta_ * rho / (rho_old * rho_old_) * h_  # 6
        X = X + torch.where(active, zeta / (rho * rho_), 0) * h_
        h = v - theta / rho * h
        history.append(z.abs() / norm)
    return X, history, norm
