"""Triangular matrices, e.g. the Cholesky factor of a positive definite one.

Shapes: n = rows = columns, k = right-hand sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, scale
from matrigami.operators._eigen import adjoint_to_itself, cholesky, refuse_indefinite
from matrigami.operators._functions import diagonal, inverse, slogdet, solve
from matrigami.operators._kernels import is_concrete


@dataclass(frozen=True, eq=False, repr=False)
class TriangularMatrix(LinearOperator):
    """The lower (or upper) triangle of `entries`; what is stored beyond it is not looked at.

    Examples:
        >>> TriangularMatrix(torch.ones(2, 2)).dense()
        tensor([[1., 0.],
                [1., 1.]])
    """

    entries: Inexact[Tensor, "*batch n n"]
    upper: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return tuple(self.entries.shape)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Multiply a block of vectors."""
        return self.dense() @ X

    @property
    def T(self) -> "TriangularMatrix":
        """The transpose, of the other kind."""
        return TriangularMatrix(self.entries.mT, not self.upper)

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return self.entries.triu() if self.upper else self.entries.tril()


@scale.register
def _(A: TriangularMatrix, factor: Tensor) -> TriangularMatrix:
    return TriangularMatrix(A.entries * factor[..., None, None], A.upper)


@solve.register
def _(A: TriangularMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    refuse_zeros(diagonal(A))
    return torch.linalg.solve_triangular(A.dense(), B, upper=A.upper)


def refuse_zeros(d: Tensor) -> None:
    """Say that a matrix with these pivots, or eigenvalues, is singular.

    Raises:
        torch.linalg.LinAlgError: If one of them is zero.
    """
    if is_concrete(d) and (d == 0).any():
        raise torch.linalg.LinAlgError("a zero on the diagonal")


@inverse.register
def _(A: TriangularMatrix) -> TriangularMatrix:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return TriangularMatrix(solve(A, eye), A.upper)


@slogdet.register
def _(A: TriangularMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    d = diagonal(A)
    return d.sgn().prod(-1), d.abs().log().sum(-1)


@diagonal.register
def _(A: TriangularMatrix) -> Inexact[Tensor, "*batch n"]:
    return torch.diagonal(A.entries, dim1=-2, dim2=-1)


@cholesky.register
def _(A: LinearOperator) -> TriangularMatrix:
    try:
        return TriangularMatrix(torch.linalg.cholesky(adjoint_to_itself(A, "cholesky")))
    except torch.linalg.LinAlgError as error:
        return refuse_indefinite(A, error)
