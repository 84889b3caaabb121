"""The base class of every matrix, and the operators of Python on it.

Shapes: m = rows, n = columns, k = right-hand sides, batch = leading axes of a stack of matrices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.utils import _pytree as pytree

from matrigami.operators._convert import (
    as_array,
    as_given,
    as_scalars,
    as_tensor,
    inexact,
    product,
)
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._sizes import check_product, check_stacks, check_sum, size_of
from matrigami.operators._tree import Unflatten, expand, flatten, mapped, named_tensors

P = ParamSpec("P")
R = TypeVar("R")
Value = TypeVar("Value", bound="LinearOperator")


@dataclass(frozen=True, eq=False, repr=False)
class LinearOperator(ABC):
    """A matrix `A` of shape `(*batch, m, n)`, known by `A @ X`.

    A subclass is a frozen dataclass. Its fields are tensors, other operators, tuples of these, or
    plain Python values that describe a layout. It is immutable, and a PyTree: its leaves are its
    tensors. NumPy arrays are taken wherever tensors are, and answered by arrays.
    """

    __array_ufunc__ = None  # so that NumPy leaves `x @ A` to `A`

    def __init_subclass__(cls) -> None:
        """Make every value a PyTree node."""
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            flatten,
            Unflatten(cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        """Take arrays for tensors."""
        for field in fields(self):
            part = getattr(self, field.name)
            if isinstance(part, np.ndarray):
                object.__setattr__(self, field.name, torch.as_tensor(part))

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""

    @abstractmethod
    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply a block of vectors of the type of the entries; batch axes broadcast."""

    @property
    @abstractmethod
    def T(self) -> "LinearOperator":
        """The transpose."""

    @abstractmethod
    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself, in `m * n` numbers."""

    @property
    def H(self) -> "LinearOperator":
        """The adjoint, `conj(A).T`; of a real matrix the transpose."""
        return conj(self).T if self.dtype.is_complex else self.T

    @property
    def mT(self) -> "LinearOperator":
        """The transpose, by the name that tensors have for it."""
        return self.T

    @property
    def mH(self) -> "LinearOperator":
        """The adjoint, by the name that tensors have for it."""
        return self.H

    @property
    def ndim(self) -> int:
        """The number of axes, those of the stack included."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the entries: the one to which the types of the tensors promote."""
        return reduce(torch.promote_types, [t.dtype for t in named_tensors(self).values()])

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(iter(named_tensors(self).values())).device

    def to(self: Value, *args: Any, **options: Any) -> Value:
        """Another dtype or device, as `Tensor.to`; a real part of a complex value stays real."""
        complex_value = self.dtype.is_complex

        def moved(t: Tensor) -> Tensor:
            """A tensor of indices changes its device only."""
            target = t.new_empty(0, dtype=self.dtype).to(*args, **options)
            if not inexact(t):
                return t.to(target.device)
            real = complex_value and not t.is_complex()
            return t.to(target.device, target.dtype.to_real() if real else target.dtype)

        return pytree.tree_map_only(Tensor, moved, self)

    def detach(self: Value) -> Value:
        """The value without its history of derivatives; it shares storage."""
        return mapped(self, Tensor.detach)

    def __matmul__(self, X: Any) -> Any:
        """`A @ X` as `torch.matmul`: a vector, a (batched) matrix, an array, another operator."""
        if not isinstance(X, Tensor | LinearOperator):
            return as_given(self @ as_tensor(X, self), X)
        check_product(self, X)
        if isinstance(X, LinearOperator):
            return compose(self, X)
        return product(self, X[:, None])[..., 0] if X.ndim == 1 else product(self, X)

    def __rmatmul__(self, X: Any) -> Any:
        """`X @ A` for a vector, a matrix or an array: `(A.T @ X.T).T`."""
        Y = as_tensor(X, self)
        if not Y.shape or Y.shape[-1] != self.shape[-2]:
            raise ValueError(
                f"X @ A: A is {size_of(self.shape)}, but X has shape {tuple(Y.shape)}.\n"
                f"The last axis of X must be {self.shape[-2]}, the rows of this "
                f"{type(self).__name__}."
            )
        return as_given(self.T @ Y if Y.ndim == 1 else (self.T @ Y.mT).mT, X)

    def __add__(self, other: Any) -> "LinearOperator":
        """Entrywise sum with a value, a matrix of numbers, or the 0 at which `sum` starts."""
        if isinstance(other, int | float) and other == 0:
            return self
        other = other if isinstance(other, LinearOperator) else as_tensor(other, self)
        if other.ndim < 2:
            raise TypeError(
                f"A + B: A is a matrix, but B has shape {tuple(other.shape)}.\n"
                "Write shift(A, c) for A + c I."
            )
        check_sum(self, other)
        return add(self, other)

    def __radd__(self, other: Any) -> "LinearOperator":
        """Entrywise sum: it commutes."""
        return self + other

    def __sub__(self, other: Any) -> "LinearOperator":
        """Entrywise difference."""
        return self + (-(other if isinstance(other, LinearOperator) else as_tensor(other, self)))

    def __rsub__(self, other: Any) -> "LinearOperator":
        """Entrywise difference."""
        return -self + other

    def __mul__(self, factor: Any) -> "LinearOperator":
        """Multiply every entry by a scalar (one for each matrix of a stack)."""
        return scale(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "LinearOperator":
        """Divide every entry by a scalar (one for each matrix of a stack)."""
        if isinstance(divisor, LinearOperator):
            raise TypeError(
                f"A / B: B is a {type(divisor).__name__}; only scalars divide.\n"
                "For a product with the inverse write A @ inverse(B)."
            )
        d = as_scalars(divisor, self)
        return scale(self, 1 / d.to(torch.promote_types(d.dtype, self.dtype)))

    def __rtruediv__(self, other: Any) -> "LinearOperator":
        """Refuse: a matrix has an inverse, and no reciprocal."""
        raise TypeError("c / A: A is a matrix; only scalars divide.\nWrite c * inverse(A).")

    def __neg__(self: Value) -> Value:
        """Flip the sign of every entry."""
        return scale(self, -1.0)

    def __pow__(self, p: float) -> "LinearOperator":
        """`power(A, p)`."""
        return power(self, p)

    def sum(self, dim: int | None = None) -> Tensor:
        """The sum of all entries, or along the rows (`dim=-2`) or columns (`dim=-1`), by products.

        Raises:
            ValueError: If the axis is one of the stack, or there is none such.
        """
        if dim is None:
            return self.sum(-1).sum()
        if dim not in range(-2, 0) and dim - self.ndim not in range(-2, 0):
            raise ValueError(
                f"A.sum({dim}): A has {self.ndim} axes, of which rows and columns can be summed.\n"
                "Write A.sum(-2) or A.sum(-1); for the others A.dense().sum(dim)."
            )
        A = self if dim in (-1, self.ndim - 1) else self.T
        return A @ torch.ones(A.shape[-1], dtype=self.dtype, device=self.device)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The dense matrix, for `numpy.asarray(A)`."""
        return np.asarray(as_array(self.dense()), dtype)

    def __getitem__(self, index: Any) -> Any:
        """As `A.dense()[index]`: members of a stack are values, rows and entries are tensors."""
        return indexed(self, index)

    def __iter__(self) -> Any:
        """A matrix is no sequence: `A[0]` of a stack is its first member."""
        raise TypeError(
            f"a {type(self).__name__} cannot be iterated over.\nUse A[i], or A.dense() for numbers."
        )

    def __repr__(self) -> str:
        """Name, size and stored numbers."""
        numbers = sum(t.numel() for t in named_tensors(self).values())
        return f"{type(self).__name__}({size_of(self.shape)}, {numbers} parameters)"


def require(name: str, A: Any, *, square: bool = False) -> None:
    """Refuse what is no linear operator, or not square though it has to be.

    Raises:
        TypeError: If `A` is no linear operator.
        ValueError: If it is not square.
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{name}(A): A is a {type(A).__name__}; it must be a linear operator.\n"
            "Wrap a matrix of numbers: DenseMatrix(A)."
        )
    if square and A.shape[-2] != A.shape[-1]:
        raise ValueError(
            f"{name}(A): A is a {size_of(A.shape[-2:])} {type(A).__name__}; it must be square.\n"
            "For a least-squares problem use lstsq(A, B)."
        )


def _asked(function: OpenFunction, A: Any, *args: Any, **options: Any) -> Any:
    """Answer for a value."""
    require(function.name, A)
    return function.answer(A, *args, **options)


def _asked_of_square(function: OpenFunction, A: Any, *args: Any, **options: Any) -> Any:
    """Answer for a square value."""
    require(function.name, A, square=True)
    return function.answer(A, *args, **options)


def question(default: Callable[P, R]) -> OpenFunction[P, R]:
    """An open function of a value."""
    return OpenFunction(default, around=_asked)


def square_question(default: Callable[P, R]) -> OpenFunction[P, R]:
    """An open function of a square value, so that no rule has to check."""
    return OpenFunction(default, around=_asked_of_square)


def _scalars(function: OpenFunction, A: Any, numbers: Any, *, square: bool) -> Any:
    """Hand the rules a tensor, with no more axes than the stack has."""
    require(function.name, A, square=square)
    if isinstance(numbers, LinearOperator):
        raise TypeError(
            f"A * B: both are matrices, {size_of(A.shape)} and {size_of(numbers.shape)}.\n"
            "Write A @ B for their product, hadamard(A, B) for the product of their entries."
        )
    numbers = as_scalars(numbers, A)
    check_stacks(f"{function.name}(A, c)", A.shape[:-2], tuple(numbers.shape))
    if numbers.ndim > len(A.shape) - 2:
        A = expand(A, torch.broadcast_shapes(A.shape[:-2], numbers.shape))
    return function.answer(A, numbers)


def _factors(function: OpenFunction, A: Any, factor: Any) -> Any:
    """Where one tensor of a value takes a complex factor, make the others fit it."""
    if isinstance(A, LinearOperator) and not isinstance(factor, LinearOperator):
        factor = as_scalars(factor, A)
        if factor.is_complex() and type(A) in function.rules:
            A = A.to(A.dtype.to_complex())
    return _scalars(function, A, factor, square=False)


def square_scalar_question(default: Callable[P, R]) -> OpenFunction[P, R]:
    """An open function of a square value and of numbers, one for each matrix of a stack."""
    return OpenFunction(default, around=partial(_scalars, square=True))


@question
def add(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """`A + B`, in the narrowest structure that is known to hold it."""
    raise NotImplementedError  # the rule for any two values is in _algebra.py


@question
def compose(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """`A @ B`, in the narrowest structure that is known to hold it."""
    raise NotImplementedError


@lambda default: OpenFunction(default, around=_factors)
def scale(A: LinearOperator, factor: Any) -> LinearOperator:
    """`factor * A`, in the structure of `A` where that holds it.

    Args:
        A: A matrix, or a stack of them.
        factor: A number, or a tensor with one for each matrix of the stack.
    """
    raise NotImplementedError


@question
def conj(A: Any) -> Any:
    """The complex conjugate: that of every tensor, if entries are real polynomials in them."""
    if not A.dtype.is_complex:
        return A
    return type(A)(*[_conjugate(getattr(A, field.name)) for field in fields(A)])


def _conjugate(part: Any) -> Any:
    """The conjugate of a field; the operators in it know their own."""
    if isinstance(part, tuple):
        return tuple(map(_conjugate, part))
    if isinstance(part, LinearOperator):
        return conj(part)
    return part.conj() if isinstance(part, Tensor) else part


@question
def indexed(A: LinearOperator, index: Any) -> Any:
    """`A[index]`, as `A.dense()[index]`: members of a stack are values, all else are tensors."""
    raise NotImplementedError


def regular(function: OpenFunction, A: Any, *args: Any) -> Any:
    """Answer for a square value; say so where it is singular.

    Raises:
        torch.linalg.LinAlgError: If it is.
    """
    require(function.name, A, square=True)
    try:
        return function.answer(A, *args)
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"{function.name}(A): A, a {A!r}, is singular.\n"
            "It has no inverse.\nUse pinv(A), or shift(A, damping) first."
        ) from error


def _raised(function: OpenFunction, A: Any, p: Any) -> Any:
    """Answer for a square value and a real exponent."""
    exponent = p.item() if isinstance(p, Tensor | np.ndarray) and p.ndim == 0 else p
    if not isinstance(exponent, int | float | np.integer | np.floating):
        raise TypeError(
            f"power(A, p): p is a {type(p).__name__}; it must be a real number.\n"
            "For the exponential of a matrix use exp(A)."
        )
    return regular(function, A, exponent)


@lambda default: OpenFunction(default, around=_raised)
def power(A: LinearOperator, p: float) -> LinearOperator:
    """`A^p`: any square `A` for an integer `p`, a positive definite one for a real `p`.

    Raises:
        ValueError: If `p` is not an integer and `A` is not Hermitian positive (semi-)definite.
        torch.linalg.LinAlgError: If `p` is negative and `A` singular.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> power(DenseMatrix(torch.diag(torch.tensor([4.0, 9.0]))), -0.5).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.3333]])
    """
    raise NotImplementedError
