"""Block diagonal: `A = diag(A_1, ..., A_c)`, equal blocks, not necessarily square.

Storage and cost per vector: `m n / c`. Projection: the blocks on the diagonal.

Shapes: c = blocks, p x q = one block, m = c p rows, n = c q columns, k = right-hand sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DenseMatrix,
    DiagonalMatrix,
    Eigh,
    Fan,
    LinearOperator,
    Structure,
    SumMatrix,
    Svd,
    add,
    chained,
    cholesky,
    compose,
    contraction,
    contractions,
    descending,
    diagonal,
    eigh,
    example,
    exp,
    fans,
    inverse,
    is_frobenius,
    largest,
    lu_inverse,
    lu_slogdet,
    lu_solve,
    norm,
    pinv,
    power,
    project,
    resolve_blocks,
    scale,
    schatten,
    shift,
    slogdet,
    solve,
    svd,
    svdvals,
    times,
    vector_norm,
)

__all__ = ["BlockDiagonal", "BlockDiagonalMatrix"]


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


@example("block_diagonal", blocks=2)
@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Block-diagonal matrices with `blocks` equal blocks: a number, or a fraction of `min(m, n)`.

    Examples:
        >>> BlockDiagonal(blocks=2).init(4, 6)
        BlockDiagonalMatrix(4x6, 12 parameters)
    """

    blocks: float

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> BlockDiagonalMatrix:
        """The tensors of a member.

        Raises:
            ValueError: If the blocks do not divide the matrix.
        """
        c, p, q = self._shape(m, n)
        return BlockDiagonalMatrix(empty(c, p, q))

    def _shape(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks, rows and columns of one block."""
        c = resolve_blocks(self.blocks, m, n, str(self))
        if m % c or n % c:
            raise ValueError(
                f"{self} cannot be {m}x{n}: {c} equal blocks do not fit.\n"
                f"The number of blocks must divide both {m} and {n}."
            )
        return c, m // c, n // c


@fans.register
def _(A: BlockDiagonalMatrix) -> tuple[Fan, ...]:
    return (Fan(A.blocks.shape[-1], A.blocks.shape[-2], last=True),)


@contractions.register
def _(A: BlockDiagonalMatrix) -> tuple[Contraction, ...]:
    c, p, q = A.blocks.shape[-3:]
    return chained(contraction(A.blocks, "c p q", "c q", "c p", c=c, p=p, q=q))


@add.register(where=lambda A, B: A.blocks.shape[-3] == B.blocks.shape[-3])
def _(A: BlockDiagonalMatrix, B: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(A.blocks + B.blocks)


@compose.register(where=lambda A, B: A.blocks.shape[-3] == B.blocks.shape[-3])
def _(A: BlockDiagonalMatrix, B: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(times(A.blocks, B.blocks))


@add.register(where=lambda A, B: _square(A))
def _(A: BlockDiagonalMatrix, B: DiagonalMatrix) -> BlockDiagonalMatrix:
    d = B.diagonal.unflatten(-1, A.blocks.shape[-3:-1])
    return BlockDiagonalMatrix(A.blocks + torch.diag_embed(d))


@add.register
def _(A: DiagonalMatrix, B: BlockDiagonalMatrix) -> LinearOperator:
    return add(B, A) if _square(B) else SumMatrix((A, B))


@compose.register
def _(A: BlockDiagonalMatrix, B: DiagonalMatrix) -> BlockDiagonalMatrix:
    d = B.diagonal.unflatten(-1, A.blocks.shape[-3::2])
    return BlockDiagonalMatrix(A.blocks * d[..., None, :])


@compose.register
def _(A: DiagonalMatrix, B: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    d = A.diagonal.unflatten(-1, B.blocks.shape[-3:-1])
    return BlockDiagonalMatrix(d[..., None] * B.blocks)


@scale.register
def _(A: BlockDiagonalMatrix, factor: Tensor) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(A.blocks * factor[..., None, None, None])


def _square(A: BlockDiagonalMatrix, *_: Any) -> bool:
    """Whether the blocks are square: they are on the diagonal then."""
    return A.blocks.shape[-1] == A.blocks.shape[-2]


@shift.register(where=_square)
def _(A: BlockDiagonalMatrix, amount: Tensor) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(shift(DenseMatrix(A.blocks), amount[..., None]).dense())


@solve.register
def _(A: BlockDiagonalMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    c, _, q = A.blocks.shape[-3:]
    return lu_solve(A.blocks, B.unflatten(-2, (c, q))).flatten(-3, -2)


@inverse.register
def _(A: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(lu_inverse(A.blocks))


@pinv.register
def _(A: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    largest_value = torch.linalg.matrix_norm(A.blocks, 2).amax(-1)[..., None]
    zero = largest_value * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
    return BlockDiagonalMatrix(torch.linalg.pinv(A.blocks, atol=zero, rtol=torch.zeros_like(zero)))


@slogdet.register
def _(A: BlockDiagonalMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    sign, log = lu_slogdet(A.blocks)
    return sign.prod(-1), log.sum(-1)


@diagonal.register(where=_square)
def _(A: BlockDiagonalMatrix) -> Inexact[Tensor, "*batch d"]:
    return torch.diagonal(A.blocks, dim1=-2, dim2=-1).flatten(-2, -1)


@eigh.register
def _(A: BlockDiagonalMatrix, k: int | None = None) -> Eigh:
    values, Q = eigh(DenseMatrix(A.blocks))
    pairs = Eigh(values.flatten(-2, -1), BlockDiagonalMatrix(Q.dense()))
    return pairs if k is None else largest(pairs, k)


@svd.register
def _(A: BlockDiagonalMatrix) -> Svd:
    U, values, Vh = torch.linalg.svd(A.blocks, full_matrices=False)
    return Svd(BlockDiagonalMatrix(U), values.flatten(-2, -1), BlockDiagonalMatrix(Vh.mH))


@svdvals.register
def _(A: BlockDiagonalMatrix) -> Float[Tensor, "*batch d"]:
    return descending(torch.linalg.svdvals(A.blocks).flatten(-2, -1), A)


@norm.register(where=is_frobenius)
def _(A: BlockDiagonalMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return vector_norm(A.blocks, (-3, -2, -1))


@norm.register(where=lambda A, order=None: order is not None)
def _(A: BlockDiagonalMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return schatten(norm(DenseMatrix(A.blocks), order), order)


@power.register(where=_square)
def _(A: BlockDiagonalMatrix, p: float) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(power(DenseMatrix(A.blocks), p).dense())


@exp.register(where=_square)
def _(A: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(torch.linalg.matrix_exp(A.blocks))


@cholesky.register(where=_square)
def _(A: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
    return BlockDiagonalMatrix(cholesky(DenseMatrix(A.blocks)).dense())


@project.register
def _(recipe: BlockDiagonal, W: Inexact[Tensor, "*batch m n"]) -> BlockDiagonalMatrix:
    c, p, q = recipe._shape(*W.shape[-2:])
    grid = W.unflatten(-2, (c, p)).unflatten(-1, (c, q))
    return BlockDiagonalMatrix(torch.diagonal(grid, dim1=-4, dim2=-2).movedim(-1, -3).clone())
