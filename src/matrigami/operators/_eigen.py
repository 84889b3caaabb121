"""Eigenvalues, singular values, norms, and functions of a matrix.

Shapes: m = rows, n = columns, d = min(m, n), batch = a stack of matrices.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, power, question, require, square_question
from matrigami.operators._convert import is_count
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._functions import trace
from matrigami.operators._kernels import (
    SKEW,
    is_concrete,
    is_differentiated,
    is_hermitian,
    truncated_svd,
    vector_norm,
)
from matrigami.operators._matrix_functions import (
    hermitian_function,
    power_function,
    schatten_sum,
)
from matrigami.operators._memory import dense, finite, is_big
from matrigami.operators._tree import named_tensors


class Eigh(NamedTuple):
    """`A = vectors @ diag(values) @ vectors.H`; the order of the values is the structure's own."""

    values: Float[Tensor, "*batch n"]
    vectors: LinearOperator


class Svd(NamedTuple):
    """`A = U @ diag(values) @ V.H`; zeros that a structure rules out may be missing."""

    U: LinearOperator
    values: Float[Tensor, "*batch d"]
    V: LinearOperator


@square_question
def eigh(A: LinearOperator, k: int | None = None) -> Eigh:
    """Eigenvalues and eigenvectors of a Hermitian matrix, `A = V diag(values) V.H`.

    Args:
        A: A symmetric or Hermitian matrix of shape `(*batch, n, n)`.
        k: Only the `k` eigenvalues of largest magnitude, by Lanczos where the matrix is large.

    Returns:
        `Eigh(values, vectors)`; `vectors` is an operator with orthonormal columns. With `k` the
        values descend in magnitude; without, their order is the structure's own (a Kronecker
        product does not sort).

    Raises:
        ValueError: If `A` does not equal its adjoint, or has fewer than `k` eigenvalues.
    """
    if k is not None:
        _check_count(k, A.shape[-1])
    values, vectors = torch.linalg.eigh(adjoint_to_itself(A, "eigh"))
    pairs = Eigh(values, DenseMatrix(vectors))
    return pairs if k is None else largest(pairs, k)


def adjoint_to_itself(A: LinearOperator, name: str) -> Inexact[Tensor, "*batch n n"]:
    """The entries of a matrix that has to be Hermitian: a factorisation reads one triangle.

    Raises:
        ValueError: If it is not, by more than rounding errors.
    """
    D = finite(A, name)
    if is_concrete(D) and not is_hermitian(D, SKEW):
        refuse_skew(A, name)
    return D


def refuse_skew(A: LinearOperator, name: str) -> Any:
    """Say that a matrix is not Hermitian.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{name}(A): A, a {A!r}, does not equal its adjoint.\n"
        f"Only a Hermitian matrix has an answer.\nGive {name}((A + A.H) / 2), or ask svd(A)."
    )


def largest(pairs: Eigh, k: int) -> Eigh:
    """The `k` eigenpairs of largest magnitude.

    Raises:
        ValueError: If there are fewer than `k`.
    """
    _check_count(k, pairs.values.shape[-1])
    order = pairs.values.abs().argsort(dim=-1, descending=True)[..., :k]
    vectors = columns(pairs.vectors, order)
    return Eigh(pairs.values.take_along_dim(order, -1), DenseMatrix(vectors))


def _check_count(k: int, n: int) -> None:
    """Refuse a number of eigenvalues that there are not.

    Raises:
        ValueError: If there are fewer than `k`.
    """
    if not is_count(k) or k > n:
        raise ValueError(
            f"eigh(A, k={k!r}): A has {n} eigenvalues.\nk must be a whole number from 1 to {n}."
        )


def columns(Q: LinearOperator, order: Tensor) -> Tensor:
    """Some columns of a matrix, by products with unit vectors: `Q` itself is never formed."""
    n, k = Q.shape[-1], order.shape[-1]
    unit = torch.zeros(*order.shape[:-1], n, k, dtype=Q.dtype, device=Q.device)
    unit = unit.scatter(-2, order[..., None, :], 1)
    return Q @ unit


@question
def svd(A: LinearOperator) -> Svd:
    """Singular values and vectors, `A = U diag(values) V.H`.

    Args:
        A: A matrix of shape `(*batch, m, n)`.

    Returns:
        `Svd(U, values, V)` with operators of orthonormal columns; the order of the values is the
        structure's own, and a low rank has as many as its rank.

    Examples:
        >>> U, values, V = svd(DenseMatrix(torch.tensor([[0.0, 2.0], [0.0, 0.0]])))
        >>> values, V.shape
        (tensor([2., 0.]), (2, 2))
    """
    U, values, Vh = torch.linalg.svd(finite(A, "svd"), full_matrices=False)
    return Svd(DenseMatrix(U), values, DenseMatrix(Vh.mH))


@question
def svdvals(A: LinearOperator) -> Float[Tensor, "*batch d"]:
    """Singular values in descending order, `d = min(m, n)` of them."""
    return torch.linalg.svdvals(finite(A, "svdvals"))


def descending(values: Float[Tensor, "*batch e"], A: LinearOperator) -> Float[Tensor, "*batch d"]:
    """Singular values in order, with the zeros that a structure leaves out."""
    values = values.sort(-1, descending=True).values
    return torch.nn.functional.pad(values, (0, min(A.shape[-2:]) - values.shape[-1]))


def _in_range(function: OpenFunction, A: Any, *args: Any, **options: Any) -> Any:
    """Answer for a value; in double precision where squares of single ones leave its range."""
    require(function.name, A)
    found = function.answer(A, *args, **options)
    if found.dtype == torch.float64 or not is_concrete(found):
        return found
    if bool(((found > 0) & found.isfinite()).all()):
        return found
    double = torch.complex128 if A.dtype.is_complex else torch.float64
    return function.answer(A.to(double), *args, **options).to(found.dtype)


@lambda default: OpenFunction(default, around=_in_range)
def norm(A: LinearOperator, order: float | None = None) -> Float[Tensor, "*batch"]:
    """The Frobenius norm, or with `order` the Schatten norm (2 or `inf` is spectral).

    Args:
        A: The matrix.
        order: None for Frobenius; 1 nuclear; 2 or `inf` spectral, as
            `torch.linalg.matrix_norm(ord=2)`.

    No norm is smooth at zero: all derivatives are zero there. `trace(A.H @ A)`, the square of the
    Frobenius norm, has its own.
    """
    return vector_norm(dense(A, "norm"), (-2, -1))


def is_frobenius(A: LinearOperator, order: float | None = None) -> bool:
    """Whether the plain norm is asked for: the condition of a rule."""
    return order is None


@norm.register(where=lambda A, order=None: order is not None)
def _(A: LinearOperator, order: float | None = None) -> Float[Tensor, "*batch"]:
    values = svdvals(A.detach() if _smooth(A) else A)
    size = schatten(values, order)
    if not _smooth(A) or not size.numel():
        return size
    if order in {2, torch.inf}:
        L, R = truncated_svd(A.dense(), 1)  # its derivative depends on the gap behind the first
        return vector_norm(L, (-2, -1)) * vector_norm(R, (-2, -1))
    p = float(order)  # pyright: ignore[reportArgumentType]
    total = schatten_sum(A.dense(), p)
    fixed = total.detach()
    ratio = torch.where(fixed > 0, total / torch.where(fixed > 0, fixed, 1), 1)
    return size * ratio.pow(1 / p)


def _smooth(A: LinearOperator) -> bool:
    """Whether a derivative may be wanted of singular values that are those of the dense matrix."""
    return is_differentiated(*named_tensors(A).values()) and not svdvals.knows(A)


def squared_norm(A: LinearOperator) -> Float[Tensor, "*batch"]:
    """The square of the Frobenius norm, as a part of a sum of squares: it is smooth at zero."""
    size = norm(A)
    if not is_differentiated(*named_tensors(A).values()):
        return size.square()
    if is_concrete(size) and bool((size > 0).all()):
        return size.square()
    squares = trace(A.H @ A).real if is_big(A) else _squares(A.dense())
    return torch.where(size > 0, size.square(), squares)


def _squares(D: Inexact[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
    """Of all entries."""
    return (D * D.conj()).real.sum((-2, -1))


def schatten(values: Float[Tensor, "*batch d"], order: float | None) -> Float[Tensor, "*batch"]:
    """The norm of singular values.

    Raises:
        ValueError: If that is none.
    """
    if order is not None and not (isinstance(order, int | float) and order >= 1):
        raise ValueError(
            f"norm(A, {order!r}): a Schatten norm has an order of 1 or more.\n"
            "Give 1 (nuclear), 2 or inf (spectral), or none for the Frobenius norm."
        )
    p = 2 if order is None else torch.inf if order == 2 else order
    return vector_norm(values, -1, p)


@power.register(where=lambda A, p: not float(p).is_integer())
def _(A: LinearOperator, p: float) -> LinearOperator:
    D = finite(A, "power")
    if is_concrete(D) and not is_hermitian(D, SKEW):
        refuse_real_power(A, p)
    if is_concrete(D):
        positive(torch.linalg.eigvalsh(D.detach()), p)
    return DenseMatrix(hermitian_function(power_function(p), (D + D.mH) / 2))


def refuse_real_power(A: LinearOperator, p: float) -> Any:
    """Say that a matrix is not Hermitian.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"power(A, {p}): A, a {A!r}, does not equal its adjoint.\n"
        "A real power needs a Hermitian positive definite matrix."
    )


def positive(values: Float[Tensor, "*batch n"], p: float) -> Float[Tensor, "*batch n"]:
    """Eigenvalues fit for a real power: round-off below zero is cut, anything else is an error."""
    if not is_concrete(values):
        return values.clamp_min(0)
    if not values.numel():
        return values
    largest_value = values.detach().abs().amax(-1, keepdim=True)
    floor = -largest_value * values.shape[-1] * torch.finfo(values.dtype).eps * 10
    if (values < floor).any() or (p < 0 and (values <= 0).any()):
        raise ValueError(
            f"power(A, {p}): the smallest eigenvalue of A is {float(values.detach().min()):.3g}.\n"
            f"A real power needs a positive {'definite' if p < 0 else 'semi-definite'} matrix.\n"
            "Add a multiple of the identity first: shift(A, damping)."
        )
    return values.clamp_min(0)


def raised(values: Float[Tensor, "*batch n"], p: float) -> Float[Tensor, "*batch n"]:
    """Eigenvalues to a power; a real power asks for positive ones."""
    return (values if float(p).is_integer() else positive(values, p)).pow(p)


def sqrt(A: LinearOperator) -> LinearOperator:
    """The Hermitian square root of a positive semi-definite matrix, `power(A, 1/2)`."""
    return power(A, 0.5)


@square_question
def exp(A: LinearOperator) -> LinearOperator:
    """The matrix exponential; for its product with vectors alone see `krylov.exp_multiply`.

    Examples:
        >>> exp(DenseMatrix(torch.zeros(2, 2))).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return DenseMatrix(torch.linalg.matrix_exp(dense(A, "exp")))


@square_question
def cholesky(A: LinearOperator) -> LinearOperator:
    """`L` with `A = L @ L.H`, lower triangular, for a Hermitian positive definite matrix.

    Of hierarchical matrices it is the symmetric factor, a product of sparse triangular matrices
    that is not triangular itself, but is found and applied in almost linear time.

    Raises:
        ValueError: If `A` is not positive definite, or does not equal its adjoint.

    Examples:
        >>> cholesky(DenseMatrix(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))).dense()
        tensor([[2., 0.],
                [1., 2.]])
    """
    raise NotImplementedError  # in _triangular.py


def refuse_indefinite(A: LinearOperator, error: Exception | None = None) -> Any:
    """Say that there is no Cholesky factor.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"cholesky(A): A, a {A!r}, is not positive definite.\n"
        "Add a multiple of the identity first: shift(A, damping)."
    ) from error
