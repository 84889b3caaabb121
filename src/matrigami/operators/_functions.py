"""What can be asked of a matrix, beyond multiplication.

Each question is a `singledispatch` function. The default here makes the matrix dense; a structure
that knows better registers its rule in its own file, and `matrigami.krylov` registers rules for
values too large to be made dense. A `square` question checks its matrix first, so that no rule has
to.

Shapes: m = rows, n = columns, k = right-hand sides, batch = a stack of matrices.
"""

from collections.abc import Callable
from functools import singledispatch, update_wrapper
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, named_tensors
from matrigami.operators._dense import DenseMatrix

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


P = ParamSpec("P")
R = TypeVar("R")


class Cost(NamedTuple):
    """What a matrix costs: stored numbers, multiply-adds of one `A @ x`, stored bytes."""

    params: int
    macs: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add entry by entry."""
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)


class Eigh(NamedTuple):
    """`A = vectors @ diag(values) @ vectors.T`; the order of the values is the structure's own."""

    values: Float[Tensor, "*batch n"]
    vectors: LinearOperator


class Fan(NamedTuple):
    """How one stored tensor enters a product: as `outputs x inputs` matrices.

    `order` counts the tensors whose elementwise product makes that matrix (2 in a Hadamard
    product); `last` marks the tensor that is applied last, the one to set to zero for a layer that
    starts at zero.
    """

    inputs: int
    outputs: int
    order: int = 1
    last: bool = False

    @property
    def std(self) -> float:
        """Standard deviation for a spectral norm of order `sqrt(outputs / inputs)`.

        It is `sqrt(min(inputs, outputs)) / inputs`.

        Source: Yang, Simon and Bernstein (2023), arXiv:2310.17813; per factor, Qiu et al. (2024),
            arXiv:2406.06248.
        """
        return (min(self.inputs, self.outputs) ** 0.5 / self.inputs) ** (1 / self.order)


class Question(Generic[P, R]):
    """A `singledispatch` function that asks first whether its matrix is square."""

    def __init__(self, default: Callable[P, R]) -> None:
        self.__name__ = default.__name__
        self.rules = singledispatch(default)
        self.register = self.rules.register
        self.dispatch = self.rules.dispatch
        update_wrapper(self, default)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """Check, then answer by the rule of the first argument's type."""
        A: Any = args[0]
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"{self.__name__} was asked of a {type(A).__name__}.\n"
                "It takes a linear operator.\n"
                "Wrap a tensor: DenseMatrix(tensor)."
            )
        if A.shape[-2] != A.shape[-1]:
            raise ValueError(
                f"{self.__name__} was asked of a {A.shape[-2]}x{A.shape[-1]} {type(A).__name__}.\n"
                "It is defined for square matrices only.\n"
                "For a least-squares problem use torch.linalg.lstsq(A.dense(), B)."
            )
        return self.rules(*args, **options)


class Solve(Question[..., Any]):
    """`solve`, for a vector as well."""

    def __call__(self, A: LinearOperator, B: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """Check the right-hand side too, and add the damping."""
        vector = B.ndim == 1
        X = B[:, None] if vector else B
        rows = X.shape[-2] if X.ndim > 1 else None
        if isinstance(A, LinearOperator) and A.shape[-1] == A.shape[-2] != rows:
            raise ValueError(
                f"solve(A, B) was asked for a matrix of {A.shape[-2]}x{A.shape[-1]},\n"
                f"but B has shape {tuple(B.shape)}.\n"
                f"The {'first' if B.ndim < 2 else 'second last'} axis of B should be {A.shape[-2]}."
            )
        damped = isinstance(damping, Tensor) or damping != 0
        Y = super().__call__(shift(A, damping) if damped else A, X)
        return Y[..., 0] if vector else Y


@Solve
def solve(A: LinearOperator, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """Solve `A X = B` for a square, nonsingular `A`.

    Differentiable in `B` and in the tensors of `A`. A value without a rule of its own is made
    dense (LU); above `matrigami.krylov.DENSE_LIMIT` entries an iterative method is used.

    Args:
        A: The matrix, of shape `(*batch, n, n)`.
        B: Right-hand sides, `(n,)` or `(*batch, n, k)`.
        damping: Added to the diagonal first (Tikhonov), `solve(A, B, damping)`; none by default.

    Returns:
        The solution, of the shape of `B`.

    Raises:
        ValueError: If `A` is not square or the shapes do not match.

    Examples:
        >>> import torch
        >>> solve(DenseMatrix(torch.tensor([[2.0, 0.0], [0.0, 4.0]])), torch.tensor([2.0, 2.0]))
        tensor([1.0000, 0.5000])
    """
    return torch.linalg.solve(A.dense(), B)


@Question
def shift(A: LinearOperator, amount: float | Tensor) -> LinearOperator:
    """`A + amount I`, in the narrowest structure that is known to hold it.

    Args:
        A: A square matrix, or a stack of them.
        amount: A number, or one for each matrix of the stack.

    Examples:
        >>> import torch
        >>> shift(DenseMatrix(torch.ones(2, 2)), 1.0).dense()
        tensor([[2., 1.],
                [1., 2.]])
    """
    from matrigami.operators._contraction import identity  # noqa: PLC0415 - the algebra stands on these functions

    return A + identity(A, A.shape[-1]) * amount


@shift.register
def _(A: DenseMatrix, amount: float | Tensor) -> DenseMatrix:
    D = A.entries.clone()
    D.diagonal(dim1=-2, dim2=-1).add_(amount[..., None] if isinstance(amount, Tensor) else amount)
    return DenseMatrix(D)


@Question
def inverse(A: LinearOperator) -> LinearOperator:
    """The inverse, in the structure of `A` where that holds it, else applied by `solve`."""
    from matrigami.operators._algebra import InverseMatrix  # noqa: PLC0415 - the algebra stands on these functions

    return InverseMatrix(A)


@Question
def slogdet(A: LinearOperator) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Sign and logarithm of the absolute value of the determinant, as `torch.linalg.slogdet`."""
    sign, log = torch.linalg.slogdet(A.dense())
    return sign, log


def logdet(A: LinearOperator) -> Inexact[Tensor, "*batch"]:
    """Logarithm of the determinant; NaN where the determinant is negative, as `torch.logdet`.

    Raises:
        ValueError: If `A` is not square.

    Examples:
        >>> import torch
        >>> logdet(DenseMatrix(torch.eye(3)))
        tensor(0.)
    """
    sign, log = slogdet(A)
    return torch.where(sign.real > 0, log, torch.nan)


@singledispatch
def diagonal(A: LinearOperator) -> Inexact[Tensor, "*batch d"]:
    """The main diagonal, `d = min(m, n)` numbers."""
    return torch.diagonal(A.dense(), dim1=-2, dim2=-1)


@Question
def trace(A: LinearOperator) -> Inexact[Tensor, "*batch"]:
    """The sum of the diagonal of a square matrix."""
    return diagonal(A).sum(-1)


@Question
def eigh(A: LinearOperator, k: int | None = None) -> Eigh:
    """Eigenvalues and eigenvectors of a symmetric matrix, `A = V diag(values) V.T`.

    Args:
        A: A symmetric matrix of shape `(*batch, n, n)`; its symmetry is not checked.
        k: Only the `k` eigenvalues of largest magnitude, by Lanczos where the matrix is large.

    Returns:
        `Eigh(values, vectors)`; `vectors` is an operator with orthonormal columns. With `k` the
        values descend in magnitude; without, their order is the structure's own (a Kronecker
        product does not sort).
    """
    values, vectors = torch.linalg.eigh(A.dense())
    if k is None:
        return Eigh(values, DenseMatrix(vectors))
    return largest(Eigh(values, DenseMatrix(vectors)), k)


def largest(pairs: Eigh, k: int) -> Eigh:
    """The `k` eigenpairs of largest magnitude.

    Raises:
        ValueError: If there are fewer than `k`.
    """
    n = pairs.values.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(
            f"eigh(A, k={k}) was asked of a matrix with {n} eigenvalues.\n"
            f"k should be between 1 and {n}."
        )
    order = pairs.values.abs().argsort(dim=-1, descending=True)[..., :k]
    vectors = pairs.vectors.dense().take_along_dim(order[..., None, :], -1)
    return Eigh(pairs.values.take_along_dim(order, -1), DenseMatrix(vectors))


@singledispatch
def svdvals(A: LinearOperator) -> Float[Tensor, "*batch d"]:
    """Singular values in descending order, `d = min(m, n)` of them."""
    return torch.linalg.svdvals(A.dense())


@Question
def power(A: LinearOperator, p: float) -> LinearOperator:
    """`A^p`: any square `A` for an integer `p`, a positive definite one for a real `p`.

    Raises:
        ValueError: If `p` is not an integer and `A` is not symmetric positive (semi-)definite.

    Examples:
        >>> import torch
        >>> power(DenseMatrix(torch.diag(torch.tensor([4.0, 9.0]))), -0.5).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.3333]])
    """
    if float(p).is_integer():
        return DenseMatrix(torch.linalg.matrix_power(A.dense(), int(p)))
    D = A.dense()
    if not torch.allclose(D, D.mT, rtol=1e-3, atol=1e-5 * float(D.detach().abs().max())):
        raise ValueError(
            f"power(A, {p}) was asked of a matrix that is not symmetric.\n"
            "A real power needs a symmetric positive definite matrix."
        )
    values, Q = torch.linalg.eigh(D)
    return DenseMatrix(Q * positive(values, p)[..., None, :].pow(p) @ Q.mT)


def positive(values: Float[Tensor, "*batch n"], p: float) -> Float[Tensor, "*batch n"]:
    """Eigenvalues fit for a real power: round-off below zero is cut, anything else is an error."""
    largest_value = values.detach().abs().amax(-1, keepdim=True)
    floor = -largest_value * values.shape[-1] * torch.finfo(values.dtype).eps * 10
    if (values < floor).any() or (p < 0 and (values <= 0).any()):
        raise ValueError(
            f"power(A, {p}) was asked of a matrix with smallest eigenvalue "
            f"{float(values.detach().min()):.3g}.\n"
            f"A real power needs a positive {'definite' if p < 0 else 'semi-definite'} matrix.\n"
            "Add a multiple of the identity (damping) first."
        )
    return values.clamp_min(0)


def sqrt(A: LinearOperator) -> LinearOperator:
    """The symmetric square root of a positive semi-definite matrix, `power(A, 1/2)`."""
    return power(A, 0.5)


@singledispatch
def norm(A: LinearOperator, order: float | None = None) -> Float[Tensor, "*batch"]:
    """The Frobenius norm, or with `order` the Schatten norm (2 or `inf` is spectral).

    Args:
        A: The matrix.
        order: None for Frobenius; 1 nuclear; 2 or `inf` spectral, as
            `torch.linalg.matrix_norm(ord=2)`.
    """
    if order is None:
        return torch.linalg.matrix_norm(A.dense())
    return torch.linalg.vector_norm(svdvals(A), ord=torch.inf if order == 2 else order, dim=-1)


@singledispatch
def cost(A: LinearOperator) -> Cost:
    """Stored numbers, multiply-adds of one `A @ x`, bytes.

    The default counts one multiply-add for each stored number.

    Examples:
        >>> import torch
        >>> cost(DenseMatrix(torch.ones(3, 4)))
        Cost(params=12, macs=12, bytes=48)
    """
    parts = named_tensors(A).values()
    size = sum(t.numel() for t in parts)
    return Cost(size, size, sum(t.nbytes for t in parts))


@singledispatch
def fans(A: LinearOperator) -> tuple[Fan, ...]:
    """How each tensor of `named_tensors(A)` enters a product.

    Initialisation and learning rates follow from it.

    Raises:
        TypeError: If the value is not a layer's weight, such as a sum or an inverse.
    """
    raise TypeError(
        f"fans was asked of a {type(A).__name__}.\n"
        "No initialisation or learning-rate rule is known for it.\n"
        "Register one with @fans.register in the file that defines it."
    )


def to_scipy(A: LinearOperator) -> "ScipyOperator":
    """`A` as a `scipy.sparse.linalg.LinearOperator` on the CPU, for SciPy's solvers.

    Raises:
        ValueError: If `A` is a stack of matrices.
    """
    from scipy.sparse.linalg import aslinearoperator  # noqa: PLC0415 - heavy, and rarely needed

    if len(A.shape) > 2:
        raise ValueError(
            f"to_scipy was asked for a stack of shape {A.shape}.\n"
            "SciPy knows single matrices only.\n"
            "Convert them one at a time."
        )

    def product(operator: LinearOperator) -> Callable[[Any], Any]:
        """NumPy in, NumPy out."""
        return lambda X: (
            (operator @ torch.as_tensor(X, dtype=A.dtype, device=A.device)).detach().cpu().numpy()
        )

    forward, backward = product(A), product(A.T)
    protocol = SimpleNamespace(
        shape=A.shape,
        dtype=torch.empty(0, dtype=A.dtype).numpy().dtype,
        matvec=forward,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
    )
    return aslinearoperator(protocol)
