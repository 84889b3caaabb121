"""Bases of the cells of one size: Chebyshev interpolation, cut down to what the far field needs.

In a cell the field of sources that do not touch it is interpolated at `P = p^d` Chebyshev nodes,
and the vectors of such values are close to a space of few dimensions, spanned by the `r` leading
singular vectors `U` of the kernel between the nodes and the far field: `K ~ S U (U.T K U) (S U).T`
with the interpolation `S` from nodes to points. A skeleton, nodes chosen by pivoting, is where
fields are evaluated to find their coefficients, `U.T f = M f(skeleton)`. Sources: Fong and Darve
(2009), J. Comput. Phys. 228; Cheng, Gimbutas, Martinsson and Rokhlin (2005), SIAM J. Sci. Comput.
26, for skeletons.

Shapes: P = nodes of a cell, r = rank, s = skeleton, d = dimension, D = offsets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST = {1: 40, 2: 20, 3: 14}
"""Most nodes along an axis, by dimension."""

OVERSAMPLED = 20
"""By how much the error of a skeleton is below that of the basis, since pivoting makes it grow."""

ALLOWED_MISS = 10.0
"""By how much the most nodes may miss the error of an entry, which is the worst of many."""

SAMPLES = 5000
"""Random sources in the far field of a level: a lattice would miss what is between its points."""

RANKS = 500
"""Columns of the sketch of the far field: more than any rank."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Points of targets and sources to the entries of the kernel."""


@dataclass(frozen=True)
class Basis:
    """The basis of cells with edges of length `h`.

    Attributes:
        h: Length of an edge.
        p: Nodes along an axis.
        U: Values at the nodes of fields with the coefficients one: orthonormal columns.
        skeleton: Points in a cell, relative to its centre.
        M: From values at the skeleton to coefficients.
    """

    h: float
    p: int
    U: Float[Tensor, "P r"]
    skeleton: Float[Tensor, "s d"]
    M: Float[Tensor, "r s"]

    def at(self, X: Float[Tensor, "... d"]) -> Float[Tensor, "... r"]:
        """From coefficients to values at points, relative to the centre of the cell."""
        return interpolation(X * (2 / self.h), self.p) @ self.U

    def resized(self, h: float) -> "Basis":
        """The same for cells of another size."""
        return Basis(h, self.p, self.U, self.skeleton * (h / self.h), self.M)


def nodes(p: int, d: int, like: Tensor) -> Float[Tensor, "P d"]:
    """Chebyshev nodes of `[-1, 1]^d`, the last coordinate fastest."""
    line = torch.cos(math.pi * (torch.arange(p, dtype=torch.float64) + 0.5) / p)
    grids = torch.meshgrid(*[line] * d, indexing="ij")
    return torch.stack([g.flatten() for g in grids], -1).to(like)


def interpolation(X: Float[Tensor, "... d"], p: int) -> Float[Tensor, "... P"]:
    """From values at the nodes to values at points: `1/p + 2/p sum_k T_k(node) T_k(x)`."""
    line = nodes(p, 1, X)[:, 0]
    last = last_but_one = torch.ones_like(X)
    at_nodes, before = torch.ones_like(line), torch.ones_like(line)
    S = torch.ones(*X.shape, p, dtype=X.dtype, device=X.device)
    for k in range(1, p):
        if k == 1:
            last_but_one, last, before, at_nodes = last, X, at_nodes, line
        else:
            last_but_one, last = last, 2 * X * last - last_but_one
            before, at_nodes = at_nodes, 2 * line * at_nodes - before
        S = S + 2 * last[..., None] * at_nodes
    S = S / p  # ... d p
    whole = S[..., 0, :]
    for axis in range(1, X.shape[-1]):
        whole = (whole[..., :, None] * S[..., axis, None, :]).flatten(-2, -1)
    return whole


def far_offsets(d: int) -> Int[Tensor, "D d"]:
    """The places, in cells, of those that do not touch a cell but whose parents may."""
    every = torch.tensor(list(product(range(-3, 4), repeat=d)))
    return every[every.abs().amax(1) > 1]


def basis(entries: Entries, h: float, d: int, levels: int, error: float, like: Tensor) -> Basis:
    """The basis for a far field up to an absolute error.

    Args:
        entries: The kernel.
        h: Length of an edge of a cell.
        d: Dimension.
        levels: How often the far field doubles before it leaves the root.
        error: Of an entry.
        like: A tensor of the type and on the device wanted.
    """
    p = _order(entries, h, d, levels, error, like)
    X = nodes(p, d, like) * (h / 2)
    cells, generator = far_offsets(d), torch.Generator().manual_seed(0)
    inside = (
        torch.rand(SAMPLES // len(cells), len(cells), d, generator=generator, dtype=torch.float64)
        - 0.5
    )
    sample = ((cells + inside).to(like) * h).flatten(0, 1)
    fields = torch.cat([_shell(entries, X, sample, i) for i in range(levels)], 1)
    width = min(len(X), RANKS)
    G = torch.randn(fields.shape[1], width, generator=generator, dtype=torch.float64).to(like)
    U, values, _ = torch.linalg.svd(fields @ G / width**0.5, full_matrices=False)
    error = error * len(sample) ** 0.5
    rank, wide = (max(int((values > e).sum()), 1) for e in (error, error / OVERSAMPLED))
    _, pivots = torch.linalg.lu_factor(U[:, :wide])
    rows = torch.arange(len(X), device=X.device)
    for i, row in enumerate(pivots.tolist()):
        rows[[i, row - 1]] = rows[[row - 1, i]]
    rows = rows[:wide]
    M = torch.linalg.inv(U[rows, :wide])[:rank]
    return Basis(h, p, U[:, :rank].contiguous(), X[rows], M)


def _shell(
    entries: Entries, X: Float[Tensor, "P d"], Y: Float[Tensor, "n d"], i: int
) -> Float[Tensor, "P _"]:
    """The field of what is far on the `i`-th coarser level, whose errors add up over more cells."""
    return entries(X, Y * 2**i) * 2 ** (i * X.shape[1] / 2)


def _order(entries: Entries, h: float, d: int, levels: int, error: float, like: Tensor) -> int:
    """The fewest nodes along an axis that interpolate the nearest far cells well enough.

    Raises:
        ValueError: If the most are far from enough.
    """
    generator = torch.Generator().manual_seed(0)
    X = (torch.rand(200, d, generator=generator, dtype=torch.float64).to(like) * 2 - 1) * (h / 2)
    Y = torch.tensor([[1.5, 0.0, 0.0], [1.5, 0.5, 0.5], [1.5, 1.5, 1.5]])[:, :d].to(like) * h

    def fields(Z: Tensor) -> Tensor:
        """All shells."""
        return torch.cat([_shell(entries, Z, Y, i) for i in range(levels)], 1)

    exact = fields(X)
    p, reached = MOST[d], torch.inf
    for p in range(2, MOST[d] + 1):
        found = interpolation(X * (2 / h), p) @ fields(nodes(p, d, like) * (h / 2))
        reached = float((found - exact).abs().max())
        if reached <= error:
            return p
    if reached > ALLOWED_MISS * error:
        raise ValueError(
            f"kernel_matrix: a cell of {h:.2g} needs an error of {error:.1e} in an entry, and {p} "
            f"nodes along an edge reach {reached:.1e}.\n"
            "The kernel oscillates, or bends, faster than that between cells that do not touch.\n"
            "Use a larger tol; or, if memory allows, the dense matrix of all pairs."
        )
    return p
