"""Points on a line: a HODLR matrix in their order.

Between two neighbouring intervals a kernel is a smooth function of `x - y > 0`, of low rank up to
the common end point. Matern kernels are semiseparable: with `c` between the intervals, `x - y =
(x - c) + (c - y)`, so `exp(-u) P(u)` has exact rank `deg P + 1` by Taylor's formula for `P`, with
factors that are at most one in size.

Shapes: n = points, s = intervals of a level, r = rank.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.geometry.particles._cross import cross_factors
from matrigami.geometry.particles._kernels import SEMISEPARABLE, Kernel, interactions, is_singular
from matrigami.operators import LinearOperator, Places, cropped
from matrigami.structures import HODLRMatrix, PermutedMatrix

LEAF = 64
"""Points of a leaf: below it a dense block is quicker than a level of low rank."""


def line_matrix(
    x: Float[Tensor, " n"], kernel: Kernel, scale: Tensor | float, tol: float
) -> LinearOperator:
    """The kernel matrix of points on a line."""
    n = len(x)
    order = x.detach().argsort()
    levels = max(math.ceil(math.log2(max(n, 1) / LEAF)), 0)
    c = 2**levels
    p = math.ceil(n / c)
    ordered = x[torch.cat([order, order[-1:].expand(c * p - n)])]  # the surplus is cut off again
    singular = is_singular(kernel)

    def entries(X: Tensor, Y: Tensor) -> Tensor:
        """The kernel of all pairs."""
        return interactions(kernel, X, Y, scale, singular=singular)

    grid = ordered.reshape(c, p, 1)
    left, right = [], []
    for level in range(levels):
        intervals = ordered.reshape(2 ** (level + 1), -1)
        if kernel in SEMISEPARABLE:
            U, V = _taylor(intervals, kernel, scale)
        else:
            a, b = intervals[0::2, :, None], intervals[1::2, :, None]
            first, second = cross_factors(entries, a, b, tol)
            U = torch.stack([first, second], 1).flatten(0, 1)
            V = torch.stack([first, second], 1).flatten(0, 1)
        left.append(U)
        right.append(V)
    H = HODLRMatrix(entries(grid, grid), tuple(left), tuple(right))
    return PermutedMatrix(cropped(H, n, n), Places(order.argsort()))


def _taylor(
    intervals: Float[Tensor, "s n"], kernel: Kernel, scale: Tensor | float
) -> tuple[Float[Tensor, "s n r"], Float[Tensor, "s n r"]]:
    """The exact factors of `exp(-u) P(u)` around the end points between siblings."""
    rate, P = SEMISEPARABLE[kernel]
    ends = (intervals[0::2, -1] + intervals[1::2, 0]) / 2
    u = rate * (intervals - ends.repeat_interleave(2)[:, None]).abs() / scale
    decay = torch.exp(-u)
    degree = len(P) - 1
    left = [
        decay * sum(math.comb(i, j) * P[i] * u ** (i - j) for i in range(j, degree + 1))
        for j in range(degree + 1)
    ]
    right = [decay * u**j for j in range(degree + 1)]
    return torch.stack(left, -1), torch.stack(right, -1)
