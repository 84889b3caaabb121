"""A Hermitian matrix by its eigenpairs: `A = Q diag(values) Q.H`, with `Q` any unitary value.

With a Kronecker product as `Q` it is the eigenvalue-corrected curvature of a layer (George et al.
2018, arXiv:1806.03884), or a Kronecker product plus a multiple of the identity.

Shapes: n = rows = columns, k = right-hand sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._algebra import SumMatrix
from matrigami.operators._base import LinearOperator, add, conj, power, question, scale
from matrigami.operators._dense import DenseMatrix, times
from matrigami.operators._diagonal import DiagonalMatrix
from matrigami.operators._eigen import (
    Eigh,
    Svd,
    descending,
    eigh,
    exp,
    largest,
    norm,
    raised,
    schatten,
    svd,
    svdvals,
)
from matrigami.operators._functions import (
    Cost,
    cost,
    diagonal,
    inverse,
    pinv,
    shift,
    slogdet,
    solve,
    trace,
)
from matrigami.operators._kernels import is_differentiated, is_hermitian
from matrigami.operators._memory import is_big
from matrigami.operators._products import hadamard
from matrigami.operators._tree import named_tensors
from matrigami.operators._triangular import refuse_zeros


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMatrix(LinearOperator):
    """The matrix `vectors @ diag(values) @ vectors.H`; the columns of `vectors` are orthonormal.

    Complex values are allowed: the matrix is normal then.

    Examples:
        >>> A = SpectralMatrix(torch.tensor([1.0, 3.0]), DenseMatrix(torch.eye(2)))
        >>> A @ torch.ones(2, dtype=torch.float32), float(trace(A))
        (tensor([1., 3.]), 4.0)
    """

    values: Inexact[Tensor, "*batch n"]
    vectors: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        n = self.vectors.shape[-2]
        batch = torch.broadcast_shapes(self.values.shape[:-1], self.vectors.shape[:-2])
        return (*batch, n, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Into the eigenbasis, scale, and back."""
        return self.vectors @ (self.values[..., None] * (self.vectors.H @ X))

    @property
    def T(self) -> "SpectralMatrix":
        """The conjugate vectors, which are the vectors of a real matrix."""
        return SpectralMatrix(self.values, conj(self.vectors))

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        Q = self.vectors.dense()
        return times(Q * self.values[..., None, :], Q.mH)


@question
def hermitian(A: LinearOperator) -> bool:
    """Whether a value surely equals its adjoint, up to the rounding of a product that made it."""
    return A.T is A and not A.dtype.is_complex


@hermitian.register
def _(A: DenseMatrix) -> bool:
    return is_hermitian(A.entries)


@hermitian.register
def _(A: SpectralMatrix) -> bool:
    return not A.values.is_complex()


@hermitian.register
def _(A: SumMatrix) -> bool:
    return all(map(hermitian, A.terms))


def differentiated(A: LinearOperator) -> bool:
    """Whether somebody may ask for a derivative in the tensors of a value."""
    return is_differentiated(*named_tensors(A).values())


@add.register(where=lambda A, B: A.vectors is B.vectors)
def _(A: SpectralMatrix, B: SpectralMatrix) -> SpectralMatrix:
    return SpectralMatrix(A.values + B.values, A.vectors)


@conj.register
def _(A: SpectralMatrix) -> SpectralMatrix:
    return SpectralMatrix(A.values.conj(), conj(A.vectors))


@scale.register
def _(A: SpectralMatrix, factor: Tensor) -> SpectralMatrix:
    return SpectralMatrix(A.values * factor[..., None], A.vectors)


@shift.register
def _(A: SpectralMatrix, amount: Tensor) -> SpectralMatrix:
    return SpectralMatrix(A.values + amount[..., None], A.vectors)


@solve.register
def _(A: SpectralMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    refuse_zeros(A.values)
    return SpectralMatrix(1 / A.values, A.vectors) @ B


@inverse.register
def _(A: SpectralMatrix) -> SpectralMatrix:
    refuse_zeros(A.values)
    return SpectralMatrix(1 / A.values, A.vectors)


@pinv.register
def _(A: SpectralMatrix) -> SpectralMatrix:
    return SpectralMatrix(diagonal(pinv(DiagonalMatrix(A.values))), A.vectors)


@slogdet.register
def _(A: SpectralMatrix) -> tuple[Inexact[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    sign = A.values.sgn().prod(-1)
    return sign.to(A.dtype), A.values.abs().log().sum(-1)


@trace.register
def _(A: SpectralMatrix) -> Inexact[Tensor, "*batch"]:
    return A.values.sum(-1).to(A.dtype)


@diagonal.register
def _(A: SpectralMatrix) -> Inexact[Tensor, "*batch n"]:
    """`diag(Q D Q.H) = (Q o conj(Q)) d`, and for a Kronecker product `Q o conj(Q)` is one too."""
    squares = hadamard(A.vectors, conj(A.vectors))
    return (squares @ A.values[..., None])[..., 0].to(A.dtype)


@eigh.register(where=lambda A, k=None: not A.values.is_complex())
def _(A: SpectralMatrix, k: int | None = None) -> Eigh:
    pairs = Eigh(A.values, A.vectors)
    return pairs if k is None else largest(pairs, k)


@svd.register(where=lambda A: not A.values.is_complex())
def _(A: SpectralMatrix) -> Svd:
    sign = torch.where(A.values < 0, -1, 1).to(A.dtype)
    return Svd(A.vectors @ DiagonalMatrix(sign), A.values.abs(), A.vectors)


@svdvals.register
def _(A: SpectralMatrix) -> Float[Tensor, "*batch n"]:
    return descending(A.values.abs(), A)


@norm.register
def _(A: SpectralMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return schatten(A.values, order)


@power.register
def _(A: SpectralMatrix, p: float) -> SpectralMatrix:
    if p < 0:
        refuse_zeros(A.values)
    return SpectralMatrix(raised(A.values, p), A.vectors)


@exp.register
def _(A: SpectralMatrix) -> SpectralMatrix:
    return SpectralMatrix(A.values.exp(), A.vectors)


@cost.register
def _(A: SpectralMatrix) -> Cost:
    params, macs, stored = cost(A.vectors)
    size = A.values.numel()
    return Cost(params + size, 2 * macs + size, stored + A.values.nbytes)


def _has_eigenpairs(A: LinearOperator, *_: Any) -> bool:
    """Whether a Hermitian value that is big knows its eigenpairs, and nobody differentiates them.

    A small one keeps the digits of the dense function, and its derivatives.
    """
    return is_big(A) and eigh.knows(A) and hermitian(A) and not differentiated(A)


@exp.register(where=_has_eigenpairs)
def _(A: LinearOperator) -> SpectralMatrix:
    return exp(SpectralMatrix(*eigh(A)))  # pyright: ignore[reportReturnType]


@pinv.register(where=_has_eigenpairs)
def _(A: LinearOperator) -> SpectralMatrix:
    return pinv(SpectralMatrix(*eigh(A)))  # pyright: ignore[reportReturnType]


@power.register(where=lambda A, p: not float(p).is_integer() and _has_eigenpairs(A))
def _(A: LinearOperator, p: float) -> SpectralMatrix:
    return power(SpectralMatrix(*eigh(A)), p)  # pyright: ignore[reportReturnType]


@svdvals.register(where=_has_eigenpairs)
def _(A: LinearOperator) -> Float[Tensor, "*batch n"]:
    return svdvals(SpectralMatrix(*eigh(A)))
