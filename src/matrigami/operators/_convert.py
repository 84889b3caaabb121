"""Numbers from outside: NumPy arrays, lists and scalars as tensors, and answers in kind."""

from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matrigami.operators._kernels import is_concrete

REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the parts: as `dtype.to_real()`, which `torch.compile` cannot trace."""
    return REAL.get(dtype, dtype)


def inexact(t: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, not indices."""
    return t.is_floating_point() or t.is_complex()


def as_tensor(X: Any, like: Any) -> Tensor:
    """Numbers as a tensor on the device of a value; whole ones take its type.

    Raises:
        TypeError: If `X` is not a tensor, an array, or nested lists of numbers.
    """
    t = _shared(X, like)
    return t if inexact(t) else t.to(like.dtype)


def _shared(X: Any, like: Any) -> Tensor:
    """Numbers as a tensor of their own type."""
    try:
        return X if isinstance(X, Tensor) else torch.as_tensor(_array(X), device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{type(X).__name__} is not a matrix of numbers.\n"
            "Give a tensor, a NumPy array, nested lists of numbers, or a linear operator;\n"
            "a SciPy operator or sparse matrix becomes one by from_scipy."
        ) from error


def as_given(Y: Tensor, X: Any) -> Any:
    """An answer in the kind of the question: an array for an array, else the tensor."""
    return as_array(Y) if isinstance(X, np.ndarray) else Y


def as_array(t: Tensor) -> Any:
    """The numbers of a tensor, without its derivative."""
    return t.detach().resolve_conj().resolve_neg().cpu().numpy()


def in_parts(function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """A real linear map of complex columns: the real and the imaginary ones at once."""
    k = X.shape[-1]
    Y = function(torch.cat([X.real, X.imag], -1))
    return torch.complex(Y[..., :k], Y[..., k:])


def product(A: Any, X: Tensor) -> Tensor:
    """`A @ X` of two types: both are promoted, and a real matrix takes complex vectors in parts."""
    kind = A.dtype
    if X.dtype == kind:
        return A.matmat(X)
    if X.is_complex() and not kind.is_complex:
        return in_parts(lambda Y: product(A, Y), X)
    common = torch.promote_types(kind, X.dtype)
    return (A if kind == common else A.to(common)).matmat(X.to(common))


def as_scalars(numbers: Any, like: Any) -> Tensor:
    """Numbers, one for each matrix of a stack, as a tensor; complex ones stay complex.

    Raises:
        TypeError: If these are no numbers.
    """
    if isinstance(numbers, Tensor):
        return numbers.to(like.device)
    if isinstance(numbers, int | float) and not like.dtype.is_complex:  # torch.compile traces this
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
    kind = like.dtype.to_complex() if np.iscomplexobj(numbers) else like.dtype.to_real()
    try:
        return torch.as_tensor(numbers, dtype=kind, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{type(numbers).__name__} is no number.\n"
            "Give a real or complex one, or a tensor with one for each matrix of a stack."
        ) from error


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of any library, and at least so large."""
    try:
        return not isinstance(value, bool) and index(value) >= least
    except TypeError:
        return False


def as_positions(index: Any, size: int, like: Any) -> Tensor:
    """Whole numbers as positions on an axis; negative ones count from its end.

    Raises:
        TypeError: If these are no whole numbers.
        IndexError: If one is beyond the axis.
    """
    t = _shared(index, like)
    t = t if t.numel() else t.long()
    if inexact(t) or t.dtype == torch.bool:
        raise TypeError(
            f"an index holds numbers of type {t.dtype}.\nGive whole ones: a tensor, array or list."
        )
    if is_concrete(t) and t.numel() and not (-size <= int(t.min()) and int(t.max()) < size):
        raise IndexError(
            f"an index goes from {int(t.min())} to {int(t.max())}, but the axis has {size}.\n"
            f"Give numbers from 0 to {size - 1}, or negative ones from the end."
        )
    return torch.where(t < 0, t + size, t)


def _array(X: Any) -> Any:
    """An array that torch can share, a copy of any other, or the nested lists themselves."""
    if hasattr(X, "matmat"):
        raise TypeError("an operator")
    if not isinstance(X, np.ndarray):
        return X
    shared = X.flags.writeable and X.dtype.isnative and all(step >= 0 for step in X.strides)
    return X if shared else X.astype(X.dtype.newbyteorder("="))
