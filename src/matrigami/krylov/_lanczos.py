"""Lanczos: eigenvalues of a symmetric matrix, and traces of its functions.

Step numbers: Saad (2011), Numerical Methods for Large Eigenvalue Problems, Algorithm 6.5, with
full reorthogonalisation.

Shapes: n = rows = columns, k = starting vectors (each has its own recurrence), j = steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.krylov._solution import dot, norms, safe
from matrigami.operators import DenseMatrix, Eigh, LinearOperator


class Tridiagonal(NamedTuple):
    """`A Q = Q T + off[-1] q e_j.T`: orthonormal `Q`, tridiagonal `T`, for each start.

    Attributes:
        diagonal: Of `T`, `(..., k, j)`.
        off: Below it, `(..., k, j)`; the last entry leads out of the space.
        Q: Basis, `(j, ..., n, k)`.
    """

    diagonal: Float[Tensor, "... k j"]
    off: Float[Tensor, "... k j"]
    Q: Float[Tensor, "j ... n k"]

    def eigh(self) -> tuple[Float[Tensor, "... k j"], Float[Tensor, "... k j j"]]:
        """Ritz values, and the eigenvectors of `T`."""
        inner = self.off[..., :-1]
        T = (
            torch.diag_embed(self.diagonal)
            + torch.diag_embed(inner, 1)
            + torch.diag_embed(inner, -1)
        )
        values, vectors = torch.linalg.eigh(T)
        return values, vectors


class Estimate(NamedTuple):
    """A Monte-Carlo mean and its standard error over the probes."""

    value: Float[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]


def lanczos(A: LinearOperator, V: Float[Tensor, "... n k"], steps: int) -> Tridiagonal:
    """Run `steps` steps of the recurrence from each column of `V`.

    Args:
        A: A symmetric matrix; its symmetry is not checked.
        V: Starting vectors.
        steps: At most `n`; a column whose space is exhausted continues with zeros.

    Raises:
        ValueError: If `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"lanczos was asked for {steps} steps.\nIt takes at least one.")
    q = V / safe(norms(V))  # 1
    Q, diagonal, off = [q], [], []
    q_old, beta = torch.zeros_like(q), torch.zeros_like(norms(V))  # 1
    for j in range(steps):  # 2
        w = A.matmat(q) - beta * q_old  # 3
        alpha = dot(w, q)  # 4
        w = w - alpha * q  # 5
        basis = torch.stack(Q)
        for _ in range(2):
            w = w - (basis * (basis * w).sum(-2, keepdim=True)).sum(0)
        scale = norms(w)
        exhausted = scale <= 10 * torch.finfo(V.dtype).eps * (alpha.abs() + beta)
        beta = torch.where(exhausted, 0, scale)  # 6
        q_old, q = q, torch.where(exhausted, 0, w / safe(scale))  # 7
        diagonal.append(alpha[..., 0, :])
        off.append(beta[..., 0, :])
        if j + 1 < steps:
            Q.append(q)
    return Tridiagonal(torch.stack(diagonal, -1), torch.stack(off, -1), torch.stack(Q))


def largest_eigenpairs(
    A: LinearOperator, k: int, *, tol: float = 1e-8, generator: torch.Generator | None = None
) -> Eigh:
    """The `k` eigenvalues of largest magnitude of one symmetric matrix, and their eigenvectors.

    The Krylov space grows until every residual `|A v - value v|` is below `tol` times the largest
    value, at most to `n`. Values are differentiable in the tensors of `A` (Hellmann-Feynman),
    vectors are not.

    Args:
        A: The matrix, not a stack.
        k: Number of pairs.
        tol: Relative residual.
        generator: Source of the starting vector.

    Raises:
        ValueError: If `A` is a stack, or there are fewer than `k` eigenvalues.
    """
    n = A.shape[-1]
    if len(A.shape) > 2 or not 1 <= k <= n:
        raise ValueError(
            f"largest_eigenpairs was asked for {k} pairs of a matrix of shape {A.shape}.\n"
            f"It takes one matrix, and 1 to {n} pairs."
        )
    start = torch.randn(n, 1, generator=generator, dtype=A.dtype, device=A.device)
    steps = min(max(2 * k + 20, 40), n)
    with torch.no_grad():
        while True:
            run = lanczos(A, start, steps)
            values, vectors = (t[0] for t in run.eigh())
            order = values.abs().argsort(descending=True)[:k]
            residual = (run.off[0, -1] * vectors[-1, order]).abs().max()
            if steps == n or residual <= tol * values.abs().max():
                break
            steps = min(2 * steps, n)
        V = run.Q[..., 0].mT @ vectors[:, order]
    return Eigh((V * A.matmat(V)).sum(0), DenseMatrix(V))


def stochastic_lanczos(
    A: LinearOperator,
    function: Callable[[Tensor], Tensor],
    *,
    probes: int = 32,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate `trace(f(A))` of a symmetric matrix, e.g. `log` for the log-determinant.

    Each random sign vector `z` gives the Gauss quadrature `z.T f(A) z = n sum_i w_i f(theta_i)`
    with Ritz values `theta` and the squared first components `w`; the mean over probes is unbiased
    up to the quadrature, its standard error falls as `probes^(-1/2)`. Source: Ubaru, Chen and Saad
    (2017).

    Args:
        A: A symmetric matrix, or a stack of them.
        function: Applied to Ritz values.
        probes: Number of sign vectors.
        steps: Lanczos steps for each.
        generator: Source of the signs.

    Returns:
        Mean and standard error, for each matrix of a stack.
    """
    *batch, n, _ = A.shape
    signs = torch.randint(0, 2, (*batch, n, probes), generator=generator, device=A.device)
    run = lanczos(A, (2 * signs - 1).to(A.dtype), min(steps, n))
    theta, vectors = run.eigh()
    weights = vectors[..., 0, :].square()
    seen = (
        weights > torch.finfo(A.dtype).eps ** 2
    )  # an exhausted space pads T with zeros, which no probe sees
    theta = torch.where(seen, theta, theta.amax(-1, keepdim=True))
    values = n * (torch.where(seen, weights, 0) * function(theta)).sum(-1)
    return Estimate(values.mean(-1), values.std(-1) / probes**0.5)
