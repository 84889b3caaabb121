"""A value as a tree: its tensors by name, rebuilt from others, moved, and along its batch axes.

Shapes: batch = the leading axes of a stack of matrices.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import EllipsisType
from typing import Any, TypeVar, get_args

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from matrigami.operators._convert import inexact
from matrigami.operators._places import Places

Value = TypeVar("Value")
"""A frozen dataclass of tensors and others of its kind: a linear operator, which builds on this."""


def named_tensors(A: Any) -> dict[str, Tensor]:
    """The tensors of a value by readable name, e.g. `left`, `cores_0`, `padded_right`.

    Tensors of indices belong to the layout.
    """
    return {name: t for name, t, _ in _leaves(A)}


def with_tensors(A: Value, tensors: Iterator[Tensor]) -> Value:
    """A value like `A` whose tensors come, in the order of `named_tensors`, from an iterator."""
    return type(A)(*[_rebuilt(getattr(A, field.name), tensors) for field in fields(A)])  # pyright: ignore[reportArgumentType]


def mapped(A: Value, function: Callable[[Tensor], Tensor]) -> Value:
    """A value like `A` with a function applied to every tensor."""
    return with_tensors(A, iter([function(t) for t in named_tensors(A).values()]))


def expand(A: Value, batch: tuple[int, ...]) -> Value:
    """The same matrix as a stack with the given batch axes; nothing is copied."""
    return over_stack(A, lambda t: t, batch)


def over_stack(
    A: Value, function: Callable[[Tensor], Tensor], batch: tuple[int, ...] | None = None
) -> Value:
    """A value like `A` with a function applied to every tensor, which has all batch axes first."""
    old = A.shape[:-2]  # pyright: ignore[reportAttributeAccessIssue]
    wide = []
    for _, t, axes in _leaves(A):
        own = t.ndim - len(old) if axes is None else axes
        shape = (*(old if batch is None else batch), *t.shape[t.ndim - own :])
        wide.append(function(t.expand(shape)))
    return with_tensors(A, iter(wide))


def _leaves(A: Any) -> list[tuple[str, Tensor, int | None]]:
    """Name, tensor, and number of its own axes (None: all but those of the stack)."""
    return [leaf for f in fields(A) for leaf in _part(f.name, getattr(A, f.name), f.type)]


def _part(name: str, part: Any, annotation: Any) -> list[tuple[str, Tensor, int | None]]:
    """The tensors below one field."""
    if isinstance(part, Tensor):
        return [(name, part, _axes(annotation))] if inexact(part) else []
    if isinstance(part, tuple):
        inner = (*get_args(annotation), None)[0]
        return [leaf for i, p in enumerate(part) for leaf in _part(f"{name}_{i}", p, inner)]
    if _is_value(part):
        return [(f"{name}_{key}", t, axes) for key, t, axes in _leaves(part)]
    return []


def _is_value(part: Any) -> bool:
    """Whether a field holds a linear operator of ours: a dataclass that multiplies."""
    return is_dataclass(part) and hasattr(part, "matmat")


def _axes(annotation: Any) -> int | None:
    """The axes of a matrix that an annotation such as `Float[Tensor, "*batch m n"]` names."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, AbstractArray):
            words = kind.dim_str.split()
            return None if "..." in words else sum(not word.startswith("*") for word in words)
    return None


def _rebuilt(part: Any, tensors: Iterator[Tensor]) -> Any:
    """The field of a value with its tensors exchanged."""
    if isinstance(part, Tensor):
        return next(tensors) if inexact(part) else part
    if isinstance(part, tuple):
        return tuple(_rebuilt(p, tensors) for p in part)
    return with_tensors(part, tensors) if _is_value(part) else part


PLAIN = (bool, int, float, str, object, type(None), torch.dtype, Places, EllipsisType, ...)
"""Types of fields that describe a layout."""


def _is_layout(annotation: Any) -> bool:
    """Whether a field is layout, by its annotation: the leaves of a PyTree may be anything."""
    parts = get_args(annotation)
    return all(map(_is_layout, parts)) if parts else annotation in PLAIN


def flatten(A: Any) -> tuple[list[Any], Any]:
    """Children (tensors and operators) and context (the layout) of a PyTree node."""
    layout = {field.name: _is_layout(field.type) for field in fields(A)}
    children = [name for name, plain in layout.items() if not plain]
    rest = tuple((name, getattr(A, name)) for name, plain in layout.items() if plain)
    return [getattr(A, name) for name in children], (tuple(children), rest)


class Unflatten:
    """Rebuild a value without its checks: PyTree leaves may be anything."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __call__(self, children: Any, context: Any) -> Any:
        names, rest = context
        value = object.__new__(self.cls)
        for name, part in (*zip(names, children, strict=True), *rest):
            object.__setattr__(value, name, part)
        return value
