"""Functions that a user gives: kernels, coefficients, entries."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def answer_of(what: str, function: Callable[..., Any], *arguments: Tensor) -> Any:
    """What a function gives; where it fails its error is the cause of one that names the function.

    Args:
        what: What it is for, for the message.
        function: The function.
        arguments: Its arguments.

    Raises:
        ValueError: If it fails, memory aside.

    Examples:
        >>> answer_of("kernel", lambda r: r.eros(), torch.ones(2))
        Traceback (most recent call last):
        ...
        ValueError: kernel: the function <lambda> failed: AttributeError: 'Tensor' object has no...
        It was given (2,) torch.float32.
        Mend it: try it on tensors of that shape.
    """
    try:
        return function(*arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in arguments)
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(
            f"{what}: the function {name} failed{_line(function, error)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}.\n"
            f"It was given {given}.\nMend it: try it on tensors of that shape."
        ) from error


def _line(function: Callable[..., Any], error: Exception) -> str:
    """The last line of its own file that was reached, where it has one that can be looked up."""
    path = getattr(getattr(function, "__code__", None), "co_filename", "<")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == path and not path.startswith("<")]
    return f" in line {lines[-1]} of {path}" if lines else ""
