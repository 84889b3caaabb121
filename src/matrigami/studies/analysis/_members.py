"""Closed forms of members: by places, by means of diagonals, by alternation.

Shapes: m = rows, n = columns.
"""

import math

import torch
from torch import Tensor

SPARSE_UNITS = 2
"""Numbers that a nonzero costs."""

ALTERNATIONS = 4
"""Rounds of sparse plus low rank."""


def diagonals(A: Tensor) -> Tensor:
    """The distance of each entry from the diagonal that joins the corners."""
    m, n = A.shape
    i = torch.arange(m)[:, None] * n // max(m, 1)
    return (torch.arange(n) - i).abs()


def by_size(A: Tensor) -> Tensor:
    """The place of each entry among all, by size."""
    order = A.abs().flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank.reshape(A.shape)


def block_diagonals(A: Tensor) -> list[tuple[float, Tensor]]:
    """Block-diagonal matrices of 2, 4, ... equal blocks."""
    m, n = A.shape
    found = []
    for k in range(1, int(math.log2(max(min(m, n), 1))) + 1):
        blocks = 2**k
        i = torch.arange(m)[:, None] // -(-m // blocks)
        inside = i == torch.arange(n) // -(-n // blocks)
        found.append((float(inside.sum()), A * inside))
    return found


def toeplitz(A: Tensor) -> list[tuple[float, Tensor]]:
    """The means of the diagonals, and for a square matrix of the wrapped ones."""
    m, n = A.shape
    i, j = torch.arange(m)[:, None], torch.arange(n)
    found = [(m + n - 1.0, _means(A, j - i + m - 1))]
    if m == n:
        found.append((float(n), _means(A, (j - i) % n)))
    return found


def _means(A: Tensor, group: Tensor) -> Tensor:
    """Every entry replaced by the mean of its group."""
    group = group.expand(A.shape)
    count = torch.bincount(group.flatten()).clamp(1).to(A)
    total = torch.zeros_like(count).index_add(0, group.flatten(), A.flatten())
    return (total / count)[group]


def sparse_plus_low_rank(A: Tensor) -> list[tuple[float, Tensor]]:
    """Alternating: the best low rank of what is not sparse, the largest entries of the rest."""
    m, n = A.shape
    found = []
    for storage in (0.05, 0.1, 0.25):
        rank = int(storage * A.numel() / 2 // (m + n))
        count = int((storage * A.numel() - rank * (m + n)) // SPARSE_UNITS)
        if rank < 1 or count < 1:
            continue
        L, S = _alternated(A, rank, count)
        found.append((float(rank * (m + n) + SPARSE_UNITS * count), L + S))
    return found


def _alternated(A: Tensor, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """A matrix of this rank and one with so many entries whose sum is near."""
    L = _near_rank(A, rank)
    S = _largest(A - L, count)
    for _ in range(ALTERNATIONS - 1):
        L = _near_rank(A - S, rank)
        S = _largest(A - L, count)
    return L, S


def _largest(A: Tensor, count: int) -> Tensor:
    """The largest entries alone."""
    flat = A.flatten()
    places = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_put((places,), flat[places]).reshape(A.shape)


def _near_rank(A: Tensor, rank: int) -> Tensor:
    """Nearly the best approximation of a rank, by subspace iteration."""
    width = min(rank + 8, *A.shape)
    X = torch.randn(A.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    for _ in range(3):
        X = A.mT @ torch.linalg.qr(A @ X).Q
    Q = torch.linalg.qr(X).Q
    U, s, Vh = torch.linalg.svd(A @ Q, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank] @ Q.mT
