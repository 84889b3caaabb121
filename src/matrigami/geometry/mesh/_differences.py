"""First and second differences along one axis, the latter with its eigenpairs in closed form.

`(f2 - f1) / h` is a matrix; so is `-(f3 - 2 f2 + f1) / h^2`. The boundary decides where the
unknowns are:

    dirichlet   n interior points of n + 2, h = length / (n + 1), zero outside; sines
    neumann     n cell centres, h = length / n, zero derivative at both ends; cosines
    periodic    n points, h = length / n; sines and cosines

Eigenvalues `(4 / h^2) sin(angle / 2)^2`. Source: Strang (1999), The discrete cosine transform, SIAM
Review 41.

Shapes: n = unknowns, k = right-hand sides.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.krylov import is_large
from matrigami.operators import (
    Cost,
    DenseMatrix,
    DiagonalMatrix,
    Eigh,
    LinearOperator,
    SpectralMatrix,
    cost,
    diagonal,
    eigh,
    largest,
    scale,
    shift,
    slogdet,
    solve,
)
from matrigami.structures import FourierMatrix, SineMatrix, SparseMatrix
from matrigami.structures._sparse import assembled

Boundary = Literal["dirichlet", "neumann", "periodic"]
"""What holds at both ends of an axis."""


@dataclass(frozen=True, eq=False, repr=False)
class SecondDifferenceMatrix(LinearOperator):
    """`factor * tridiag(-1, 2, -1)`, with its corners as the boundary has them.

    Args:
        factor: The coefficient over the square of the spacing.
        n: Unknowns.
        boundary: What holds at both ends.

    Examples:
        >>> SecondDifferenceMatrix(torch.tensor(1.0), 3, "periodic").dense()
        tensor([[ 2., -1., -1.],
                [-1.,  2., -1.],
                [-1., -1.,  2.]])
    """

    factor: Inexact[Tensor, "*batch"]
    n: int
    boundary: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.factor.shape, self.n, self.n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """The differences of the differences."""
        steps = differences(X, self.boundary)
        return -self.factor[..., None, None] * steps.diff(dim=-2)

    @property
    def T(self) -> "SecondDifferenceMatrix":
        """Symmetric."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.n, dtype=self.dtype, device=self.device))


def differences(X: Inexact[Tensor, "... n k"], boundary: str) -> Inexact[Tensor, "... n1 k"]:
    """`x[i] - x[i - 1]` for i = 0 ... n, with the values that the boundary gives outside."""
    if boundary == "periodic":
        return torch.cat([X[..., -1:, :], X, X[..., :1, :]], -2).diff(dim=-2)
    if boundary == "neumann":
        return torch.nn.functional.pad(X.diff(dim=-2), (0, 0, 1, 1))
    return torch.nn.functional.pad(X, (0, 0, 1, 1)).diff(dim=-2)


def first_difference(
    n: int, spacing: float, boundary: str, dtype: torch.dtype, device: torch.device | None = None
) -> SparseMatrix:
    """The matrix of `(f[i] - f[i - 1]) / h`, a row for each face between two cells.

    Faces: dirichlet n + 1, periodic n (the last one joins both ends), neumann n - 1.

    Examples:
        >>> first_difference(2, 0.5, "dirichlet", torch.float32).dense()
        tensor([[ 2.,  0.],
                [-2.,  2.],
                [ 0., -2.]])
    """
    i = torch.arange(n, device=device)
    ones = torch.full((n,), 1 / spacing, dtype=dtype, device=device)
    if boundary == "dirichlet":
        rows, columns, faces = torch.cat([i, i + 1]), torch.cat([i, i]), n + 1
        entries = torch.cat([ones, -ones])
    elif boundary == "periodic":
        rows, columns, faces = torch.cat([i, i]), torch.cat([(i + 1) % n, i]), n
        entries = torch.cat([ones, -ones])
    else:
        i, ones = i[:-1], ones[:-1]
        rows, columns, faces = torch.cat([i, i]), torch.cat([i + 1, i]), n - 1
        entries = torch.cat([ones, -ones])
    return assembled(entries, rows, columns, (faces, n))


def eigenpairs(
    n: int, boundary: str, empty: Inexact[Tensor, " 0"]
) -> tuple[Float[Tensor, " n"], LinearOperator]:
    """Eigenvalues of `tridiag(-1, 2, -1)` and its orthonormal eigenvectors, as columns."""
    k = torch.arange(n, dtype=empty.real.dtype, device=empty.device)
    if boundary == "dirichlet":
        angle, Q = (k + 1) * math.pi / (n + 1), SineMatrix(empty, n)
    elif boundary == "periodic":
        angle, Q = 2 * k * math.pi / n, FourierMatrix(empty, n, inverse=True)
    else:
        angle = k * math.pi / n
        cosines = ((k[:, None] + 0.5) * angle).cos() * math.sqrt(2 / n)
        cosines[:, 0] = 1 / math.sqrt(n)
        Q = DenseMatrix(cosines.to(empty.dtype))
    return 4 * (angle / 2).sin().square(), Q


def _spectral(A: SecondDifferenceMatrix) -> SpectralMatrix:
    """By its eigenvectors, which a complex factor shares."""
    values, Q = eigenpairs(A.n, A.boundary, A.factor.new_empty(0))
    return SpectralMatrix(A.factor[..., None] * values, Q)


@eigh.register
def _(A: SecondDifferenceMatrix, k: int | None = None) -> Eigh:
    D = _spectral(A)
    pairs = Eigh(eigh(DiagonalMatrix(D.values)).values, D.vectors)
    return pairs if k is None else largest(pairs, k)


def _is_diagonalized(A: SecondDifferenceMatrix, *_: Any) -> bool:
    """Whether the vectors are a transform, or few."""
    return A.boundary != "neumann" or not is_large(A)


@solve.register
def _(A: SecondDifferenceMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    if A.boundary == "neumann":
        raise torch.linalg.LinAlgError("only differences of the unknowns are determined")
    return solve(_spectral(A), B)


@slogdet.register(where=_is_diagonalized)
def _(A: SecondDifferenceMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return slogdet(_spectral(A))


@shift.register
def _(A: SecondDifferenceMatrix, amount: Tensor) -> SpectralMatrix:
    return shift(_spectral(A), amount)  # pyright: ignore[reportReturnType]


@scale.register
def _(A: SecondDifferenceMatrix, factor: Tensor) -> SecondDifferenceMatrix:
    return SecondDifferenceMatrix(A.factor * factor, A.n, A.boundary)


@diagonal.register
def _(A: SecondDifferenceMatrix) -> Inexact[Tensor, "*batch n"]:
    return A.matmat(torch.eye(A.n, dtype=A.dtype, device=A.device)).diagonal(dim1=-2, dim2=-1)


@cost.register
def _(A: SecondDifferenceMatrix) -> Cost:
    return Cost(A.factor.numel(), 3 * A.n * A.factor.numel(), A.factor.nbytes)
