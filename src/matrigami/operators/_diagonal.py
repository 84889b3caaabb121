"""Diagonal matrices: they are `n` numbers, and what a multiple of the identity is added as.

Shapes: n = rows = columns, k = right-hand sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, add, compose, power, scale
from matrigami.operators._convert import as_tensor, inexact
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._eigen import (
    Eigh,
    Svd,
    cholesky,
    descending,
    eigh,
    exp,
    is_frobenius,
    largest,
    norm,
    raised,
    refuse_indefinite,
    refuse_skew,
    svd,
    svdvals,
)
from matrigami.operators._functions import diagonal, inverse, pinv, shift, slogdet, solve
from matrigami.operators._kernels import SKEW, is_concrete, vector_norm
from matrigami.operators._triangular import refuse_zeros


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalMatrix(LinearOperator):
    """The matrix `diag(d)`.

    Examples:
        >>> DiagonalMatrix(torch.tensor([1.0, 2.0])) @ torch.ones(2, dtype=torch.float32)
        tensor([1., 2.])
    """

    diagonal: Inexact[Tensor, "*batch n"]

    def __post_init__(self) -> None:
        """Take any vector of numbers; a compiler builds values of its own stand-ins for them."""
        if isinstance(self.diagonal, torch.fx.Proxy):
            return
        given = isinstance(self.diagonal, Tensor) and inexact(self.diagonal)
        if not given or not self.diagonal.ndim:
            t = as_tensor(self.diagonal, torch.empty(0))
            object.__setattr__(self, "diagonal", t if t.ndim else t[None])

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.diagonal.shape, self.diagonal.shape[-1])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Scale the rows."""
        return self.diagonal[..., None] * X

    @property
    def T(self) -> "DiagonalMatrix":
        """Itself."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return torch.diag_embed(self.diagonal)


def identity(
    n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DiagonalMatrix:
    """The identity of size `n`; one number is stored.

    Examples:
        >>> identity(2).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return DiagonalMatrix(torch.ones((), dtype=dtype, device=device).expand(n))


@add.register
def _(A: DiagonalMatrix, B: DiagonalMatrix) -> DiagonalMatrix:
    return DiagonalMatrix(A.diagonal + B.diagonal)


@compose.register
def _(A: DiagonalMatrix, B: DiagonalMatrix) -> DiagonalMatrix:
    return DiagonalMatrix(A.diagonal * B.diagonal)


@compose.register
def _(A: DiagonalMatrix, B: DenseMatrix) -> DenseMatrix:
    return DenseMatrix(A.diagonal[..., None] * B.entries)


@compose.register
def _(A: DenseMatrix, B: DiagonalMatrix) -> DenseMatrix:
    return DenseMatrix(A.entries * B.diagonal[..., None, :])


@scale.register
def _(A: DiagonalMatrix, factor: Tensor) -> DiagonalMatrix:
    return DiagonalMatrix(A.diagonal * factor[..., None])


@shift.register
def _(A: DiagonalMatrix, amount: Tensor) -> DiagonalMatrix:
    return DiagonalMatrix(A.diagonal + amount[..., None])


@solve.register
def _(A: DiagonalMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    refuse_zeros(A.diagonal)
    return B / A.diagonal[..., None]


@inverse.register
def _(A: DiagonalMatrix) -> DiagonalMatrix:
    refuse_zeros(A.diagonal)
    return DiagonalMatrix(1 / A.diagonal)


@pinv.register
def _(A: DiagonalMatrix) -> DiagonalMatrix:
    size = A.diagonal.abs()
    if not size.numel():
        return A
    zero = size <= size.amax(-1, keepdim=True) * size.shape[-1] * torch.finfo(A.dtype).eps
    return DiagonalMatrix(torch.where(zero, 0, 1 / torch.where(zero, 1, A.diagonal)))


@slogdet.register
def _(A: DiagonalMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return A.diagonal.sgn().prod(-1), A.diagonal.abs().log().sum(-1)


@diagonal.register
def _(A: DiagonalMatrix) -> Inexact[Tensor, "*batch n"]:
    return A.diagonal


@eigh.register
def _(A: DiagonalMatrix, k: int | None = None) -> Eigh:
    ones = torch.ones_like(A.diagonal)
    pairs = Eigh(_own_adjoint(A, "eigh"), DiagonalMatrix(ones))
    return pairs if k is None else largest(pairs, k)


@svd.register
def _(A: DiagonalMatrix) -> Svd:
    phase = torch.where(A.diagonal == 0, 1, A.diagonal.sgn())
    return Svd(DiagonalMatrix(phase), A.diagonal.abs(), DiagonalMatrix(torch.ones_like(phase)))


@svdvals.register
def _(A: DiagonalMatrix) -> Float[Tensor, "*batch n"]:
    return descending(A.diagonal.abs(), A)


@norm.register(where=is_frobenius)
def _(A: DiagonalMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return vector_norm(A.diagonal, -1)


@power.register
def _(A: DiagonalMatrix, p: float) -> DiagonalMatrix:
    if p < 0:
        refuse_zeros(A.diagonal)
    if float(p).is_integer():
        return DiagonalMatrix(A.diagonal.pow(p))
    return DiagonalMatrix(raised(real_values(A.diagonal, p), p).to(A.dtype))


def real_values(d: Tensor, p: float) -> Tensor:
    """The eigenvalues of a Hermitian matrix that is stored in complex numbers.

    Raises:
        ValueError: If they are not real.
    """
    if d.is_complex() and is_concrete(d) and (d.imag.abs() > SKEW * d.abs()).any():
        raise ValueError(
            f"power(A, {p}): A has an eigenvalue that is not real.\n"
            "A real power needs a Hermitian positive definite matrix."
        )
    return d.real


def _own_adjoint(A: DiagonalMatrix, name: str) -> Tensor:
    """The numbers of a Hermitian matrix, which are real.

    Raises:
        ValueError: If they are not.
    """
    d = A.diagonal
    if d.is_complex() and is_concrete(d) and (d.imag.abs() > SKEW * d.abs()).any():
        refuse_skew(A, name)
    return d.real


@exp.register
def _(A: DiagonalMatrix) -> DiagonalMatrix:
    return DiagonalMatrix(A.diagonal.exp())


@cholesky.register
def _(A: DiagonalMatrix) -> DiagonalMatrix:
    d = _own_adjoint(A, "cholesky")
    if is_concrete(d) and not (d > 0).all():
        refuse_indefinite(A)
    return DiagonalMatrix(d.sqrt().to(A.dtype))
