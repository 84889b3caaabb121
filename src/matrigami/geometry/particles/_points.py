"""Points as they are given, and what is refused before anything is built from them.

Shapes: n = points, d = dimension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import free_memory, is_concrete

Numbers = Tensor | np.ndarray | Sequence[Any]
"""What is read as real numbers."""

TREE_BYTES = 100
"""Bytes for each point while the tree is built: codes, orders and ranges."""


def checked_points(name: str, points: Any) -> Float[Tensor, "n d"]:
    """Points as a matrix of coordinates; a vector is points on a line.

    Args:
        name: What they are called.
        points: A tensor, an array of NumPy, or lists; whole numbers take torch's default type.

    Raises:
        TypeError: If they are not real numbers.
        ValueError: If there are more than three dimensions, or a coordinate is no usable number.
    """
    points = as_numbers(name, points)
    X = points[:, None] if points.ndim == 1 else points
    if X.ndim != 2 or not 1 <= X.shape[1] <= 3:
        raise ValueError(
            f"{name} has shape {tuple(points.shape)}.\n"
            "Points have 1, 2 or 3 coordinates: give (n, d), or (n,) for points on a line.\n"
            "In more dimensions distances compress no better than any low-rank matrix."
        )
    large = torch.finfo(X.dtype).max ** 0.5 / 10  # squares must not overflow
    bad = ~(X.detach().abs() < large).all(1)
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(X)} points are NaN, infinite or beyond {large:.0e}; "
            f"the first is point {first}, {X[first].tolist()}.\n"
            "Remove them, or rescale the coordinates (scale= divides distances)."
        )
    return X


def as_numbers(name: str, given: Any) -> Float[Tensor, "..."]:
    """Real numbers as a tensor.

    Raises:
        TypeError: If they are something else.
    """
    try:
        t = given if isinstance(given, Tensor) else torch.as_tensor(np.ascontiguousarray(given))
    except (TypeError, ValueError):
        t = torch.tensor(False)
    if t.dtype is torch.bool or t.is_complex():
        kind = getattr(given, "dtype", "what is no number")
        raise TypeError(
            f"{name} is {type(given).__name__} of {kind}; it must be real numbers.\n"
            "Give a tensor or an array: (n, d) coordinates of points, or (n,) numbers."
        )
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())


def check_tolerance(tol: float, dtype: torch.dtype) -> None:
    """Refuse what the type of the coordinates cannot reach.

    Raises:
        ValueError: If the tolerance is not between ten roundings and one.
    """
    least = 10 * torch.finfo(dtype).eps
    if not isinstance(tol, int | float) or not least <= tol < 1:
        raise ValueError(
            f"kernel_matrix(points, kernel, tol={tol!r}): the points are in {dtype}.\n"
            f"A relative error must be below 1 and at least {least:.0e}, ten roundings.\n"
            "Use double precision for smaller ones: points.double()."
        )


def check_scale(scale: Tensor | float) -> None:
    """Refuse to divide distances by nothing, by several numbers, or backwards.

    Raises:
        ValueError: If the scale is not one positive and finite number.
    """
    number = isinstance(scale, int | float | Tensor | np.number)
    t = torch.as_tensor(scale).detach() if number else torch.zeros(())
    if t.numel() != 1 or (is_concrete(t) and not bool(((t > 0) & t.isfinite()).all())):
        raise ValueError(
            f"kernel_matrix(points, kernel, scale={scale!r}): distances are divided by it.\n"
            "Give a positive number, about the distance at which the kernel has fallen."
        )


def check_values(values: Tensor) -> None:
    """Refuse a kernel that is not finite between points.

    Raises:
        ValueError: If it is not.
    """
    if is_concrete(values) and not bool(values.detach().isfinite().all()):
        raise ValueError(
            "kernel_matrix(points, kernel): the kernel is NaN or infinite between two points.\n"
            "It must be finite at every distance but zero.\n"
            "Try it on torch.linspace over the distances that occur, divided by scale."
        )


def check_coincidence(X: Float[Tensor, "n d"]) -> None:
    """Refuse two particles in one place, whose interaction would be infinite.

    Raises:
        ValueError: If there are any.
    """
    places, slot, counts = torch.unique(X.detach(), dim=0, return_inverse=True, return_counts=True)
    if len(places) < len(X):
        shared = (counts[slot] > 1).nonzero()[:, 0]
        mates = (slot == slot[shared[0]]).nonzero()[:, 0]
        raise ValueError(
            f"kernel_matrix: {len(shared)} points coincide, for instance {mates[:2].tolist()}, and "
            "this kernel is infinite there.\n"
            "Merge them (add their charges), move them apart, or take a softened kernel such as "
            "'multiquadric'."
        )


def check_tree_memory(X: Float[Tensor, "n d"], occupancy: int) -> None:
    """Refuse points whose tree, and the sparsest near field that it can have, do not fit.

    Args:
        X: The points.
        occupancy: Points of a leaf of a uniform cloud; each has two neighbours at least.

    Raises:
        ValueError: If there is not that much free memory.
    """
    check_memory(
        f"the tree and the near field of {len(X)} points",
        len(X) * (3 * occupancy + TREE_BYTES / X.dtype.itemsize),
        X,
    )


def check_memory(what: str, numbers: float, X: Tensor) -> None:
    """Refuse what cannot fit before it is built.

    Raises:
        ValueError: If there is not that much free memory.
    """
    wanted, free = numbers * X.dtype.itemsize, free_memory(X.device)
    if wanted > free:
        raise ValueError(
            f"{what} would take about {wanted / 2**30:.1f} GiB.\n"
            f"About {free / 2**30:.1f} GiB are free on {X.device}.\n"
            "Use fewer points, a larger tol, or single precision."
        )
