"""H2: hierarchical matrices with nested bases, and the blocks at given places that they consist of.

`A = near + sum over levels of left C right`, where the bases of a coarse level are made from those
of the finer one: coefficients of the sources go up the levels, are coupled on each, and come down
to the targets. Blocks that repeat, as they do for kernels on regular cells, are stored once.

Storage and cost per vector: the blocks, and each as often as it repeats: `O(n)` for both where
points have bounded neighbourhoods. Source: Hackbusch and Boerm (2002), Computing 69; with
translation-invariant couplings, Greengard and Rokhlin (1987), J. Comput. Phys. 73.

Shapes: o = different blocks of p x q, e = places of each, m = rows, n = columns, k = right-hand
sides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import Cost, LinearOperator, Places, cost, scale

__all__ = ["H2Matrix", "PlacedBlocksMatrix", "summed_products"]


@dataclass(frozen=True, eq=False, repr=False)
class PlacedBlocksMatrix(LinearOperator):
    """The sum of equal blocks, each in several places.

    Args:
        blocks: The blocks that differ.
        rows: Where each is: `(o, e)` counts in blocks of `p` rows, `(o, e, p)` names every row;
            one past the last is nowhere.
        columns: The same for its columns.
        size: Rows and columns of the matrix.

    Examples:
        >>> blocks, twice = torch.ones(1, 1, 2), Places(torch.tensor([[0, 1]]))
        >>> PlacedBlocksMatrix(blocks, twice, twice, (2, 4)).dense()
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    blocks: Inexact[Tensor, "*batch o p q"]
    rows: Places
    columns: Places
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.blocks.shape[:-3], *self.size)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Gather, multiply in one batch, and add up."""
        (p, q), k = self.blocks.shape[-2:], X.shape[-1]
        G = _gathered(X, self.columns.on(X.device), q)  # ... o e q k
        e = G.shape[-3]
        G = G.transpose(-2, -1).flatten(-3, -2)  # ... o (e k) q
        Z = (G @ self.blocks.mT).unflatten(-2, (e, k)).transpose(-2, -1)  # ... o e p k
        return _scattered(Z, self.rows.on(X.device), self.size[0], p)

    @property
    def T(self) -> "PlacedBlocksMatrix":
        """The transposed blocks; rows and columns change places."""
        return PlacedBlocksMatrix(self.blocks.mT, self.columns, self.rows, self.size[::-1])  # pyright: ignore[reportArgumentType]

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.size[1], dtype=self.dtype, device=self.device))


def _gathered(X: Tensor, places: Tensor, q: int) -> Inexact[Tensor, "... o e q k"]:
    """The rows of each place, zeros for nowhere."""
    if places.ndim == 3:
        return torch.nn.functional.pad(X, (0, 0, 0, 1))[..., places, :]
    units = X.unflatten(-2, (X.shape[-2] // q, q))
    return torch.nn.functional.pad(units, (0, 0, 0, 0, 0, 1))[..., places, :, :]


def _scattered(Z: Tensor, places: Tensor, m: int, p: int) -> Inexact[Tensor, "... m k"]:
    """The sum of what every place makes."""
    if places.ndim == 3:
        flat = Z.flatten(-4, -2)
        zeros = flat.new_zeros(*flat.shape[:-2], m + 1, flat.shape[-1])
        return zeros.index_add(-2, places.flatten(), flat)[..., :m, :]
    flat = Z.flatten(-4, -3)
    zeros = flat.new_zeros(*flat.shape[:-3], m // p + 1, p, flat.shape[-1])
    return zeros.index_add(-3, places.flatten(), flat)[..., : m // p, :, :].flatten(-3, -2)


AT_ONCE = 32
"""Columns of the identity that are multiplied together: more are no more in the cache."""

Blocks = tuple[LinearOperator, ...]
"""Matrices that are added: placed blocks, or what a process owns of them."""


@dataclass(frozen=True, eq=False, repr=False)
class H2Matrix(LinearOperator):
    """A matrix with nested bases; levels are listed from the coarsest to the finest.

    Args:
        near: What has no low rank.
        left: For each level, from its coefficients to rows.
        couplings: For each level, from coefficients of columns to those of rows.
        right: For each level, from columns to its coefficients.
        down: From the coefficients of each level to those of the next finer one.
        up: From those of the next finer one.
        size: Rows and columns.
    """

    near: tuple[LinearOperator, ...]
    left: tuple[tuple[LinearOperator, ...], ...]
    couplings: tuple[LinearOperator, ...]
    right: tuple[tuple[LinearOperator, ...], ...]
    down: tuple[LinearOperator, ...]
    up: tuple[LinearOperator, ...]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self._parts[0].shape[:-2], *self.size)

    @property
    def _parts(self) -> Blocks:
        """All parts."""
        levels = [B for level in (*self.left, *self.right) for B in level]
        return (*self.near, *levels, *self.couplings, *self.down, *self.up)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Up, across and down the levels, and the near field."""
        Y = summed_products(self.near, X, self.size[0])
        finest = len(self.couplings) - 1
        states: list[Tensor] = []
        for level in range(finest, -1, -1):
            Z = summed_products(self.right[level], X, self.couplings[level].shape[-1])
            states.insert(0, Z if level == finest else Z + self.up[level].matmat(states[0]))
        W = None
        for level, Z in enumerate(states):
            V = self.couplings[level].matmat(Z)
            W = V if W is None else V + self.down[level - 1].matmat(W)
            Y = Y + summed_products(self.left[level], W, self.size[0])
        return Y

    @property
    def T(self) -> "H2Matrix":
        """Every part transposed; left and right, up and down change places."""
        near, couplings, down, up = (
            _transposed(parts) for parts in (self.near, self.couplings, self.down, self.up)
        )
        left, right = (tuple(map(_transposed, side)) for side in (self.left, self.right))
        return H2Matrix(near, right, couplings, left, up, down, self.size[::-1])  # pyright: ignore[reportArgumentType]

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        eye = torch.eye(self.size[1], dtype=self.dtype, device=self.device)
        return torch.cat([self.matmat(part) for part in eye.split(AT_ONCE, dim=1)], -1)


def summed_products(
    parts: Iterable[LinearOperator], X: Inexact[Tensor, "... n k"], m: int
) -> Inexact[Tensor, "... m k"]:
    """The sum of the products with matrices of `m` rows; zeros of none."""
    Y = X.new_zeros(*X.shape[:-2], m, X.shape[-1])
    for B in parts:
        Y = Y + B.matmat(X)
    return Y


def _transposed(parts: Blocks) -> Blocks:
    """The transpose of each."""
    return tuple([B.T for B in parts])


@scale.register
def _(A: PlacedBlocksMatrix, factor: Tensor) -> PlacedBlocksMatrix:
    blocks = A.blocks * factor[..., None, None, None]
    return PlacedBlocksMatrix(blocks, A.rows, A.columns, A.size)


@cost.register
def _(A: PlacedBlocksMatrix) -> Cost:
    repeats = max(A.rows.shape[1], 1)
    return Cost(A.blocks.numel(), A.blocks.numel() * repeats, A.blocks.nbytes)


@cost.register
def _(A: H2Matrix) -> Cost:
    total = Cost(0, 0, 0)
    for B in A._parts:
        total = total + cost(B)
    return total
