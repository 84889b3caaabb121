"""Hierarchical matrices from products with a matrix alone, or from its entries.

Of many points in the plane or in space H2 (`_nested_bases.py`), else HODLR. By products: peeling.
On each level, the coarsest first, random vectors that live in every second block show the ranges of
all blocks beside the diagonal at once, for what coarser levels add is known and taken away;
products of the transpose with those ranges give the other factors. The leaves come last, by the
columns of the identity repeated in every leaf. Sources: Lin, Lu and Ying (2011),
J. Comput. Phys. 230; Martinsson (2016), SIAM J. Sci. Comput. 38(4). By entries: cross approximation
of all blocks of a level in lockstep (Bebendorf 2000).

Shapes: n = rows = columns, d = dimension, c = leaves of p rows, s = blocks of a level, k = vectors,
r = rank.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.geometry._nested_bases import near_boxes, needed, sketched
from matrigami.geometry._ordered import Entries, Ordered, ordered
from matrigami.geometry.particles._cross import cross_factors
from matrigami.geometry.particles._points import Numbers
from matrigami.operators import LinearOperator
from matrigami.structures import H2Matrix, HODLRMatrix

LEAF = 64
"""Rows of a leaf at most: a dense block of that size is quicker than a level of low rank."""

START = 16
"""Random vectors of a level at first; twice as many where the ranks are not below them."""

OVERSAMPLED = 8
"""Vectors beyond the rank that is found."""

WORTH = 4
"""Rows, over those of a leaf and all boxes near it with some more, from which H2 is worth it."""


def hierarchical(
    A: LinearOperator | Entries,
    points: Numbers | None = None,
    *,
    tol: float | None = None,
    size: int | None = None,
    leaf: int = LEAF,
    seed: int = 0,
) -> LinearOperator:
    """A square matrix in blocks of low rank: a Hessian, a Schur complement, a covariance.

    On a line, or in the order as it is, neighbouring halves have low rank: HODLR, with a direct
    `solve` and `logdet`. In the plane and in space only boxes that are apart have: of many points
    H2, whose storage is linear, and `solve` by conjugate gradients. For tiles, with a direct
    `solve` in any dimension, see `block_low_rank`.

    Args:
        A: A square value, known by products with it and its transpose; or a function
            `(rows, columns) -> entries`. HODLR takes about `4 (r + 8)` products on each of
            `log2(n / leaf)` levels; H2 as many at any size, twice 1.25 times the rows of all boxes
            near one. Of entries H2 looks at all, some rows at a time.
        points: The place of each row, `(n, d)`, by which rows are ordered so that neighbours are
            together; by default they are in a good order already.
        tol: Relative error in the Frobenius norm, roughly; by default 1e-6, or a hundred roundings
            if that is more.
        size: Rows, where `A` is a function and there are no points.
        leaf: Rows of a leaf at most.
        seed: Of the random vectors.

    Returns:
        A `HODLRMatrix` or `H2Matrix`, cropped and permuted where needed; not differentiable in `A`.
        Of products it is measured before it is returned.

    Raises:
        ValueError: If `A` is not square or does not compress, or the error is missed.

    Examples:
        >>> x = torch.linspace(0, 1, 300, dtype=torch.float64)
        >>> A = hierarchical(lambda i, j: torch.exp(-(x[i] - x[j]).abs()), size=300)
        >>> A
        CroppedMatrix(300x300, 15200 parameters)
    """
    given = ordered("hierarchical", A, points, tol, size, leaf)
    with torch.no_grad():
        H = _nested(given, seed)
        if H is None and isinstance(A, LinearOperator):
            H = _peeled(given, seed)
        return given.delivered(_crossed(given) if H is None else H)


def _nested(A: Ordered, seed: int) -> H2Matrix | None:
    """H2, of so many points in the plane or in space that it is worth it."""
    X, (c, p) = A.points, A.leaves
    if X is None or X.shape[1] == 1 or not A.levels:
        return None
    nears = near_boxes(X, A.levels)
    if len(X) < WORTH * needed(nears[0], p, p):
        return None
    return sketched(A, nears, A.tol * A.norm(seed) / ((A.levels + 1) * c) ** 0.5, seed)


def _peeled(A: Ordered, seed: int) -> HODLRMatrix:
    """Level by level, the coarsest first; the leaves last."""
    (c, p), like, size = A.leaves, A.zero(), A.norm(seed)
    generator = torch.Generator(like.device).manual_seed(seed)
    known = HODLRMatrix(like.new_zeros(c, p, p))
    for level in range(A.levels):
        error = 0.5 * A.tol * size / (A.levels + 1) ** 0.5 / 2 ** ((level + 1) / 2)  # it spreads
        U, V = _level(A, known, 2 ** (level + 1), error, generator)
        known = HODLRMatrix(known.leaves, (*known.left, U), (*known.right, V))
    eye = torch.eye(p, dtype=like.dtype, device=like.device).repeat(c, 1)
    leaves = (A.times(eye) - known.matmat(eye)).unflatten(0, (c, p))
    return HODLRMatrix(leaves, known.left, known.right)


def _level(
    A: Ordered, known: HODLRMatrix, s: int, error: float, generator: torch.Generator
) -> tuple[Inexact[Tensor, "s m r"], Inexact[Tensor, "s m r"]]:
    """The factors of all blocks of a level, up to an absolute error of each.

    Raises:
        ValueError: If a block does not compress.
    """
    rows = known.shape[-1]
    m, k = rows // s, START
    while True:
        k = min(k, m)
        like = known.leaves
        G = torch.randn(s, m, k, generator=generator, dtype=like.dtype, device=like.device)
        Y = _sampled(A, known, G, transposed=False)
        U, values, _ = torch.linalg.svd(Y / k**0.5, full_matrices=False)
        tails = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
        rank = max(int((tails > error / 4).sum(-1).max()), 1)
        if rank + OVERSAMPLED <= k or k == m:
            break
        k *= 2
    if 2 * rank > m > 2 * known.leaves.shape[-1]:
        _refuse(A, m, rank)
    Q = U[..., :rank]
    B = _exchanged(
        _sampled(A, known, Q.conj(), transposed=True)
    )  # of the block in each row's place
    W, values, Zh = torch.linalg.svd(B.mT, full_matrices=False)  # r m
    tails = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    rank = max(int((tails > error / 2).sum(-1).max()), 1)
    roots = values[..., None, :rank].sqrt()
    left, right = Q @ (W[..., :rank] * roots), Zh[..., :rank, :].mT * roots
    return left, _exchanged(right)


def _exchanged(F: Inexact[Tensor, "s m k"]) -> Inexact[Tensor, "s m k"]:
    """What belongs to the sibling of each block."""
    return F.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _sampled(
    A: Ordered, known: HODLRMatrix, G: Inexact[Tensor, "s m k"], *, transposed: bool
) -> Inexact[Tensor, "s m k"]:
    """For each block row its block times the vectors of its sibling: two products."""
    s, found = len(G), torch.zeros_like(G)
    coarse = known.T if transposed else known
    for side in range(2):  # vectors in every second block
        only = torch.zeros_like(G)
        only[side::2] = G[side::2]
        X = only.flatten(0, 1)
        X[len(A.order) :] = 0
        Y = (A.times(X, transposed=transposed) - coarse.matmat(X)).unflatten(0, (s, -1))
        found[1 - side :: 2] = Y[1 - side :: 2]
    return found


def _refuse(A: Ordered, m: int, rank: int) -> None:
    """Say that a matrix does not compress."""
    raise ValueError(
        f"hierarchical({A.A!r}): a block of {m}x{m} beside the diagonal has rank {rank} at this "
        "tolerance.\nIn this order of the rows the matrix does not compress.\n"
        "Give points, or a larger tol; for a kernel in space use kernel_matrix."
    )


def _crossed(A: Ordered) -> HODLRMatrix:
    """Cross approximation on each level, of entries at places in the order of the tree."""
    c, p = A.leaves
    places = torch.arange(c * p, device=A.order.device, dtype=torch.float64)
    left, right = [], []
    for level in range(A.levels):
        blocks = places.reshape(2 ** (level + 1), -1, 1)
        C, R = cross_factors(A.finite, blocks, _exchanged(blocks), A.tol)
        left.append(C)
        right.append(_exchanged(R))
    grid = places.reshape(c, p, 1)
    return HODLRMatrix(A.entries(grid, grid), tuple(left), tuple(right))
