"""Kernels: functions of the distance, by name, or any of your own.

A kernel is one function of a tensor of distances. What is infinite at distance zero has a zero self
term, as is usual for potentials. A new kernel is one function; named in `KERNELS` it is known
everywhere.

Shapes: t = targets, s = sources, d = dimension.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami._words import nearest
from matrigami.geometry._given import answer_of

Kernel = Callable[[Tensor], Tensor]
"""A function of distances, entry by entry."""

WHAT = "kernel_matrix(points, kernel)"
"""The call that messages name."""


def laplace(r: Tensor) -> Tensor:
    """`1 / r`: gravitation, electrostatics in three dimensions."""
    return 1 / r


def coulomb2d(r: Tensor) -> Tensor:
    """`-log r`: electrostatics in two dimensions; conditionally positive definite."""
    return -r.log()


def yukawa(r: Tensor) -> Tensor:
    """`exp(-r) / r`: screened electrostatics."""
    return torch.exp(-r) / r


def helmholtz(r: Tensor) -> Tensor:
    """`cos(r) / r`: the real part of the field of an oscillating source."""
    return torch.cos(r) / r


def gaussian(r: Tensor) -> Tensor:
    """`exp(-r^2 / 2)`: the squared-exponential covariance, a radial basis function."""
    return torch.exp(-0.5 * r * r)


def matern12(r: Tensor) -> Tensor:
    """`exp(-r)`: the Ornstein-Uhlenbeck covariance."""
    return torch.exp(-r)


def matern32(r: Tensor) -> Tensor:
    """`(1 + u) exp(-u)` with `u = sqrt(3) r`: a covariance of once differentiable functions."""
    u = math.sqrt(3) * r
    return (1 + u) * torch.exp(-u)


def matern52(r: Tensor) -> Tensor:
    """`(1 + u + u^2 / 3) exp(-u)` with `u = sqrt(5) r`: of twice differentiable functions."""
    u = math.sqrt(5) * r
    return (1 + u + u * u / 3) * torch.exp(-u)


def multiquadric(r: Tensor) -> Tensor:
    """`1 / sqrt(1 + r^2)`: the inverse multiquadric, softened gravitation (Plummer)."""
    return 1 / torch.sqrt(1 + r * r)


KERNELS: dict[str, Kernel] = {
    "laplace": laplace,
    "coulomb2d": coulomb2d,
    "yukawa": yukawa,
    "helmholtz": helmholtz,
    "gaussian": gaussian,
    "rbf": gaussian,
    "matern12": matern12,
    "matern32": matern32,
    "matern52": matern52,
    "multiquadric": multiquadric,
}
"""Kernels by name."""

HOMOGENEOUS: dict[Kernel, int] = {laplace: -1}
"""The degree of kernels with `K(a r) = a^degree K(r)`: one set of operators serves all sizes."""

SEMISEPARABLE: dict[Kernel, tuple[float, tuple[float, ...]]] = {
    matern12: (1.0, (1.0,)),
    matern32: (math.sqrt(3), (1.0, 1.0)),
    matern52: (math.sqrt(5), (1.0, 1.0, 1 / 3)),
}
"""Kernels `exp(-a r) P(a r)` by `a` and the polynomial: of exact rank `deg P + 1` on a line."""


def kernel_of(kernel: str | Kernel) -> Kernel:
    """The function of a name, or the function itself.

    Raises:
        ValueError: If the name is unknown, or the function fails.
        TypeError: If it is no function of distances.
    """
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            near = nearest(kernel, KERNELS)
            raise ValueError(
                f"kernel {kernel!r}: there is no such kernel.\n"
                f"Known kernels: {', '.join(KERNELS)}.\n"
                f"Did you mean {near!r}? Any function of the distance will do, too."
            )
        return KERNELS[kernel]
    probe = answer_of(WHAT, kernel, torch.ones(2)) if callable(kernel) else None
    if not isinstance(probe, Tensor) or probe.shape != (2,) or probe.is_complex():
        raise TypeError(
            f"{WHAT}: kernel is {kernel!r}.\n"
            "Give a name, or a real function of a tensor of distances, entry by entry.\n"
            "A complex one is two matrices, of its real and imaginary part."
        )
    return kernel


def is_singular(kernel: Kernel) -> bool:
    """Whether the kernel is not finite at distance zero."""
    return not bool(answer_of(WHAT, kernel, torch.zeros(1, dtype=torch.float64)).isfinite().all())


def distances(
    X: Float[Tensor, "*#batch t d"], Y: Float[Tensor, "*#batch s d"]
) -> Float[Tensor, "... t s"]:
    """Of all pairs, by differences of coordinates, which lose no digits; derivative 0 at zero."""
    squares = (X[..., :, None, 0] - Y[..., None, :, 0]).square()
    for axis in range(1, X.shape[-1]):
        squares = squares + (X[..., :, None, axis] - Y[..., None, :, axis]).square()
    if not squares.requires_grad:
        return squares.sqrt_()
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)


def interactions(
    kernel: Kernel,
    X: Float[Tensor, "*#batch t d"],
    Y: Float[Tensor, "*#batch s d"],
    scale: Tensor | float = 1.0,
    *,
    singular: bool | None = None,
) -> Float[Tensor, "... t s"]:
    """The kernel of all pairs, with a zero self term where it is singular."""
    r = distances(X, Y)
    scaled = r if isinstance(scale, float) and scale == 1.0 else r / scale
    if not (is_singular(kernel) if singular is None else singular):
        return answer_of(WHAT, kernel, scaled)
    apart = r > 0
    return torch.where(apart, answer_of(WHAT, kernel, torch.where(apart, scaled, 1)), 0)
