"""Sizes of matrices and of stacks of them, in words and checked."""

from typing import Any


def size_of(shape: tuple[int, ...]) -> str:
    """`(2, 3, 4)` as `2 of 3x4`."""
    stack = "x".join(map(str, shape[:-2]))
    return f"{stack + ' of ' if stack else ''}{shape[-2]}x{shape[-1]}"


def check_stacks(call: str, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    """Refuse leading axes that do not broadcast.

    Raises:
        ValueError: If they do not.
    """
    if any(a != b and 1 not in {a, b} for a, b in zip(reversed(A), reversed(B), strict=False)):
        raise ValueError(
            f"{call}: one is a stack of shape {tuple(A)}, the other of {tuple(B)}.\n"
            "Leading axes must broadcast, as those of tensors do."
        )


def check_product(A: Any, X: Any) -> None:
    """Refuse `A @ X` of sizes that do not fit.

    Raises:
        ValueError: If they do not.
    """
    rows = X.shape[-2:][0] if X.shape else None
    if rows != A.shape[-1]:
        raise ValueError(
            f"A @ X: A is {size_of(A.shape)}, but X has shape {tuple(X.shape)}.\n"
            f"The {'first' if len(X.shape) < 2 else 'second last'} axis of X must be "
            f"{A.shape[-1]}, the columns of this {type(A).__name__}."
        )
    check_stacks("A @ X", A.shape[:-2], X.shape[:-2])


def check_sum(A: Any, B: Any) -> None:
    """Refuse `A + B` of sizes that do not fit.

    Raises:
        ValueError: If they do not.
    """
    if A.shape[-2:] != B.shape[-2:]:
        raise ValueError(
            f"A + B: A is {size_of(A.shape)}, but B is {size_of(B.shape)}.\n"
            "Both matrices must have the same rows and columns."
        )
    check_stacks("A + B", A.shape[:-2], B.shape[:-2])
