"""The kernel matrix of points, in the structure that is quickest for it.

Shapes: m = targets, n = sources, d = dimension.
"""

import math

import torch
from torch import Tensor

from matrigami.geometry.particles._fast_multipole import OCCUPANCY, fast_multipole_matrix
from matrigami.geometry.particles._kernels import Kernel, interactions, is_singular, kernel_of
from matrigami.geometry.particles._line import line_matrix
from matrigami.geometry.particles._points import (
    Numbers,
    check_coincidence,
    check_memory,
    check_scale,
    check_tolerance,
    check_tree_memory,
    check_values,
    checked_points,
)
from matrigami.operators import DenseMatrix, LinearOperator

CROSSOVER = {1: 512, 2: 2048, 3: 4096}
"""Points up to which a dense matrix is quicker to build and to multiply, by dimension.

Measured at a tolerance of 1e-6; in space, where more digits cost most, at 1e-3.
"""

SAMPLED = 16
"""Points between which a kernel is tried before it is used for all."""


def kernel_matrix(
    points: Numbers,
    kernel: str | Kernel,
    *,
    targets: Numbers | None = None,
    scale: Tensor | float = 1.0,
    tol: float | None = None,
) -> LinearOperator:
    """`A[i, j] = kernel(|targets_i - points_j| / scale)`, without its `m n` entries.

    Differentiable in the points, the targets and the scale; where the scale is differentiated, the
    bases of an H2 matrix hold the derivative as well as the kernel. Parameters of a function of
    your own are differentiable, too, in bases of the kernel alone: to three digits in space.
    Singular kernels have a zero self term.

    Args:
        points: The sources, `(n, d)` with `d` from 1 to 3, or `(n,)` on a line; arrays and lists
            will do.
        kernel: A name (see `KERNELS`), or any function of a tensor of distances.
        targets: Where the sums are evaluated, `(m, d)`; the sources by default.
        scale: What distances are divided by, a number or a tensor.
        tol: Relative error of a product, roughly (`error_estimate` measures it); by default 1e-6,
            or a hundred roundings if that is more.

    Returns:
        Few points: a `DenseMatrix`. On a line: HODLR, with direct `solve` and `logdet`. Else a
        matrix with nested bases.

    Raises:
        ValueError: For points that are not finite, in too many dimensions or in one place where
            the kernel is singular; for a tolerance below the precision, or one that interpolation
            does not reach for this kernel; where memory is too small.

    Examples:
        >>> x = torch.tensor([0.0, 1.0, 3.0])
        >>> kernel_matrix(x, "laplace").dense()
        tensor([[0.0000, 1.0000, 0.3333],
                [1.0000, 0.0000, 0.5000],
                [0.3333, 0.5000, 0.0000]])
    """
    Y, X, function, tol = checked(points, kernel, targets, scale, tol)
    check_tree_memory(X, OCCUPANCY[X.shape[1]])
    if is_small(Y, X, tol):
        check_memory("a dense kernel matrix", 4 * len(X) * len(Y), X)
        return DenseMatrix(interactions(function, Y, X, scale))
    if X.shape[1] == 1 and targets is None:
        return line_matrix(X[:, 0], function, scale, tol)
    return fast_multipole_matrix(Y, X, function, scale, tol)


def is_small(Y: Tensor, X: Tensor, tol: float) -> bool:
    """Whether a dense matrix is quicker; in space more digits ask for more points.

    At 1e-6 nested bases of 4096 points store four times what a dense matrix does, of 8192 as much.
    """
    digits = max(1.0, -math.log10(tol) / 3) if X.shape[1] == 3 else 1.0
    return max(len(X), len(Y)) <= CROSSOVER[X.shape[1]] * digits or min(len(X), len(Y)) == 0


def checked(
    points: Numbers,
    kernel: str | Kernel,
    targets: Numbers | None,
    scale: Tensor | float,
    tol: float | None,
) -> tuple[Tensor, Tensor, Kernel, float]:
    """Targets, sources, the kernel and the tolerance; `targets is sources` for one cloud.

    Raises:
        ValueError: If one of them will not do.
    """
    X, function = checked_points("points", points), kernel_of(kernel)
    Y = X if targets is None else checked_points("targets", targets)
    tol = max(1e-6, 100 * torch.finfo(X.dtype).eps) if tol is None else tol
    check_tolerance(tol, X.dtype)
    check_scale(scale)
    if X.shape[1] != Y.shape[1]:
        raise ValueError(
            f"kernel_matrix: points have {X.shape[1]} coordinates, targets {Y.shape[1]}.\n"
            "Both must be in one space."
        )
    _try(function, X.detach(), Y.detach(), scale)
    return Y, X, function, tol


def _try(kernel: Kernel, X: Tensor, Y: Tensor, scale: Tensor | float) -> None:
    """Refuse a kernel that is not finite between these points."""
    if is_singular(kernel):
        check_coincidence(X)
    check_values(interactions(kernel, Y[:SAMPLED], X[:SAMPLED], scale))


def error_estimate(
    A: LinearOperator,
    points: Numbers,
    kernel: str | Kernel,
    *,
    targets: Numbers | None = None,
    scale: Tensor | float = 1.0,
    rows: int = 100,
    seed: int = 0,
) -> float:
    """The relative error of `A @ x` for Gaussian `x`, measured on sampled rows.

    Args:
        A: The kernel matrix of these arguments, approximated.
        points: As for `kernel_matrix`, and so `kernel`, `targets`, `scale`.
        kernel: The kernel.
        targets: The targets.
        scale: What distances are divided by.
        rows: How many rows are computed exactly.
        seed: Of the rows and of `x`.

    Returns:
        `||A x - K x|| / ||K x||` over the rows; rounding included.

    Raises:
        ValueError: If there are no rows, or `A` is another matrix.

    Examples:
        >>> x = torch.linspace(0, 1, 600)
        >>> error_estimate(kernel_matrix(x, "matern32"), x, "matern32") < 1e-5
        True
    """
    X, function = checked_points("points", points).detach(), kernel_of(kernel)
    Y = X if targets is None else checked_points("targets", targets).detach()
    if not isinstance(rows, int) or rows < 1 or not len(Y):
        raise ValueError(
            f"error_estimate(A, rows={rows!r}): of {len(Y)} targets no row is looked at.\n"
            "Give a whole number of at least 1."
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(X), 1, generator=generator, dtype=X.dtype).to(X.device)
    index = torch.randperm(len(Y), generator=generator)[:rows].to(X.device)
    with torch.no_grad():
        exact = interactions(function, Y[index].double(), X.double(), scale) @ x.double()
        found = (A @ x)[index].double()
    return float((found - exact).norm() / exact.norm())
