"""How a tensor is a stack of matrices, and back: plain data that acts on any such tensor.

The rows of a matrix are the fan-out and its columns the fan-in; independent blocks are its batch,
and are never merged. A view comes from the layer or the value that owns the tensor, never from a
shape alone.

Shapes: b = blocks, m = rows, n = columns.
"""

import math
from dataclasses import dataclass, replace

from jaxtyping import Inexact
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class BlockView:
    """A tensor as a stack of `blocks` matrices: reshape to `grid`, permute by `order`, merge.

    Args:
        shape: Shape of the tensor.
        grid: Shape whose axes are sorted into blocks, rows and columns.
        order: The axes of the grid: those of the blocks first, then rows, then columns.
        blocks: Number of matrices.
        rows: Rows of each.
        columns: Columns of each.
        parts: Numbers of tiles into which the rows and the columns are cut (with zeros appended if
            they do not divide); each tile is a block of its own.

    Examples:
        >>> import torch
        >>> view = stacked_view((6, 2), 3)
        >>> view.stack, view.split(torch.arange(12.0).view(6, 2))[1].tolist()
        ((3, 2, 2), [[4.0, 5.0], [6.0, 7.0]])
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    order: tuple[int, ...]
    blocks: int
    rows: int
    columns: int
    parts: tuple[int, int] = (1, 1)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return -(-self.rows // self.parts[0]), -(-self.columns // self.parts[1])

    @property
    def stack(self) -> tuple[int, int, int]:
        """Shape of what `split` returns."""
        return (self.blocks * math.prod(self.parts), *self.tile)

    @property
    def two_sided(self) -> bool:
        """Whether the blocks are matrices; of a vector the only factor would be a full matrix."""
        return min(self.rows, self.columns) > 1

    def split(self, W: Inexact[Tensor, "..."]) -> Inexact[Tensor, "b m n"]:
        """The tensor, or its gradient, as a stack of matrices; a view where strides allow."""
        grid = W.reshape(self.grid).permute(self.order)
        stack = grid.reshape(self.blocks, self.rows, self.columns)
        if self.parts == (1, 1):
            return stack
        (p, q), (m, n) = self.parts, self.tile
        padded = pad(stack, (0, q * n - self.columns, 0, p * m - self.rows))
        return padded.reshape(-1, p, m, q, n).transpose(2, 3).reshape(self.stack)

    def merge(self, M: Inexact[Tensor, "b m n"]) -> Inexact[Tensor, "..."]:
        """The inverse of `split`."""
        if self.parts != (1, 1):
            (p, q), (m, n) = self.parts, self.tile
            M = M.reshape(-1, p, q, m, n).transpose(2, 3).reshape(-1, p * m, q * n)
            M = M[:, : self.rows, : self.columns]
        back = [self.order.index(axis) for axis in range(len(self.order))]
        grid = M.reshape([self.grid[axis] for axis in self.order])
        return grid.permute(back).reshape(self.shape)

    def tiled(self, largest: int) -> "BlockView":
        """The same view with no tile larger than `largest` rows or columns, evenly cut."""
        return replace(self, parts=(-(-self.rows // largest), -(-self.columns // largest)))


def block_view(
    shape: tuple[int, ...], grid: tuple[int, ...], order: tuple[int, ...], counts: tuple[int, int]
) -> BlockView:
    """The view whose first axes in `order` are `counts[0]` of blocks, then `counts[1]` of rows."""
    lengths = [grid[axis] for axis in order]
    b, m = counts[0], counts[0] + counts[1]
    sizes = (math.prod(lengths[:b]), math.prod(lengths[b:m]), math.prod(lengths[m:]))
    return BlockView(tuple(shape), tuple(grid), tuple(order), *sizes)


def stacked_view(shape: tuple[int, ...], count: int = 1) -> BlockView:
    """The view of `count` matrices of equal size that are stored one below the other.

    Later axes than the second are columns, too: the taps of a convolution, whose groups these are.

    Examples:
        >>> stacked_view((6, 2, 3, 3), 2).stack
        (2, 3, 18)
    """
    m, *columns = shape
    return block_view(shape, (count, m // count, math.prod(columns)), (0, 1, 2), (1, 1))


def transposed_view(shape: tuple[int, ...], count: int = 1) -> BlockView:
    """The same of matrices that are stored with their columns first.

    Examples:
        >>> transposed_view((6, 2, 3, 3), 2).stack
        (2, 18, 3)
    """
    n, *rows = shape
    return block_view(shape, (count, n // count, math.prod(rows)), (0, 2, 1), (1, 1))
