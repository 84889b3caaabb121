"""The two base classes: a matrix is a value, a structure is a recipe.

Shapes: m = rows, n = columns, k = right-hand sides, batch = leading axes of a stack of matrices.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce, singledispatch
from typing import Any, ClassVar, TypeVar, get_args, overload

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False, repr=False)
class LinearOperator(ABC):
    """A matrix `A` of shape `(*batch, m, n)`, known by `A @ X`.

    A subclass is a frozen dataclass. Its fields are tensors, other operators, tuples of these, or
    plain Python values that describe a layout. It is immutable, and a PyTree: its leaves are its
    tensors.
    """

    def __init_subclass__(cls) -> None:
        """Make every value a PyTree node."""
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            _flatten,
            _Unflatten(cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""

    @abstractmethod
    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply a block of vectors; batch axes broadcast."""

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
    def dtype(self) -> torch.dtype:
        """The type of the entries: that to which the types of the tensors promote."""
        return reduce(torch.promote_types, (t.dtype for t in _leaves(self)))

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(_leaves(self)).device

    @overload
    def __matmul__(self, X: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, X: "LinearOperator") -> "LinearOperator": ...
    def __matmul__(self, X: "Tensor | LinearOperator") -> "Tensor | LinearOperator":
        """`A @ X` as `torch.matmul`: a vector, a (batched) matrix, or another operator."""
        rows = X.shape[-2:][0] if X.shape else None
        if rows != self.shape[-1]:
            raise ValueError(
                f"{type(self).__name__} @ X was asked for a matrix of {_size(self.shape)},\n"
                f"but X has shape {tuple(X.shape)}.\n"
                f"The {'first' if len(X.shape) < 2 else 'second last'} axis of X should be "
                f"{self.shape[-1]}."
            )
        if isinstance(X, LinearOperator):
            return compose(self, X)
        if X.ndim == 1:
            return self.matmat(X[:, None])[..., 0]
        return self.matmat(X)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """Entrywise sum."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f"A + B was asked for {_size(self.shape)} and {_size(other.shape)}.\n"
                "Both matrices should have the same rows and columns."
            )
        return add(self, other)

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        """Entrywise difference."""
        return self + (-other)

    def __mul__(self, factor: "float | Tensor") -> "LinearOperator":
        """Multiply every entry by a scalar (one for each matrix of a stack)."""
        return scale(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> "LinearOperator":
        """Flip the sign of every entry."""
        return self * -1.0

    def __repr__(self) -> str:
        """Name, size and stored numbers."""
        size = sum(t.numel() for t in _leaves(self))
        return f"{type(self).__name__}({_size(self.shape)}, {size} parameters)"


class Structure(ABC):
    """A recipe: a family of matrices with one parameterisation, e.g. `LowRank(rank=8)`.

    A subclass is a frozen dataclass of hyper-parameters. `project(recipe, W)` is its other half.
    """

    exact_projection: ClassVar[bool] = True
    """Whether `project` surely finds a member again; False where it may stop at a local minimum."""

    @abstractmethod
    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LinearOperator:
        """Draw a random `m x n` member, scaled by the structure-aware rule (see `matrigami.nn`)."""


Value = TypeVar("Value", bound=LinearOperator)


@singledispatch
def add(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """`A + B`, in the narrowest structure that is known to hold it."""
    raise TypeError(
        f"add was asked for a {type(A).__name__}.\n"
        "It takes linear operators.\n"
        "Wrap a tensor in DenseMatrix."
    )


@singledispatch
def compose(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """`A @ B`, in the narrowest structure that is known to hold it."""
    raise TypeError(
        f"compose was asked for a {type(A).__name__}.\n"
        "It takes linear operators.\n"
        "Wrap a tensor in DenseMatrix."
    )


@singledispatch
def scale(A: LinearOperator, factor: float | Tensor) -> LinearOperator:
    """`factor * A`, in the structure of `A` where that holds it."""
    raise TypeError(
        f"scale was asked for a {type(A).__name__}.\n"
        "It takes linear operators.\n"
        "Wrap a tensor in DenseMatrix."
    )


@singledispatch
def conj(A: Value) -> Value:
    """The complex conjugate: by default that of every tensor, right where entries are real polynomials in them."""
    if not A.dtype.is_complex:
        return A
    return with_tensors(A, iter([t.conj() for t in named_tensors(A).values()]))


def named_tensors(A: LinearOperator) -> dict[str, Tensor]:
    """The tensors of a value by readable name, e.g. `left`, `cores_0`, `padded_right`."""
    named: dict[str, Tensor] = {}
    for field in fields(A):
        named |= _named(field.name, getattr(A, field.name))
    return named


def with_tensors(A: Value, tensors: Iterator[Tensor]) -> Value:
    """A value like `A` whose tensors come, in the order of `named_tensors`, from an iterator."""
    return type(A)(*[_rebuilt(getattr(A, field.name), tensors) for field in fields(A)])


def _rebuilt(part: Any, tensors: Iterator[Tensor]) -> Any:
    """The field of a value with its tensors exchanged."""
    if isinstance(part, Tensor):
        return next(tensors)
    if isinstance(part, LinearOperator):
        return with_tensors(part, tensors)
    if isinstance(part, tuple):
        return tuple(_rebuilt(p, tensors) for p in part)
    return part


def _named(name: str, part: Any) -> dict[str, Tensor]:
    """The tensors below one field."""
    if isinstance(part, Tensor):
        return {name: part}
    if isinstance(part, LinearOperator):
        return {f"{name}_{key}": t for key, t in named_tensors(part).items()}
    if isinstance(part, tuple):
        return {key: t for i, p in enumerate(part) for key, t in _named(f"{name}_{i}", p).items()}
    return {}


def _leaves(A: LinearOperator) -> Iterator[Tensor]:
    """The tensors of a value."""
    return iter(named_tensors(A).values())


def _size(shape: tuple[int, ...]) -> str:
    """`(2, 3, 4)` as `2 of 3x4`."""
    stack = "x".join(map(str, shape[:-2]))
    return f"{stack + ' of ' if stack else ''}{shape[-2]}x{shape[-1]}"


PLAIN = (bool, int, float, str, type(None), torch.dtype, ...)
"""Types of fields that describe a layout."""


def _is_layout(annotation: Any) -> bool:
    """Whether a field is layout, by its annotation: the leaves of a PyTree may be anything."""
    parts = get_args(annotation)
    return all(map(_is_layout, parts)) if parts else annotation in PLAIN


def _flatten(A: LinearOperator) -> tuple[list[Any], Any]:
    """Children (tensors and operators) and context (the layout) of a PyTree node."""
    layout = {field.name: _is_layout(field.type) for field in fields(A)}
    children = [name for name, plain in layout.items() if not plain]
    rest = tuple((name, getattr(A, name)) for name, plain in layout.items() if plain)
    return [getattr(A, name) for name in children], (tuple(children), rest)


class _Unflatten:
    """Rebuild a value without its checks: PyTree leaves may be anything."""

    def __init__(self, cls: type[LinearOperator]) -> None:
        self.cls = cls

    def __call__(self, children: Any, context: Any) -> LinearOperator:
        names, rest = context
        value = object.__new__(self.cls)
        for name, part in (*zip(names, children, strict=True), *rest):
            object.__setattr__(value, name, part)
        return value
