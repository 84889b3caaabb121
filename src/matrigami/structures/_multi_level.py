"""Multi-level low rank (MLR): a sum of block-diagonal matrices of low-rank blocks, coarse to fine.

`A = sum_l blockdiag_b(left_lb right_lb.T)`: level `l` has `2^l` equal blocks of rank `r_l`. One
level is low rank; far pairs of rows and columns see the coarse levels only, near ones all of them.
As the score of an attention layer it spends most of the head on near pairs (Kuang et al. 2025,
arXiv:2509.07963).

Storage and cost per vector: `(m + n) sum_l r_l`. Off-diagonal blocks have low rank, so that `solve`
and `slogdet` of a large square one are those of HODLR. Projection: level by level the SVDs of what
the other levels leave, then a step of subspace iteration from the last factors, again and again;
the error never grows (block coordinate descent, quasi-best). Then all levels at once: with three
levels and more the valley is flat, and sweeps crawl. Small ones go by Newton's method to the
minimum, others by L-BFGS.
Source: Parshakova, Hastie, Darve and Boyd (2023), arXiv:2310.19214.

Shapes: p = blocks of a level, i x j = size of a block, r = rank, m = rows, n = columns, k =
right-hand sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Fan,
    LinearOperator,
    Metric,
    Structure,
    Target,
    add,
    alternate,
    contraction,
    contractions,
    cropped,
    diagonal,
    diagonal_by_entries,
    entries,
    example,
    fans,
    is_big,
    named_tensors,
    newton_fit,
    norm,
    padded_size,
    project,
    resolve_rank,
    root_of_squares,
    scale,
    slogdet,
    solve,
    stacked,
    truncated_svd,
)
from matrigami.structures._hodlr import HODLRMatrix

__all__ = ["MultiLevelLowRank", "MultiLevelLowRankMatrix", "as_hodlr"]

SWEEPS = 200
"""Most sweeps over the levels of a projection."""

STALLED = 1e-3
"""Relative decrease of the error at which they end: all levels together gain more."""

FEW = 300
"""Stored numbers up to which all levels together go by Newton's method, else by L-BFGS."""

TOGETHER = 100
"""Most steps of L-BFGS."""

FLAT = 1e-4
"""Relative decrease of the squared error in five of them at which they end."""


@dataclass(frozen=True, eq=False, repr=False)
class MultiLevelLowRankMatrix(LinearOperator):
    """The sum over levels of `blockdiag(left_b right_b.T)`.

    Examples:
        >>> one, two = torch.ones(1, 2, 1), torch.ones(2, 1, 1)
        >>> MultiLevelLowRankMatrix((one, two), (one, two)).dense()
        tensor([[2., 1.],
                [1., 2.]])
    """

    left: tuple[Inexact[Tensor, "*batch _ _ _"], ...]
    right: tuple[Inexact[Tensor, "*batch _ _ _"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(*[F.shape[:-3] for F in (*self.left, *self.right)])
        (p, i), j = self.left[0].shape[-3:-1], self.right[0].shape[-2]
        return (*batch, p * i, p * j)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Two batched products for each level."""
        terms = [
            (U @ (V.mT @ X.unflatten(-2, V.shape[-3:-1]))).flatten(-3, -2)
            for U, V in zip(self.left, self.right, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    @property
    def T(self) -> "MultiLevelLowRankMatrix":
        """Left and right change places."""
        return MultiLevelLowRankMatrix(self.right, self.left)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


@example("mlr", ranks=(1, 1))
@dataclass(frozen=True)
class MultiLevelLowRank(Structure):
    """Sums of block-diagonal matrices of low rank; sizes that `2^l` does not divide are padded.

    Args:
        ranks: Of the blocks of each level; level `l` has `2^l` of them.

    Examples:
        >>> MultiLevelLowRank(ranks=(2, 1)).init(8, 8)
        MultiLevelLowRankMatrix(8x8, 48 parameters)
    """

    exact_projection: ClassVar[bool] = False

    ranks: Sequence[int] = (1, 1)

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If there is no level, or a rank exceeds the size of a block of its level.
        """
        M, N = self._sizes(m, n)
        left = [empty(2**k, M >> k, r) for k, r in enumerate(self.ranks)]
        right = [empty(2**k, N >> k, r) for k, r in enumerate(self.ranks)]
        return cropped(MultiLevelLowRankMatrix(tuple(left), tuple(right)), m, n)

    def _sizes(self, m: int, n: int) -> tuple[int, int]:
        """The padded size."""
        if not self.ranks:
            raise ValueError(f"{self} has no level.\nGive one rank for each, coarse to fine.")
        finest = 2 ** (len(self.ranks) - 1)
        M, N = padded_size(m, finest), padded_size(n, finest)
        for k, r in enumerate(self.ranks):
            resolve_rank(int(r), min(M, N) >> k, f"{self}, level {k},")
        return M, N


def _blocks(D: Inexact[Tensor, "*batch m n"], p: int) -> Inexact[Tensor, "*batch p i j"]:
    """The diagonal blocks."""
    grid = D.unflatten(-2, (p, -1)).unflatten(-1, (p, -1))
    return torch.diagonal(grid, dim1=-4, dim2=-2).movedim(-1, -3)


def as_hodlr(A: MultiLevelLowRankMatrix) -> HODLRMatrix:
    """The same matrix with dense leaves: a block beside the diagonal has the coarser ranks.

    Examples:
        >>> A = MultiLevelLowRank(ranks=(2, 1)).init(8, 8)
        >>> H = as_hodlr(A)
        >>> torch.allclose(H.dense(), A.dense(), atol=1e-6), H.left[0].shape
        (True, torch.Size([2, 4, 2]))
    """
    left, right = (_gathered(side) for side in (A.left, A.right))
    leaves = left[-1] @ right[-1].mT
    above = tuple([_halved(U) for U in left[:-1]])
    return HODLRMatrix(leaves, above, tuple([_halved(V) for V in right[:-1]]))


def _gathered(side: tuple[Tensor, ...]) -> list[Tensor]:
    """For each level the factors of all levels down to it, cut into its blocks."""
    found = [side[0]]
    for F in side[1:]:
        coarse = _halved(found[-1])
        batch = torch.broadcast_shapes(F.shape[:-3], coarse.shape[:-3])
        found.append(torch.cat([t.expand(*batch, *t.shape[-3:]) for t in (coarse, F)], -1))
    return found


def _halved(F: Inexact[Tensor, "*batch p i r"]) -> Inexact[Tensor, "*batch q j r"]:
    """Each block as two, one below the other."""
    return F.unflatten(-2, (2, -1)).flatten(-4, -3)


@fans.register
def _(A: MultiLevelLowRankMatrix) -> tuple[Fan, ...]:
    left = [Fan(U.shape[-1], U.shape[-2], last=True) for U in A.left]
    return (*left, *[Fan(V.shape[-2], V.shape[-1]) for V in A.right])


@contractions.register
def _(A: MultiLevelLowRankMatrix) -> tuple[Contraction, ...]:
    left, right = [], []
    for U, V in zip(A.left, A.right, strict=True):
        sizes = {"p": U.shape[-3], "r": U.shape[-1]}
        first = contraction(V, "p j r", "p j", "p r", j=V.shape[-2], **sizes)
        last = contraction(U, "p i r", "p r", "p i", i=U.shape[-2], **sizes)
        left.append(Contraction(last, first))
        right.append(Contraction(first, None, last))
    return (*left, *right)


def _alike(A: MultiLevelLowRankMatrix, B: MultiLevelLowRankMatrix) -> bool:
    """Whether two matrices have the same levels, so that their ranks add up."""
    sizes = [[F.shape[-3:-1] for F in (*M.left, *M.right)] for M in (A, B)]
    return sizes[0] == sizes[1]


@add.register(where=_alike)
def _(A: MultiLevelLowRankMatrix, B: MultiLevelLowRankMatrix) -> MultiLevelLowRankMatrix:
    """The ranks add up, level by level."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])

    def beside(F: tuple[Tensor, ...], G: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The factors of two sums."""
        pairs = zip(F, G, strict=True)
        return tuple([torch.cat([t.expand(*batch, *t.shape[-3:]) for t in p], -1) for p in pairs])

    return MultiLevelLowRankMatrix(beside(A.left, B.left), beside(A.right, B.right))


@scale.register
def _(A: MultiLevelLowRankMatrix, factor: Tensor) -> MultiLevelLowRankMatrix:
    factor = factor[..., None, None, None]
    return MultiLevelLowRankMatrix(tuple([U * factor for U in A.left]), A.right)


def _large_square(A: MultiLevelLowRankMatrix, *_: Any) -> bool:
    """Whether the halvings pay: a small matrix is solved faster, and more safely, as it is."""
    return is_big(A) and A.shape[-1] == A.shape[-2]


@solve.register(where=_large_square)
def _(A: MultiLevelLowRankMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve(as_hodlr(A), B)


@slogdet.register(where=_large_square)
def _(
    A: MultiLevelLowRankMatrix,
) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return slogdet(as_hodlr(A))


@entries.register
def _(A: MultiLevelLowRankMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """A sum over the levels that have both in one block."""
    found = []
    for U, V in zip(A.left, A.right, strict=True):
        i, j = U.shape[-2], V.shape[-2]
        b, c = rows // i, columns // j
        terms = (U[..., b, rows % i, :] * V[..., c, columns % j, :]).sum(-1)
        found.append(terms * (b == c))
    return sum(found[1:], start=found[0])


@diagonal.register
def _(A: MultiLevelLowRankMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal_by_entries(A)


@norm.register(where=is_big)
def _(A: MultiLevelLowRankMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """By Gram matrices of all levels down to each, on its blocks."""
    pairs = list(zip(_gathered(A.left), _gathered(A.right), strict=True))
    squares = _square(*pairs[0])
    for (U, V), (P, Q) in pairwise(pairs):  # what a level adds to the squares on its blocks
        squares = squares + _square(P, Q) - _square(_halved(U), _halved(V))
    return root_of_squares(squares)


def _square(U: Tensor, V: Tensor) -> Float[Tensor, "*batch"]:
    """The squared norm of all blocks `U V.T` of a level."""
    return ((U.mH @ U) * (V.mH @ V).conj()).sum((-3, -2, -1)).real


@project.register
@torch.no_grad()
def _(recipe: MultiLevelLowRank, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    recipe._sizes(m, n)
    double = W.to(torch.promote_types(W.dtype, torch.float64))
    found = [_nearest(recipe, D) for D in double.reshape(-1, m, n)]
    return stacked(found, tuple(W.shape[:-2])).to(W.dtype)


def _nearest(recipe: MultiLevelLowRank, W: Inexact[Tensor, "m n"]) -> LinearOperator:
    """By sweeps over the levels, then in all levels at once."""
    (m, n), (M, N) = W.shape, recipe._sizes(*W.shape)
    A = cropped(_swept(recipe.ranks, torch.nn.functional.pad(W, (0, N - n, 0, M - m))), m, n)
    if len(recipe.ranks) == 1:
        return A
    if sum(t.numel() for t in named_tensors(A).values()) <= FEW:
        return newton_fit(A, W)
    return alternate(A, Target(W, Metric()), tol=FLAT, steps=TOGETHER)


def _swept(ranks: Sequence[int], W: Inexact[Tensor, "m n"]) -> MultiLevelLowRankMatrix:
    """Each level in turn follows what the others leave."""
    terms = [torch.zeros_like(W) for _ in ranks]
    rest, error = W, math.inf
    factors: list[tuple[Tensor, Tensor] | None] = [None for _ in ranks]
    for _ in range(SWEEPS):
        for k, r in enumerate(ranks):
            rest = rest + terms[k]
            factors[k] = U, V = _leading(_blocks(rest, 2**k), int(r), factors[k])
            terms[k] = MultiLevelLowRankMatrix((U,), (V,)).dense()
            rest = rest - terms[k]
        last, error = error, float(torch.linalg.vector_norm(rest))
        if len(ranks) == 1 or last - error <= STALLED * error:
            break
    left, right = zip(*factors, strict=True)  # pyright: ignore[reportArgumentType]
    return MultiLevelLowRankMatrix(left, right)


def _leading(
    D: Inexact[Tensor, "p i j"], rank: int, last: tuple[Tensor, Tensor] | None
) -> tuple[Inexact[Tensor, "p i r"], Inexact[Tensor, "p j r"]]:
    """Factors of low rank near the blocks: the best, or those that the last ones lead to.

    A step of subspace iteration costs `4 i j r` where an SVD costs `i j^2` several times over.
    """
    if last is None:
        U, Vh = truncated_svd(D, rank)
    else:
        U = torch.linalg.qr(D @ last[1].conj()).Q
        Vh = U.mH @ D
    return U, Vh.mT
