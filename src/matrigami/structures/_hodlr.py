"""HODLR: hierarchically off-diagonal low rank, the format of one-dimensional kernels.

The matrix is halved again and again; the two off-diagonal blocks of every halving have low rank,
and the `2^L` diagonal blocks that remain are dense: `A_ab = left_a right_b.T` for siblings `a, b`.
All blocks of one level have one size, so that a level is one batched product.

Storage and cost per vector: `n p + 2 r n L` for leaves of `p` rows. `solve` and `slogdet` take
`O(n r^2 L^2)`: level by level from the leaves upwards, a capacitance matrix of `2r` rows joins two
siblings (Sherman, Morrison and Woodbury); a step of refinement follows. Projection: the SVD of each
off-diagonal block, the best approximation for the given ranks; with a tolerance, singular values of
all blocks compete by what they are worth for each stored number. Source: Ambikasaran and Darve
(2013), J. Sci. Comput. 57; Ambikasaran et al. (2016), IEEE TPAMI 38(2), for determinants.

Shapes: c = leaves of p x q, s = blocks of a level, of m x n, r = rank, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DiagonalMatrix,
    Fan,
    LinearOperator,
    Structure,
    add,
    composed,
    contraction,
    contractions,
    cropped,
    diagonal,
    example,
    fans,
    is_big,
    norm,
    project,
    resolve_rank,
    root_of_squares,
    scale,
    truncated_svd,
)
from matrigami.structures._hodlr_factors import siblings

__all__ = ["HODLR", "HODLRMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class HODLRMatrix(LinearOperator):
    """Dense leaves, and for each level, the coarsest first, the factors of its blocks.

    Args:
        leaves: The diagonal blocks.
        left: The block in the rows of `a` and the columns of its sibling `b` is `left_a right_b.T`.
        right: By the columns of the block.

    Examples:
        >>> ones = torch.ones(2, 1, 1)
        >>> HODLRMatrix(ones, (ones,), (3 * ones,)).dense()
        tensor([[1., 3.],
                [3., 1.]])
    """

    leaves: Inexact[Tensor, "*batch c p q"]
    left: tuple[Inexact[Tensor, "*batch _ _ _"], ...] = ()
    right: tuple[Inexact[Tensor, "*batch _ _ _"], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(*[F.shape[:-3] for F in (self.leaves, *self.left)])
        c, p, q = self.leaves.shape[-3:]
        return (*batch, c * p, c * q)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """One batched product for the leaves, two for each level."""
        c, _, q = self.leaves.shape[-3:]
        Y = (self.leaves @ X.unflatten(-2, (c, q))).flatten(-3, -2)
        for U, V in zip(self.left, self.right, strict=True):
            W = V.mT @ X.unflatten(-2, V.shape[-3:-1])
            Y = Y + (U @ siblings(W)).flatten(-3, -2)
        return Y

    @property
    def T(self) -> "HODLRMatrix":
        """The transposed leaves; left and right change places."""
        return HODLRMatrix(self.leaves.mT, self.right, self.left)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


@example("hodlr", leaf=4, rank=1)
@dataclass(frozen=True)
class HODLR(Structure):
    """HODLR matrices; a size that the halvings do not divide is padded.

    Exactly one of `rank` and `tol` is given; only with `rank` members can be drawn.

    Args:
        leaf: Most rows or columns (the fewer of the two) of a leaf.
        rank: The rank of every off-diagonal block, an int or a fraction of a leaf.
        tol: Relative error of the whole matrix in the Frobenius norm: with the fewest numbers, but
            for padding to the largest rank of a level.

    Examples:
        >>> HODLR(leaf=4, rank=1).init(16, 16)
        HODLRMatrix(16x16, 128 parameters)
    """

    leaf: int
    rank: float | None = None
    tol: float | None = None

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If no rank is given, or it does not fit.
        """
        levels, p, q = self._sizes(m, n)
        if self.rank is None:
            raise ValueError(
                f"{self} cannot be drawn as {m}x{n}: the ranks follow from a matrix.\n"
                "Use project(recipe, W), or give a rank."
            )
        r = resolve_rank(self.rank, min(p, q), str(self)) if levels else 0
        c = 2**levels
        blocks = [2 ** (level + 1) for level in range(levels)]
        left = tuple([empty(s, c * p // s, r) for s in blocks])
        right = tuple([empty(s, c * q // s, r) for s in blocks])
        return cropped(HODLRMatrix(empty(c, p, q), left, right), m, n)

    def _sizes(self, m: int, n: int) -> tuple[int, int, int]:
        """Levels, rows and columns of a leaf.

        Raises:
            ValueError: If the leaf is empty, or not exactly one of rank and tol is given.
        """
        if self.leaf < 1 or (self.rank is None) == (self.tol is None):
            raise ValueError(
                f"{self}: a leaf has {self.leaf} rows, rank is {self.rank} and tol {self.tol}.\n"
                "Give a leaf of at least 1, and either rank or tol."
            )
        levels = max(math.ceil(math.log2(min(m, n) / self.leaf)), 0)
        return levels, math.ceil(m / 2**levels), math.ceil(n / 2**levels)


@fans.register
def _(A: HODLRMatrix) -> tuple[Fan, ...]:
    leaf = Fan(A.leaves.shape[-1], A.leaves.shape[-2], last=True)
    left = [Fan(U.shape[-1], U.shape[-2], last=True) for U in A.left]
    return (leaf, *left, *[Fan(V.shape[-2], V.shape[-1]) for V in A.right])


@contractions.register
def _(A: HODLRMatrix) -> tuple[Contraction, ...]:
    c, p, q = A.leaves.shape[-3:]
    leaves = contraction(A.leaves, "c p q", "c q", "c p", c=c, p=p, q=q)
    swap = torch.eye(2, dtype=A.dtype, device=A.device).flip(0)
    left, right = [], []
    for U, V in zip(A.left, A.right, strict=True):
        sizes = {"a": U.shape[-3] // 2, "b": 2, "d": 2, "r": U.shape[-1]}
        first = contraction(V, "(a b) n r", "a b n", "a b r", n=V.shape[-2], **sizes)
        middle = contraction(swap, "d b", "a b r", "a d r", **sizes)
        last = contraction(U, "(a d) m r", "a d r", "a d m", m=U.shape[-2], **sizes)
        left.append(composed(Contraction(last), before=middle @ first))
        right.append(composed(Contraction(first), after=last @ middle))
    return (Contraction(leaves), *left, *right)


@add.register(where=lambda A, B: A.leaves.shape[-3:] == B.leaves.shape[-3:])
def _(A: HODLRMatrix, B: HODLRMatrix) -> HODLRMatrix:
    """The ranks add up, block by block."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])

    def beside(F: tuple[Tensor, ...], G: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The factors of two sums."""
        pairs = zip(F, G, strict=True)
        return tuple([torch.cat([t.expand(*batch, *t.shape[-3:]) for t in p], -1) for p in pairs])

    return HODLRMatrix(A.leaves + B.leaves, beside(A.left, B.left), beside(A.right, B.right))


@add.register(where=lambda A, B: A.leaves.shape[-1] == A.leaves.shape[-2])
def _(A: HODLRMatrix, B: DiagonalMatrix) -> LinearOperator:
    """The diagonal goes into the leaves."""
    d = B.diagonal.unflatten(-1, A.leaves.shape[-3:-1])
    return HODLRMatrix(A.leaves + torch.diag_embed(d), A.left, A.right)


@add.register
def _(A: DiagonalMatrix, B: HODLRMatrix) -> LinearOperator:
    return add(B, A)


@scale.register
def _(A: HODLRMatrix, factor: Tensor) -> HODLRMatrix:
    factor = factor[..., None, None, None]
    return HODLRMatrix(A.leaves * factor, tuple([U * factor for U in A.left]), A.right)


@diagonal.register(where=lambda A: A.leaves.shape[-1] == A.leaves.shape[-2])
def _(A: HODLRMatrix) -> Inexact[Tensor, "*batch d"]:
    return torch.diagonal(A.leaves, dim1=-2, dim2=-1).flatten(-2, -1)


@norm.register(where=is_big)
def _(A: HODLRMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    squares = A.leaves.abs().square().sum((-3, -2, -1))
    for U, V in zip(A.left, A.right, strict=True):
        squares = squares + ((U.mH @ U) * siblings(V.mH @ V)).sum((-3, -2, -1)).real
    return root_of_squares(squares)


@project.register
def _(recipe: HODLR, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    levels, p, q = recipe._sizes(m, n)
    c = 2**levels
    D = torch.nn.functional.pad(W, (0, c * q - n, 0, c * p - m))
    grid = D.unflatten(-2, (c, p)).unflatten(-1, (c, q))
    leaves = torch.diagonal(grid, dim1=-4, dim2=-2).movedim(-1, -3).clone()
    blocks = [_off_diagonal(D, 2 ** (level + 1)) for level in range(levels)]
    if recipe.rank is not None:
        r = resolve_rank(recipe.rank, min(p, q), str(recipe)) if levels else 0
        factors = [truncated_svd(block, r) for block in blocks]
    else:
        error = (recipe.tol or 0.0) * torch.linalg.matrix_norm(W.detach())
        factors = levels_worth_most(blocks, error, [sum(B.shape[-2:]) for B in blocks])
    left = tuple([U for U, _ in factors])
    right = tuple([siblings(Vh.mT) for _, Vh in factors])
    return cropped(HODLRMatrix(leaves, left, right), m, n)


def _off_diagonal(D: Inexact[Tensor, "*batch m n"], s: int) -> Inexact[Tensor, "*batch s a b"]:
    """The blocks of one level, in the order of their rows."""
    grid = D.unflatten(-2, (s, -1)).unflatten(-1, (s, -1)).transpose(-3, -2)
    row = torch.arange(s, device=D.device)
    return grid[..., row, row ^ 1, :, :]


def levels_worth_most(
    blocks: list[Tensor], error: Tensor, prices: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Factors by the singular values that are worth most for each stored number (greedy).

    Args:
        blocks: Those of each level, or their cores between orthonormal bases.
        error: The Frobenius norm of what may be left out.
        prices: The numbers that a singular value of each level takes.
    """
    spectra = [torch.linalg.svdvals(B.detach()).square() for B in blocks]
    spectra = [e.flatten(0, -3).sum(0) if e.ndim > 2 else e for e in spectra]  # s r
    if not spectra:
        return []
    worth = [e / price for e, price in zip(spectra, prices, strict=True)]
    flat, order = torch.cat([w.flatten() for w in worth]).sort(descending=True, stable=True)
    energy = torch.cat([e.flatten() for e in spectra])[order]
    tails = energy.flip(0).cumsum(0).flip(0)
    count = int((tails > error.square().sum()).sum())
    least = flat[count - 1] if count else torch.inf
    factors = []
    for B, w in zip(blocks, worth, strict=True):
        kept = w >= least
        rank = max(int(kept.sum(-1).max()), 1)
        U, Vh = truncated_svd(B, rank)
        factors.append((U * kept[:, None, :rank], Vh))
    return factors
