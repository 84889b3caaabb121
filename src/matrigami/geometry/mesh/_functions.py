"""Functions of the coordinates, and coefficients, at points of a mesh.

Shapes: n = points, d = dimension.
"""

import inspect
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.geometry._given import answer_of
from matrigami.operators import is_concrete


def given_at(what: str, given: Any, X: Float[Tensor, "n d"]) -> Inexact[Tensor, "..."]:
    """A number, numbers, or a function of the coordinates at points; complex ones stay complex.

    Args:
        what: What it is, for messages.
        given: The number, the numbers, or `f(x, y, ...)` of tensors.
        X: The points.

    Raises:
        TypeError: If it is none of these, or takes other arguments.
        ValueError: If a function fails, or has other than one value for each point, or they are not
            finite.
    """
    if not callable(given):
        if not isinstance(given, int | float | complex | Tensor | np.ndarray | list | tuple):
            raise TypeError(
                f"{what} is {given!r}.\nGive a number, a tensor, or a function of the coordinates."
            )
        return _as_values(given, X)
    _check_arguments(what, given, X.shape[1])
    found = _as_values(answer_of(what, given, *X.unbind(-1)), X)
    if found.shape not in {(), (1,), (len(X),)}:
        raise ValueError(
            f"{what}: the function has values of shape {tuple(found.shape)} at {len(X)} points.\n"
            "It takes a tensor for each coordinate; give a number for each point, or one for all."
        )
    bad = int((~found.detach().isfinite()).sum()) if is_concrete(found) else 0
    if bad:
        raise ValueError(
            f"{what}: the function is NaN or infinite at {bad} of {len(X)} points.\n"
            "It must be finite everywhere, at the boundary, too."
        )
    return found.expand(len(X))


def _as_values(found: Any, X: Float[Tensor, "n d"]) -> Inexact[Tensor, "..."]:
    """As a tensor of the type of the points, or complex."""
    t = torch.as_tensor(found, device=X.device)
    return t if t.is_complex() else t.to(X.dtype)


def _check_arguments(what: str, function: Any, d: int) -> None:
    """Refuse a function of other coordinates.

    Raises:
        TypeError: If it does not take as many arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some of those in C do not say
        return
    try:
        signature.bind(*range(d))
    except TypeError as error:
        raise TypeError(
            f"{what}: a function of {signature} in {d} dimensions: {error}.\n"
            "It takes a tensor for each coordinate: f(x), f(x, y) or f(x, y, z)."
        ) from error
