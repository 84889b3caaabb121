"""What an iterative solver returns, and what all of them share.

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matrigami.operators import LinearOperator

Preconditioner = Callable[[Tensor], Tensor]
"""An approximate inverse, applied to a block of vectors `(..., n, k)`."""


class Solution(NamedTuple):
    """The result of an iteration.

    Attributes:
        X: The solution, `(..., n, k)`.
        residuals: Norms of the residual relative to the right-hand side, for each step and
            right-hand side, `(steps + 1, ..., k)`.
        converged: Whether each right-hand side reached the tolerance, `(..., k)`.
    """

    X: Float[Tensor, "... n k"]
    residuals: Float[Tensor, "steps ... k"]
    converged: Bool[Tensor, "... k"]

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.residuals) - 1


def tolerance(dtype: torch.dtype) -> float:
    """Default relative residual, `eps^(2/3)`: 4e-11 in double precision, 2e-5 in single."""
    return torch.finfo(dtype).eps ** (2 / 3)


def dot(X: Float[Tensor, "... n k"], Y: Float[Tensor, "... n k"]) -> Float[Tensor, "... 1 k"]:
    """Inner product of each pair of columns."""
    return (X * Y).sum(-2, keepdim=True)


def norms(X: Float[Tensor, "... n k"]) -> Float[Tensor, "... 1 k"]:
    """Euclidean norm of each column."""
    return torch.linalg.vector_norm(X, dim=-2, keepdim=True)


def safe(X: Tensor) -> Tensor:
    """The divisor, or one where it is zero: a column that has converged exactly."""
    return torch.where(X == 0, 1, X)


def check_system(A: LinearOperator, B: Tensor, tol: float | None) -> float:
    """The tolerance of a solver called with these arguments.

    Raises:
        ValueError: If the matrix is not square, the right-hand side does not fit, or is not finite.
    """
    n = A.shape[-1]
    if A.shape[-2] != n or B.ndim < 2 or B.shape[-2] != n:
        raise ValueError(
            f"an iterative solver was asked for A of {A.shape} and B of {tuple(B.shape)}.\n"
            "A should be square and B of shape (..., n, k).\nFor a vector b pass b[:, None]."
        )
    if not torch.isfinite(B).all():
        raise ValueError(
            "an iterative solver was asked for a right-hand side with NaN or infinite entries.\n"
            "No solution exists."
        )
    return tolerance(B.dtype) if tol is None else tol


def finished(X: Tensor, history: list[Tensor], tol: float) -> Solution:
    """Collect a solution."""
    return Solution(
        X, torch.stack([r.squeeze(-2) for r in history]), (history[-1] <= tol).squeeze(-2)
    )
