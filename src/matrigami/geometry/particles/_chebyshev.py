"""Bases of the cells of one size: Chebyshev interpolation, cut down to what the far field needs.

In a cell the field of sources that do not touch it is interpolated at `P = p^d` Chebyshev nodes,
and the vectors of such values are close to a space of few dimensions, spanned by the `r` leading
singular vectors `U` of the kernel between the nodes and the far field. Hence `K ~ S U (U.T K U)
(S U).T`, with the interpolation `S` from the nodes to the points. Source: Fong and Darve (2009),
J. Comput. Phys. 228.

Shapes: P = nodes of a cell, r = rank, d = dimension, D = offsets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

MOST = {1: 40, 2: 16, 3: 11}
"""Most nodes along an axis, by dimension."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Points of targets and sources to the entries of the kernel."""


@dataclass(frozen=True)
class Basis:
    """The basis of cells with edges of length `h`.

    Attributes:
        h: Length of an edge.
        p: Nodes along an axis.
        U: Orthonormal columns.
    """

    h: float
    p: int
    U: Float[Tensor, "P r"]

    def at(self, X: Float[Tensor, "... d"]) -> Float[Tensor, "... r"]:
        """The basis at points, relative to the centre of their cell."""
        return interpolation(X * (2 / self.h), self.p) @ self.U

    def nodes(self) -> Float[Tensor, "P d"]:
        """The nodes, relative to the centre."""
        d = round(math.log(self.U.shape[0], self.p)) if self.p > 1 else 1
        return nodes(self.p, d, self.U) * (self.h / 2)


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


def far_offsets(d: int, like: Tensor) -> Float[Tensor, "D d"]:
    """The places, in cells, of those that do not touch a cell but whose parents may."""
    every = torch.tensor(list(product(range(-3, 4), repeat=d)))
    return every[every.abs().amax(1) > 1].to(like)


def basis(
    entries: Entries, h: float, d: int, levels: int, error: float, like: Tensor
) -> Basis:
    """The basis for a far field up to an absolute error.

    Args:
        entries: The kernel.
        h: Length of an edge of a cell.
        d: Dimension.
        levels: How often the far field doubles before it leaves the root.
        error: Largest error of an entry.
        like: A tensor of the type and on the device wanted.
    """
    p = _order(entries, h, d, error, like)
    X = nodes(p, d, like) * (h / 2)
    sample = (far_offsets(d, like)[:, None, :] + nodes(2, d, like) * 0.5).flatten(0, 1) * h
    fields = [entries(X, sample * 2**i) for i in range(max(levels, 1))]
    R = torch.linalg.qr(torch.cat(fields, 1).mT, mode="r").R
    _, values, Vh = torch.linalg.svd(R)
    rank = int((values > error * math.sqrt(sample.shape[0])).sum())
    return Basis(h, p, Vh[: max(rank, 1)].mT.contiguous())


def _order(entries: Entries, h: float, d: int, error: float, like: Tensor) -> int:
    """The fewest nodes along an axis that interpolate the nearest far cells well enough."""
    generator = torch.Generator().manual_seed(0)
    X = (torch.rand(200, d, generator=generator, dtype=torch.float64).to(like) * 2 - 1) * (h / 2)
    Y = torch.tensor([[1.5, 0.0, 0.0], [1.5, 0.5, 0.5], [1.5, 1.5, 1.5]])[:, :d].to(like) * h
    exact = entries(X, Y)
    for p in range(2, MOST[d]):
        found = interpolation(X * (2 / h), p) @ entries(nodes(p, d, like) * (h / 2), Y)
        if float((found - exact).abs().max()) <= error:
            return p
    return MOST[d]
