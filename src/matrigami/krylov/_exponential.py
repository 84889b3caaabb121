"""The action of the matrix exponential, by Krylov spaces and steps that control their error.

Step numbers: Sidje (1998), Expokit, ACM Trans. Math. Softw. 24, 130-156, Algorithm 3.2, with the
error estimate of Saad (1992), SIAM J. Numer. Anal. 29, 209-228, formula (35).

Shapes: n = rows = columns, k = vectors, j = dimension of the space.
"""

from typing import Any

import torch
from torch import Tensor

from matrigami.krylov._solution import norms, safe, tolerance
from matrigami.krylov._systems import (
    check_system,
    counted,
    of_columns,
    with_precision,
    working_type,
)
from matrigami.operators import LinearOperator


@counted(space=1, max_steps=0)
@of_columns
def exp_multiply(
    A: LinearOperator,
    X: Any,
    *,
    time: float = 1.0,
    tol: float | None = None,
    space: int = 30,
    max_steps: int | None = None,
) -> Any:
    """`exp(time A) X` for any square `A`, by products with `A` alone.

    Differentiable in `X` and the tensors of `A` by the operations that are run (reverse mode).

    Args:
        A: The matrix, or a stack; products grow with `|time A|^(1/2)` where it is Hermitian and
            negative, with `|time A|` in general.
        X: Vectors, `(n,)` or `(..., n, k)`; an array is answered by an array.
        time: Factor of the exponent, of either sign.
        tol: Relative error of the result, as estimated; default `eps^(2/3)`.
        space: Largest dimension of a Krylov space; `space + 1` blocks of the size of `X` are kept.
        max_steps: Most products; default 100,000.

    Returns:
        The product, in the type that `A` and `X` promote to.

    Raises:
        ValueError: If `A` is not square, or `X` does not fit or is not finite,
            or a count is no whole number.
        RuntimeError: If the steps did not suffice, or the result is beyond the range of its type.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> turn = DenseMatrix(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> exp_multiply(turn, torch.tensor([[1.0], [0.0]]), time=torch.pi / 2).round(decimals=3)
        tensor([[0.],
                [1.]])
    """
    check_system("exp_multiply", A, X.detach())
    dtype = working_type(A.dtype, X.dtype)
    asked = torch.promote_types(A.dtype, X.dtype)
    tol = tolerance(dtype) if tol is None else tol
    A = with_precision(A, dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], X.shape[:-2])
    Y = X.to(dtype).expand(*batch, *X.shape[-2:])
    left = 100_000 if max_steps is None else max_steps
    done, step = 0.0, 1.0  # in parts of `time`
    while done < 1 and Y.numel():
        beta = norms(Y)
        V, H = _arnoldi(A, Y / safe(beta), min(space, A.shape[-1]))  # 1
        left -= len(V) - 1
        y, step = _coefficients(H * time, min(1.25 * step, 1 - done), tol)  # 2
        if step == 0 or left < 0:
            raise _unfinished(A, time, tol, done)
        Y = beta * (V * y.movedim(-1, 0)[..., None, :]).sum(0)  # 3
        done = done + step if step < 1 - done else 1.0
    return Y.to(asked)


def _arnoldi(A: LinearOperator, Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Basis `(j+1, ..., n, k)` and `H` with a zero last column, `(..., k, j+1, j+1)`, by column."""
    V, columns = [Q], []
    for j in range(steps):
        W = A @ V[-1]
        size = norms(W.detach())
        basis = torch.stack(V)
        first = (basis.conj() * W).sum(-2, keepdim=True)
        W = W - (basis * first).sum(0)
        second = (basis.conj() * W).sum(-2, keepdim=True)  # twice is enough
        W = W - (basis * second).sum(0)
        h = norms(W)
        ended = h <= 10 * torch.finfo(Q.dtype).eps * size
        divisor = torch.where(ended, 1, h)
        V.append(torch.where(ended, 0, W / divisor))
        column = [*(first + second)[..., 0, :], torch.where(ended, 0, h)[..., 0, :].to(Q.dtype)]
        columns.append(torch.stack(column + [torch.zeros_like(column[0])] * (steps - 1 - j), -1))
    columns.append(torch.zeros_like(columns[-1]))
    return torch.stack(V), torch.stack(columns, -1)


def _coefficients(H: Tensor, step: float, tol: float) -> tuple[Tensor, float]:
    """`exp(step H) e_1` for the longest step that is accurate enough, and that step; 0 if none."""
    order = H.shape[-1] - 1
    for _ in range(60):
        y = torch.linalg.matrix_exp(step * H)[..., 0]
        rest = y.detach()[..., -1].abs()  # 2: what leads out of the space
        allowed = tol * step * torch.linalg.vector_norm(y.detach(), dim=-1)
        if torch.isfinite(y).all():
            if (rest <= allowed).all():
                return y, step
            excess = float((rest / safe(allowed)).max())
            step *= min(max(0.9 * excess ** (-1 / order), 0.1), 0.8)
        else:
            step /= 4
    return H[..., 0], 0.0


def _unfinished(A: LinearOperator, time: float, tol: float, done: float) -> RuntimeError:
    """What is said where no step is accurate enough, or there are no more."""
    return RuntimeError(
        f"exp_multiply(A, X, time={time}): only {done:.1%} of the way were covered for {A!r}.\n"
        f"A relative error of {tol:.1e} was asked for.\n"
        "Give a larger max_steps, space or tol, and check that the result is finite."
    )
