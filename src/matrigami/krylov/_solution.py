"""What an iterative solver returns, and the vector arithmetic that all of them share.

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Inexact
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A linear map of a block of vectors `(..., n, k)`."""

Preconditioner = Callable[[Tensor], Tensor]
"""An approximate inverse, applied to a block of vectors `(..., n, k)`."""


class Solution(NamedTuple):
    """The result of an iteration, without the axis `k` and in arrays where a vector or arrays came.

    Attributes:
        X: The solution, `(..., n, k)`.
        residuals: Norms of the residual relative to the right-hand side, for each step and
            right-hand side, `(steps + 1, ..., k)`. Within a cycle they come from the recurrence;
            the last one is that of `B - A X`, computed.
        converged: Whether the last residual reached the tolerance, `(..., k)`; never where the
            solution is not finite.
    """

    X: Inexact[Tensor, "... n k"]
    residuals: Float[Tensor, "steps ... k"]
    converged: Bool[Tensor, "... k"]

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.residuals) - 1


def tolerance(dtype: torch.dtype) -> float:
    """Default relative residual, `eps^(2/3)`: 4e-11 in double precision, 2e-5 in single."""
    return torch.finfo(dtype).eps ** (2 / 3)


def dot(X: Inexact[Tensor, "... n k"], Y: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... 1 k"]:
    """Inner product `x.H y` of each pair of columns."""
    return (X.conj() * Y).sum(-2, keepdim=True)


def norms(X: Inexact[Tensor, "... n k"]) -> Float[Tensor, "... 1 k"]:
    """Euclidean norm of each column."""
    return torch.linalg.vector_norm(X, dim=-2, keepdim=True)


def safe(X: Tensor) -> Tensor:
    """The divisor, or one where it is zero: a column that has converged exactly."""
    return torch.where(X == 0, 1, X)
