"""What can be asked of a matrix, beyond multiplication.

Each question is an open function. The default here makes the matrix dense; a structure that knows
better registers its rule in its own file, and `matrigami.krylov` registers rules for values too
large to be made dense.

Shapes: m = rows, n = columns, k = right-hand sides, batch = a stack of matrices.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import (
    LinearOperator,
    question,
    regular,
    require,
    square_question,
    square_scalar_question,
)
from matrigami.operators._convert import as_given, as_tensor, in_parts
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._kernels import is_concrete, lu_slogdet, lu_solve
from matrigami.operators._memory import dense
from matrigami.operators._sizes import check_stacks
from matrigami.operators._tree import named_tensors


class Cost(NamedTuple):
    """What a matrix costs: stored numbers, multiply-adds of one `A @ x`, stored bytes."""

    params: int
    macs: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add entry by entry."""
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)


class Fan(NamedTuple):
    """The fan-in and fan-out of one stored tensor, as a stack of `outputs x inputs` matrices.

    Initial scales and learning rates follow from it. It says how signals grow through the tensor;
    how the tensor enters the product is another question, answered by `contractions`: for tensor
    trains the two describe different matrices.

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


def _system(
    function: OpenFunction, A: Any, B: Any, damping: Any = 0.0, *, square: bool = False, **how: Any
) -> Any:
    """Check a system, add the damping, and take a vector as one column."""
    require(function.name, A, square=square)
    X = as_tensor(B, A)
    vector = X.ndim == 1
    rows = X.shape[-2:][0] if X.ndim else None
    if A.shape[-2] != rows:
        raise ValueError(
            f"{function.name}(A, B): A is {A.shape[-2]}x{A.shape[-1]}, but B has shape "
            f"{tuple(X.shape)}.\n"
            f"The {'first' if X.ndim < 2 else 'second last'} axis of B must be {A.shape[-2]}."
        )
    check_stacks(f"{function.name}(A, B)", A.shape[:-2], tuple(X.shape[:-2]))
    if isinstance(damping, Tensor) or damping != 0:
        A = shift(A, damping)
    columns = X[:, None] if vector else X
    Y = _aimed(function, A, columns, **how) if how else _answered(function, A, columns)
    return as_given(Y[..., 0] if vector else Y, B)


def _aimed(
    function: OpenFunction,
    A: LinearOperator,
    B: Tensor,
    *,
    x0: Any = None,
    tol: float | None = None,
    preconditioner: Any = None,
) -> Tensor:
    """Solve for the difference from a first guess, to a residual."""
    if tol is not None and not (isinstance(tol, int | float) and tol > 0):
        raise ValueError(
            f"solve(A, B, tol={tol!r}): no residual is that small.\nGive a positive number."
        )
    if not (
        preconditioner is None or callable(preconditioner) or hasattr(preconditioner, "matmat")
    ):
        raise TypeError(
            f"solve(A, B, preconditioner=): it is a {type(preconditioner).__name__}.\n"
            "Give an operator, or a function of a block of vectors."
        )
    kind = torch.promote_types(A.dtype, B.dtype)
    A, B = A.to(kind), B.to(kind)
    is_own = preconditioner is None and function.knows(A, B)
    answer = (
        partial(_refined, function) if is_own else partial(iterate, preconditioner=preconditioner)
    )
    if x0 is None:
        return answer(A, B, tol=tol)
    guess = as_tensor(x0, A).to(kind)
    guess = guess[:, None] if guess.ndim == 1 else guess
    if guess.shape != B.shape:
        raise ValueError(
            f"solve(A, B, x0=): x0 has shape {tuple(guess.shape)}, but B {tuple(B.shape)}.\n"
            "Both must have the same."
        )
    return guess + answer(A, B - A.matmat(guess), tol=tol)


def _refined(
    function: OpenFunction, A: LinearOperator, B: Tensor, *, tol: float | None = None
) -> Tensor:
    """By the value's own method, and once more for what it leaves, if that is too much."""
    X = _answered(function, A, B)
    if tol is None or not is_concrete(X):
        return X
    if _residual(A, X, B) > tol:
        X = X + _answered(function, A, B - A.matmat(X))
    if (left := _residual(A, X, B)) > tol:
        raise RuntimeError(
            f"solve(A, B, tol={tol!r}): of {A!r} the solution leaves a relative residual of "
            f"{left:.1e}, no less.\nThe precision of {X.dtype} ends there.\n"
            "Give a larger tol, or the matrix in a higher precision."
        )
    return X


def _residual(A: LinearOperator, X: Tensor, B: Tensor) -> float:
    """The largest norm of a column of `B - A X`, relative to that of `B`."""
    left, whole = (torch.linalg.vector_norm(T.detach(), dim=-2) for T in (B - A.matmat(X), B))
    return float((left / torch.where(whole > 0, whole, 1)).max()) if left.numel() else 0.0


@OpenFunction
def iterate(
    A: LinearOperator,
    B: Tensor,
    tol: float | None = None,
    preconditioner: Any = None,
    method: Any = None,
) -> Tensor:
    """Solve `A X = B` by products alone: the rules are in `matrigami.krylov`.

    Args:
        A: A square matrix.
        B: Right-hand sides, `(..., n, k)`, of its type.
        tol: Relative residual; `eps^(2/3)` by default.
        preconditioner: An approximate inverse, an operator or a function of a block of vectors.
        method: `cg`, `minres` or `gmres`; by default MINRES for Hermitian matrices
            (with a preconditioner `cg`), else GMRES.
    """
    raise NotImplementedError(f"iterate(A, B): nothing is known for a {type(A).__name__}.")


def _answered(function: OpenFunction, A: LinearOperator, B: Tensor) -> Tensor:
    """Solve in the common type; say so where the matrix is singular or not finite."""
    kind = torch.promote_types(A.dtype, B.dtype)
    if B.is_complex() and not A.dtype.is_complex:
        return in_parts(lambda X: _answered(function, A, X), B)
    A = A if A.dtype == kind else A.to(kind)
    try:
        X = function.answer(A, B.to(kind))
    except torch.linalg.LinAlgError as error:
        _refuse_infinite(function.name, A, B)
        raise torch.linalg.LinAlgError(
            f"{function.name}(A, B): A, a {A!r}, is singular.\n"
            "It has no unique solution.\n"
            "Use lstsq(A, B), or solve(A, B, damping)."
        ) from error
    except ValueError:
        _refuse_infinite(function.name, A, B)
        raise
    if is_concrete(X) and not X.isfinite().all():
        _refuse_infinite(function.name, A, B)
    return X


def _refuse_infinite(name: str, A: LinearOperator, B: Tensor) -> None:
    """Name the right-hand side, or the tensors of the matrix, that explain an answer with NaN."""
    if is_concrete(B) and not B.isfinite().all():
        raise ValueError(
            f"{name}(A, B): B has NaN or infinite entries; no solution exists.\n"
            "Check where it comes from."
        )
    bad = [
        tensor
        for tensor, t in named_tensors(A).items()
        if is_concrete(t) and not t.isfinite().all()
    ]
    if bad:
        raise ValueError(
            f"{name}(A, B): {', '.join(bad)} of the {A!r} is not finite.\n"
            "A matrix with NaN or infinite entries has no solution."
        )


@lambda default: OpenFunction(default, around=partial(_system, square=True))
def solve(
    A: LinearOperator,
    B: Any,
    damping: Any = 0.0,
    *,
    x0: Any = None,
    tol: float | None = None,
    preconditioner: Any = None,
) -> Any:
    """Solve `A X = B` for a square, nonsingular `A`.

    Differentiable in `B` and in the tensors of `A`, in every order. A value without a rule of its
    own is made dense (LU); above `matrigami.krylov.DENSE_LIMIT` entries, or given one of the last
    three arguments, it is solved by iteration. A preconditioner asks any value for that.

    Args:
        A: The matrix, of shape `(*batch, n, n)`.
        B: Right-hand sides, `(n,)` or `(*batch, n, k)`; an array is answered by an array.
        damping: Added to the diagonal first (Tikhonov); none by default.
        x0: A first guess, such as the solution of the last step in time.
        tol: Largest relative residual (with `x0` of what the guess leaves); it is computed.
        preconditioner: An approximate inverse, kept and reused by the caller: an operator such as
            `matrigami.geometry.mesh.multigrid(A)`, or a function of a block of vectors.

    Returns:
        The solution, of the shape of `B`.

    Raises:
        ValueError: If `A` is not square, `A` or `B` is not finite, or the shapes do not match.
        torch.linalg.LinAlgError: If `A` is singular.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> solve(DenseMatrix(torch.tensor([[2.0, 0.0], [0.0, 4.0]])), torch.tensor([2.0, 2.0]))
        tensor([1.0000, 0.5000])
    """
    return lu_solve(dense(A, "solve"), B)


@lambda default: OpenFunction(default, around=_system)
def lstsq(A: LinearOperator, B: Any, damping: Any = 0.0) -> Any:
    """The `X` of least norm among those that minimise `||A X - B||_F`; any shape, any rank.

    Args:
        A: The matrix, of shape `(*batch, m, n)`.
        B: Right-hand sides, `(m,)` or `(*batch, m, k)`; an array is answered by an array.
        damping: Added to the diagonal of a square `A` first; none by default.

    Returns:
        The solution, `(n,)` or `(*batch, n, k)`.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> lstsq(DenseMatrix(torch.tensor([[1.0], [1.0]])), torch.tensor([1.0, 3.0]))
        tensor([2.0000])
    """
    return pinv(A) @ B


@question
def pinv(A: LinearOperator) -> LinearOperator:
    """The pseudoinverse (Moore 1920, Penrose 1955), in the structure of `A` where that holds it.

    Singular values below `max(m, n) eps` of the largest count as zero.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> pinv(DenseMatrix(torch.tensor([[2.0, 0.0]]))).dense()
        tensor([[0.5000],
                [0.0000]])
    """
    raise NotImplementedError  # in _dense.py


@square_scalar_question
def shift(A: LinearOperator, amount: Any) -> LinearOperator:
    """`A + amount I`, in the narrowest structure that is known to hold it.

    Args:
        A: A square matrix, or a stack of them.
        amount: A real or complex number, or a tensor with one for each matrix of the stack.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> shift(DenseMatrix(torch.ones(2, 2)), 1.0).dense()
        tensor([[2., 1.],
                [1., 2.]])
    """
    raise NotImplementedError  # in _algebra.py


@lambda default: OpenFunction(default, around=regular)
def inverse(A: LinearOperator) -> LinearOperator:
    """The inverse, in the structure of `A` where that holds it, else applied by `solve`.

    Raises:
        torch.linalg.LinAlgError: If `A` is singular; where it is applied by `solve`, by that.
    """
    raise NotImplementedError  # in _algebra.py


@square_question
def slogdet(A: LinearOperator) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Sign and logarithm of the size of the determinant, as `torch.linalg.slogdet`.

    The sign is a phase if `A` is complex, and zero if `A` is singular; the logarithm is then
    minus infinity. It is exact, or refused: `matrigami.krylov.stochastic_logdet` estimates.
    """
    return lu_slogdet(dense(A, "slogdet"))


def logdet(A: LinearOperator) -> Inexact[Tensor, "*batch"]:
    """Logarithm of the determinant, as `torch.logdet`.

    NaN where the determinant of a real matrix is negative, minus infinity where it is zero, complex
    if `A` is complex. It is exact, or refused: `matrigami.krylov.stochastic_logdet` estimates.

    Raises:
        ValueError: If `A` is not square, or too large without a closed form.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> logdet(DenseMatrix(torch.eye(3)))
        tensor(0.)
    """
    sign, log = slogdet(A)
    if sign.is_complex():
        return sign.log() + log
    return torch.where(sign < 0, torch.nan, log)


@question
def diagonal(A: LinearOperator) -> Inexact[Tensor, "*batch d"]:
    """The main diagonal, `d = min(m, n)` numbers."""
    return torch.diagonal(dense(A, "diagonal"), dim1=-2, dim2=-1)


@square_question
def trace(A: LinearOperator) -> Inexact[Tensor, "*batch"]:
    """The sum of the diagonal of a square matrix."""
    return diagonal(A).sum(-1)


@question
def cost(A: LinearOperator) -> Cost:
    """Stored numbers, multiply-adds of one `A @ x`, bytes.

    The default counts one multiply-add for each stored number.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> cost(DenseMatrix(torch.ones(3, 4)))
        Cost(params=12, macs=12, bytes=48)
    """
    parts = named_tensors(A).values()
    size = sum(t.numel() for t in parts)
    return Cost(size, size, sum(t.nbytes for t in parts))


@question
def fans(A: LinearOperator) -> tuple[Fan, ...]:
    """The fan-in and fan-out of each tensor of `named_tensors(A)`.

    Initialisation and learning rates follow from it.

    Raises:
        TypeError: If the value is not a layer's weight, such as a sum or an inverse.
    """
    raise TypeError(
        f"fans(A): A is a {type(A).__name__}, of which no initialisation or learning-rate rule is "
        "known.\nRegister one with @fans.register in the file that defines it."
    )
