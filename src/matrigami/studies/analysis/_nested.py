"""H2 and HSS matrices: blocks of all levels share the nested bases of their clusters.

Bottom up: the basis of a leaf spans, to a tolerance, all its rows in admissible blocks of its
level and above; that of a parent spans the same in terms of its children's coefficients. Storage:
the bases of the leaves, the transfers between levels, a coupling matrix for each block, the near
field. Quasi-best: the error is within about the square root of the number of levels of the best.
Source: Hackbusch and Boerm (2002), Computing 69.

Shapes: c = clusters of a level, p = their coefficients, k = rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matrigami.studies.analysis._curves import Curve, lowest

TOLERANCES = (0.5, 0.2, 0.06, 0.02, 3e-3, 1e-5)
"""Singular values below this share of the norm over the root of the leaves are left out."""

MOST = 0.5
"""Storage beyond which no smaller tolerance is tried."""


@dataclass(frozen=True)
class NestedBlocks:
    """Which pairs of clusters are coupled at which level.

    Args:
        size: Rows and columns.
        far: For each level the pairs whose block is coupled there, the coarsest level first.
        near: The pairs of leaves that are stored as they are.
    """

    size: tuple[int, int]
    far: tuple[Bool[Tensor, "_ _"], ...]
    near: Bool[Tensor, "_ _"]


def nested_blocks(m: int, n: int, admissible: Sequence[Bool[Tensor, "_ _"]]) -> NestedBlocks:
    """The largest admissible blocks."""
    open_, far = torch.ones(1, 1, dtype=torch.bool), []
    for mask in admissible:
        open_ = open_.repeat_interleave(2, 0).repeat_interleave(2, 1)
        far.append(open_ & mask)
        open_ = open_ & ~mask
    return NestedBlocks((m, n), tuple(far), open_)


def nested_curve(A: Float[Tensor, "m n"], blocks: NestedBlocks) -> Curve:
    """Error and storage for each of the tolerances, as far as they store less than `MOST`."""
    points = []
    for tol in TOLERANCES:
        compressed = _Compressed(A, blocks, tol)
        points.append((compressed.storage, compressed.error()))
        if compressed.storage > MOST:
            break
    return lowest([Curve(A.new_tensor([s]), A.new_tensor([e])) for s, e in points])


def nested_member(
    A: Float[Tensor, "m n"], blocks: NestedBlocks, storage: float
) -> Float[Tensor, "m n"]:
    """The best of those with at most this storage."""
    best = torch.zeros_like(A)
    for tol in TOLERANCES:
        compressed = _Compressed(A, blocks, tol)
        if compressed.storage > storage * (1 + 1e-6):
            break
        best = compressed.dense()
    return best


class _Level(NamedTuple):
    """One level of bases: transfers from the level below, and ranks."""

    transfers: Float[Tensor, "_ _ _"]
    ranks: Int[Tensor, " _"]


class _Compressed:
    """A matrix with nested bases."""

    def __init__(self, A: Float[Tensor, "m n"], blocks: NestedBlocks, tol: float) -> None:
        leaves = len(blocks.near)
        p, q = -(-A.shape[0] // leaves), -(-A.shape[1] // leaves)
        self.A, self.blocks, self.leaf = A, blocks, (p, q)
        self.padded = torch.nn.functional.pad(
            A, (0, q * leaves - A.shape[1], 0, p * leaves - A.shape[0])
        )
        cut = tol * float(A.norm()) / leaves**0.5
        self.left, numbers = _bases(self.padded, blocks.far, p, cut)
        self.right, others = _bases(self.padded.mT, [f.mT for f in blocks.far], q, cut)
        numbers += others + float(blocks.near.sum()) * p * q
        for mask, U, V in zip(blocks.far, self.left, self.right, strict=True):
            numbers += float((U.ranks[:, None] * V.ranks * mask).sum())
        self.storage = numbers / A.numel()

    def couplings(self) -> list[Float[Tensor, "_ _ _ _"]]:
        """For each level, the coarsest first, the coefficients of all pairs of clusters."""
        S, found = self.padded, []
        for U, V in zip(reversed(self.left), reversed(self.right), strict=True):
            (c, p, _), (d, q, _) = U.transfers.shape, V.transfers.shape
            half = torch.einsum("cpk,cpx->ckx", U.transfers, S.reshape(c, p, d * q))
            half = half.reshape(-1, d, q).transpose(0, 1) @ V.transfers  # d (c k) l
            S = half.transpose(0, 1).unflatten(0, (c, -1))  # c k d l
            found.insert(0, S)
        return found

    def error(self) -> float:
        """The relative error: what the couplings lack of the energy of their blocks."""
        total = float(self.A.square().sum())
        near = _spread(self.blocks.near, *self.leaf)
        kept = float((self.padded.square() * near).sum())
        for mask, S in zip(self.blocks.far, self.couplings(), strict=True):
            kept += float((S.square().sum((1, 3)) * mask).sum())
        return max(1 - kept / total, 0.0) ** 0.5 if total else 0.0

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself."""
        W = None
        for mask, S, U, V in zip(
            self.blocks.far, self.couplings(), self.left, self.right, strict=True
        ):
            own = S * mask[:, None, :, None]
            W = own if W is None else own + W.reshape(S.shape)
            c, k, d, l = W.shape
            half = torch.einsum("cpk,ckx->cpx", U.transfers, W.reshape(c, k, d * l))
            half = half.reshape(-1, d, l).transpose(0, 1) @ V.transfers.mT  # d (c p) q
            W = half.transpose(0, 1).reshape(c * U.transfers.shape[1], -1)
        near = _spread(self.blocks.near, *self.leaf)
        far = 0 if W is None else W.reshape(self.padded.shape)
        return (self.padded * near + far)[: self.A.shape[0], : self.A.shape[1]]


def _bases(
    A: Float[Tensor, "m n"], far: Sequence[Bool[Tensor, "_ _"]], p: int, cut: float
) -> tuple[list[_Level], float]:
    """The bases of each level, the coarsest first, and their numbers."""
    coefficients, size, numbers = A, p, 0.0
    levels: list[_Level] = []
    stored = A.new_full((A.shape[0] // p,), float(p))  # what one column of a basis stores
    for mask in reversed(_columns_needed(far, A.shape[1])):
        C = coefficients.unflatten(0, (len(mask), size))
        seen = C * mask[:, None, :]
        values, vectors = torch.linalg.eigh(seen @ seen.mT)
        kept = values > cut**2
        ranks = kept.sum(1)
        widest = max(int(ranks.max()), 1)
        T = (vectors * kept[:, None, :])[..., -widest:]  # columns of zeros: all have one size
        numbers += float((stored * ranks).sum())
        levels.insert(0, _Level(T, ranks))
        coefficients = (T.mT @ C).flatten(0, 1)
        stored, size = ranks.unflatten(0, (-1, 2)).sum(1).to(A), 2 * widest
    return levels, numbers


def _columns_needed(far: Sequence[Bool[Tensor, "_ _"]], columns: int) -> list[Bool[Tensor, "_ n"]]:
    """For each level and cluster the columns of its admissible blocks, at its level and above."""
    needed, above = [], None
    for mask in far:
        own = mask.repeat_interleave(columns // mask.shape[1], 1)
        above = own if above is None else own | above.repeat_interleave(2, 0)
        needed.append(above)
    return needed


def _spread(mask: Bool[Tensor, "_ _"], p: int, q: int) -> Bool[Tensor, "m n"]:
    """A mask of blocks as one of entries."""
    return mask.repeat_interleave(p, 0).repeat_interleave(q, 1)
