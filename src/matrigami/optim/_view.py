"""How a parameter is a stack of matrices, and back: plain data that acts on any such tensor.

The rows of a matrix are the fan-out and its columns the fan-in; independent blocks are its batch,
and are never merged. Views come from the layer that owns the parameter, never from a shape alone.

Shapes: b = blocks, m = rows, n = columns.
"""

import math
from dataclasses import dataclass, replace

from jaxtyping import Inexact
from torch import Tensor
from torch.nn.functional import pad

from matrigami.operators import ContractionMatrix


@dataclass(frozen=True)
class MatrixView:
    """A parameter as a stack of `blocks` matrices: reshape to `grid`, permute by `order`, merge.

    Args:
        shape: Shape of the parameter.
        grid: Shape whose axes are sorted into blocks, rows and columns.
        order: The axes of the grid: those of the blocks first, then rows, then columns.
        blocks: Number of matrices.
        rows: Rows of each.
        columns: Columns of each.
        parts: Numbers of tiles into which the rows and the columns are cut (with zeros appended if
            they do not divide); each tile is a block of its own.

    Examples:
        >>> import torch
        >>> view = gates(torch.Size([6, 2]), 3)
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

    def split(self, W: Inexact[Tensor, "..."]) -> Inexact[Tensor, "b m n"]:
        """The parameter, or its gradient, as a stack of matrices; a view where strides allow."""
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

    def tiled(self, largest: int) -> "MatrixView":
        """The same view with no tile larger than `largest` rows or columns, evenly cut."""
        return replace(self, parts=(-(-self.rows // largest), -(-self.columns // largest)))


def whole(shape: tuple[int, ...]) -> MatrixView | None:
    """The view of the weight of a dense layer, `(out, in)`."""
    return gates(shape, 1)


def gates(shape: tuple[int, ...], count: int) -> MatrixView | None:
    """The view of `count` weights of equal size that are stored one below the other."""
    m, n = shape
    return view(shape, (count, m // count, n), (0, 1, 2), (1, 1, 1))


def convolution(shape: tuple[int, ...], groups: int) -> MatrixView | None:
    """The view of a convolution's weight `(out, in / groups, *kernel)`: its taps are inputs."""
    m, *taps = shape
    return view(shape, (groups, m // groups, math.prod(taps)), (0, 1, 2), (1, 1, 1))


def transposed_convolution(shape: tuple[int, ...], groups: int) -> MatrixView | None:
    """The view of the weight `(in, out / groups, *kernel)`: its taps are outputs."""
    n, *taps = shape
    return view(shape, (groups, n // groups, math.prod(taps)), (0, 2, 1), (1, 1, 1))


def core(part: ContractionMatrix) -> MatrixView | None:
    """The view of one tensor of a structured matrix, from the part it plays in the product.

    Examples:
        >>> import torch
        >>> from matrigami import Monarch
        >>> from matrigami.operators import contractions
        >>> core(contractions(Monarch(blocks=4).init(12, 8))[0].matrix).stack
        (4, 3, 4)
    """
    labels, stack = part.labels, part.stack
    sizes = dict(part.sizes)
    grid = tuple(sizes[x] for x in labels)
    kinds = (part.batch, part.rows, part.columns)
    order = [len(stack) + labels.index(x) for kind in kinds for x in kind]
    counts = (len(stack) + len(part.batch), len(part.rows), len(part.columns))
    return view(tuple(part.core.shape), stack + grid, (*range(len(stack)), *order), counts)


def view(
    shape: tuple[int, ...], grid: tuple[int, ...], order: tuple[int, ...], counts: tuple[int, ...]
) -> MatrixView | None:
    """A view whose first `counts[0]` axes are blocks, and so on; None if its blocks are vectors.

    A vector has no second side: the factor of its only one would be a full matrix.
    """
    lengths = [grid[axis] for axis in order]
    b, m, _ = counts
    blocks, rows = math.prod(lengths[:b]), math.prod(lengths[b : b + m])
    columns = math.prod(lengths[b + m :])
    if min(rows, columns) <= 1:
        return None
    return MatrixView(tuple(shape), grid, order, blocks, rows, columns)
