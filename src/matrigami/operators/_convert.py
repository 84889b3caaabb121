"""Numbers from outside: NumPy arrays, lists and scalars as tensors, and answers in kind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def inexact(t: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, not indices."""
    return t.is_floating_point() or t.is_complex()


def as_tensor(X: Any, like: Any) -> Tensor:
    """Numbers as a tensor on the device of a value; whole ones take its type.

    Raises:
        TypeError: If `X` is not a tensor, an array, or nested lists of numbers.
    """
    try:
        t = X if isinstance(X, Tensor) else torch.as_tensor(_array(X), device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{type(X).__name__} is not a matrix of numbers.\n"
            "Give a tensor, a NumPy array, nested lists of numbers, or a linear operator;\n"
            "a SciPy operator or sparse matrix becomes one by from_scipy."
        ) from error
    return t if inexact(t) else t.to(like.dtype)


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


def as_scalars(numbers: Any, like: Any) -> Tensor:
    """Numbers, one for each matrix of a stack, as a tensor; complex ones stay complex."""
    if isinstance(numbers, Tensor):
        return numbers.to(like.device)
    if isinstance(numbers, int | float) and not like.dtype.is_complex:  # torch.compile traces this
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
    kind = like.dtype.to_complex() if np.iscomplexobj(numbers) else like.dtype.to_real()
    return torch.as_tensor(numbers, dtype=kind, device=like.device)


def _array(X: Any) -> Any:
    """An array without negative strides, or the nested lists themselves."""
    backwards = isinstance(X, np.ndarray) and any(step < 0 for step in X.strides)
    return X.copy() if backwards else X
