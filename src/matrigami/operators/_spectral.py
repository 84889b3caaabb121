"""A symmetric matrix by its eigenpairs: `A = Q diag(values) Q.T`, with `Q` any orthogonal value.

With a Kronecker product as `Q` it is the eigenvalue-corrected curvature of a layer (George et al.
2018, arXiv:1806.03884), or a Kronecker product plus a multiple of the identity.

Shapes: n = rows = columns, k = right-hand sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, add, scale
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._functions import (
    Cost,
    Eigh,
    cost,
    diagonal,
    eigh,
    inverse,
    largest,
    norm,
    positive,
    power,
    shift,
    slogdet,
    solve,
    svdvals,
    trace,
)


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMatrix(LinearOperator):
    """The matrix `vectors @ diag(values) @ vectors.T`; the columns of `vectors` are orthonormal.

    Examples:
        >>> A = SpectralMatrix(torch.tensor([1.0, 3.0]), DenseMatrix(torch.eye(2)))
        >>> A @ torch.ones(2, dtype=torch.float32), float(trace(A))
        (tensor([1., 3.]), 4.0)
    """

    values: Float[Tensor, "*batch n"]
    vectors: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        n = self.vectors.shape[-2]
        batch = torch.broadcast_shapes(self.values.shape[:-1], self.vectors.shape[:-2])
        return (*batch, n, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Into the eigenbasis, scale, and back."""
        return self.vectors.matmat(self.values[..., None] * self.vectors.T.matmat(X))

    @property
    def T(self) -> "SpectralMatrix":
        """Itself."""
        return self

    def dense(self) -> Float[Tensor, "*batch n n"]:
        """The matrix itself."""
        Q = self.vectors.dense()
        return (Q * self.values[..., None, :]) @ Q.mT


def symmetric(A: LinearOperator) -> bool:
    """Whether a value surely equals its transpose, up to the rounding of a product that made it."""
    if not isinstance(A, DenseMatrix):
        return A.T is A
    D = A.entries.detach()
    rounding = D.shape[-1] * torch.finfo(D.dtype).eps
    return bool((D - D.mT).abs().max() <= rounding * D.abs().max())


@add.register
def _(A: SpectralMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, SpectralMatrix) and A.vectors is B.vectors:
        return SpectralMatrix(A.values + B.values, A.vectors)
    return add.dispatch(LinearOperator)(A, B)


@scale.register
def _(A: SpectralMatrix, factor: float | Tensor) -> SpectralMatrix:
    factor = factor[..., None] if isinstance(factor, Tensor) else factor
    return SpectralMatrix(A.values * factor, A.vectors)


@shift.register
def _(A: SpectralMatrix, amount: float | Tensor) -> SpectralMatrix:
    amount = amount[..., None] if isinstance(amount, Tensor) else amount
    return SpectralMatrix(A.values + amount, A.vectors)


@solve.register
def _(A: SpectralMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return SpectralMatrix(1 / A.values, A.vectors).matmat(B)


@inverse.register
def _(A: SpectralMatrix) -> SpectralMatrix:
    return SpectralMatrix(1 / A.values, A.vectors)


@slogdet.register
def _(A: SpectralMatrix) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    return A.values.sgn().prod(-1), A.values.abs().log().sum(-1)


@trace.register
def _(A: SpectralMatrix) -> Float[Tensor, "*batch"]:
    return A.values.sum(-1)


@diagonal.register
def _(A: SpectralMatrix) -> Float[Tensor, "*batch n"]:
    """`diag(Q D Q.T) = (Q o Q) d`, and for a Kronecker product `Q o Q` is one too."""
    from matrigami.operators._products import hadamard  # noqa: PLC0415 - products build on this

    return hadamard(A.vectors, A.vectors).matmat(A.values[..., None])[..., 0]


@eigh.register
def _(A: SpectralMatrix, k: int | None = None) -> Eigh:
    pairs = Eigh(A.values, A.vectors)
    return pairs if k is None else largest(pairs, k)


@svdvals.register
def _(A: SpectralMatrix) -> Float[Tensor, "*batch n"]:
    return A.values.abs().sort(-1, descending=True).values


@norm.register
def _(A: SpectralMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    if order is not None:
        return norm.dispatch(LinearOperator)(A, order)
    return torch.linalg.vector_norm(A.values, dim=-1)


@power.register
def _(A: SpectralMatrix, p: float) -> SpectralMatrix:
    values = A.values if float(p).is_integer() else positive(A.values, p)
    return SpectralMatrix(values.pow(p), A.vectors)


@cost.register
def _(A: SpectralMatrix) -> Cost:
    params, macs, stored = cost(A.vectors)
    size = A.values.numel()
    return Cost(params + size, 2 * macs + size, stored + A.values.nbytes)
