"""Block diagonal: `A = diag(A_1, ..., A_c)`, equal blocks, not necessarily square.

Storage and cost per vector: `m n / c`. Projection: the blocks on the diagonal.

Shapes: c = blocks, p x q = one block, m = c p rows, n = c q columns, k = right-hand sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DenseMatrix,
    Fan,
    LinearOperator,
    Structure,
    chained,
    compose,
    contraction,
    contractions,
    diagonal,
    draw,
    fans,
    inverse,
    power,
    project,
    resolve_blocks,
    slogdet,
    solve,
    svdvals,
)


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonalMatrix(LinearOperator):
    """The matrix with `blocks[..., i, :, :]` along its diagonal.

    Examples:
        >>> import torch
        >>> BlockDiagonalMatrix(torch.ones(2, 1, 3)).dense()
        tensor([[1., 1., 1., 0., 0., 0.],
                [0., 0., 0., 1., 1., 1.]])
    """

    blocks: Inexact[Tensor, "*batch c p q"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        *batch, c, p, q = self.blocks.shape
        return (*batch, c * p, c * q)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply block by block, in one batched product."""
        c, _, q = self.blocks.shape[-3:]
        return (self.blocks @ X.unflatten(-2, (c, q))).flatten(-3, -2)

    @property
    def T(self) -> "BlockDiagonalMatrix":
        """Transpose each block."""
        return BlockDiagonalMatrix(self.blocks.mT)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        c = self.blocks.shape[-3]
        eye = torch.eye(c, dtype=self.dtype, device=self.device)
        return torch.einsum("...cpq,cd->...cpdq", self.blocks, eye).flatten(-4, -3).flatten(-2, -1)


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Block-diagonal matrices with `blocks` equal blocks: a number, or a fraction of `min(m, n)`.

    Examples:
        >>> BlockDiagonal(blocks=2).init(4, 6)
        BlockDiagonalMatrix(4x6, 12 parameters)
    """

    blocks: float

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BlockDiagonalMatrix:
        """Draw Gaussian blocks.

        Raises:
            ValueError: If the blocks do not divide the matrix.
        """
        c, p, q = self._shape(m, n)
        return draw(
            BlockDiagonalMatrix(torch.empty(c, p, q, dtype=dtype, device=device)), generator
        )

    def _shape(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks, rows and columns of one block."""
        c = resolve_blocks(self.blocks, m, n, str(self))
        if m % c or n % c:
            raise ValueError(
                f"{self} was asked for a {m}x{n} matrix.\n"
                f"{c} equal blocks do not fit it.\n"
                f"The number of blocks should divide both {m} and {n}."
            )
        return c, m // c, n // c


@fans.register
def _(A: BlockDiagonalMatrix) -> tuple[Fan, ...]:
    return (Fan(A.blocks.shape[-1], A.blocks.shape[-2], last=True),)


@contractions.register
def _(A: BlockDiagonalMatrix) -> tuple[Contraction, ...]:
    c, p, q = A.blocks.shape[-3:]
    return chained(contraction(A.blocks, "c p q", "c q", "c p", c=c, p=p, q=q))


@compose.register
def _(A: BlockDiagonalMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, BlockDiagonalMatrix) and A.blocks.shape[-3] == B.blocks.shape[-3]:
        return BlockDiagonalMatrix(A.blocks @ B.blocks)
    return compose.dispatch(LinearOperator)(A, B)


@solve.register
def _(A: BlockDiagonalMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    c, _, q = A.blocks.shape[-3:]
    return torch.linalg.solve(A.blocks, B.unflatten(-2, (c, q))).flatten(-3, -2)


@inverse.register
def _(A: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(torch.linalg.inv(A.blocks))


@slogdet.register
def _(A: BlockDiagonalMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    sign, log = torch.linalg.slogdet(A.blocks)
    return sign.prod(-1), log.sum(-1)


@diagonal.register
def _(A: BlockDiagonalMatrix) -> Inexact[Tensor, "*batch d"]:
    if A.blocks.shape[-1] != A.blocks.shape[-2]:
        return diagonal.dispatch(LinearOperator)(A)
    return torch.diagonal(A.blocks, dim1=-2, dim2=-1).flatten(-2, -1)


@svdvals.register
def _(A: BlockDiagonalMatrix) -> Float[Tensor, "*batch d"]:
    return torch.linalg.svdvals(A.blocks).flatten(-2, -1).sort(-1, descending=True).values


@power.register
def _(A: BlockDiagonalMatrix, p: float) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(power(DenseMatrix(A.blocks), p).dense())


@project.register
def _(recipe: BlockDiagonal, W: Inexact[Tensor, "*batch m n"]) -> BlockDiagonalMatrix:
    c, p, q = recipe._shape(*W.shape[-2:])
    grid = W.unflatten(-2, (c, p)).unflatten(-1, (c, q))
    return BlockDiagonalMatrix(torch.diagonal(grid, dim1=-4, dim2=-2).movedim(-1, -3).clone())
