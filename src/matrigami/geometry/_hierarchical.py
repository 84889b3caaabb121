"""Hierarchical matrices from products with a matrix alone, or from its entries.

By products: peeling. On each level, the coarsest first, random vectors that live in every second
block show the ranges of all blocks beside the diagonal at once, for what coarser levels add is
known and taken away; products of the transpose with those ranges give the other factors. The leaves
come last, by the columns of the identity repeated in every leaf. Sources: Lin, Lu and Ying (2011),
J. Comput. Phys. 230; Martinsson (2016), SIAM J. Sci. Comput. 38(4). By entries: cross approximation
of all blocks of a level in lockstep (Bebendorf 2000).

Shapes: n = rows = columns, d = dimension, c = leaves of p rows, s = blocks of a level, k = vectors,
r = rank.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from matrigami.geometry.particles._cross import cross_factors
from matrigami.geometry.particles._points import Numbers, checked_points
from matrigami.operators import DenseMatrix, LinearOperator, Places, cropped, named_tensors
from matrigami.structures import HODLRMatrix, PermutedMatrix

LEAF = 64
"""Rows of a leaf at most: a dense block of that size is quicker than a level of low rank."""

START = 16
"""Random vectors of a level at first; twice as many where the ranks are not below them."""

OVERSAMPLED = 8
"""Vectors beyond the rank that is found."""

PROBES = 4
"""Random vectors that measure an error."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Indices of rows and of columns, which broadcast, to entries."""


def hierarchical(
    A: LinearOperator | Entries,
    points: Numbers | None = None,
    *,
    tol: float | None = None,
    size: int | None = None,
    leaf: int = LEAF,
    seed: int = 0,
) -> LinearOperator:
    """A square matrix as HODLR: a Hessian, a Schur complement, a covariance that only multiplies.

    The result has a direct `solve` and `logdet`. It is measured before it is returned.

    Args:
        A: A square value, known by products with it and its transpose: about `4 (r + 8)` of them on
            each of `log2(n / leaf)` levels; or a function `(rows, columns) -> entries`.
        points: The place of each row, `(n, d)`, by which rows are ordered so that neighbours are
            together; by default they are in a good order already.
        tol: Relative error in the Frobenius norm, roughly; by default 1e-6, or a hundred roundings
            if that is more.
        size: Rows, where `A` is a function and there are no points.
        leaf: Rows of a leaf at most.
        seed: Of the random vectors.

    Returns:
        A `HODLRMatrix`, cropped and permuted where needed; not differentiable in `A`.

    Raises:
        ValueError: If `A` is not square or does not compress, or the error is missed.

    Examples:
        >>> x = torch.linspace(0, 1, 300, dtype=torch.float64)
        >>> A = hierarchical(lambda i, j: torch.exp(-(x[i] - x[j]).abs()), size=300)
        >>> A
        CroppedMatrix(300x300, 15200 parameters)
    """
    if tol is None:
        tol = max(1e-6, 100 * torch.finfo(A.dtype).eps if isinstance(A, LinearOperator) else 0.0)
    _check_options(A, tol, size, leaf)
    order = _order(A, points, size, leaf)
    n = len(order)
    levels = max(math.ceil(math.log2(max(n, 1) / leaf)), 0)
    with torch.no_grad():
        if isinstance(A, LinearOperator):
            H = _peeled(_Reordered(A, order), levels, tol, seed)
        else:
            H = _crossed(A, order, levels, tol)
    _check_finite(H)
    found = cropped(H, n, n)
    if not bool((order[1:] > order[:-1]).all()):
        found = PermutedMatrix(found, Places(order.argsort()))
    if isinstance(A, LinearOperator):
        _check_error(A, found, tol)
    return found


def relative_error(
    A: LinearOperator, B: LinearOperator, *, probes: int = PROBES, seed: int = 0
) -> float:
    """`||A - B|| / ||A||` in the Frobenius norm, measured with random vectors.

    The mean of `||(A - B) x||^2` over Gaussian `x` is the squared norm (Hutchinson).

    Args:
        A: A matrix.
        B: An approximation of it.
        probes: Products with each.
        seed: Of the vectors.

    Examples:
        >>> from matrigami import DiagonalMatrix
        >>> relative_error(DiagonalMatrix(torch.ones(8)), DiagonalMatrix(1.1 * torch.ones(8)))
        0.1...
    """
    generator = torch.Generator(A.device).manual_seed(seed + 1)
    X = torch.randn(A.shape[-1], probes, generator=generator, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        Y = A @ X
        return float((Y - B @ X).norm() / Y.norm().clamp(min=torch.finfo(A.dtype).tiny))


def _check_options(A: Any, tol: float, size: int | None, leaf: int) -> None:
    """Refuse what is no matrix, and numbers out of range."""
    if isinstance(A, Tensor) or not (isinstance(A, LinearOperator) or callable(A)):
        raise TypeError(
            f"hierarchical(A): A is a {type(A).__name__}; it must be a value or a function.\n"
            "Wrap a matrix of numbers: DenseMatrix(A)."
        )
    if not (0 < tol < 1 and leaf >= 1 and (size is None or size >= 0)):
        raise ValueError(
            f"hierarchical(A, tol={tol:g}, size={size}, leaf={leaf}): a number is out of range.\n"
            "tol is above 0 and below 1, a leaf has 1 row or more, and size is not negative."
        )
    if isinstance(A, LinearOperator) and tol < 10 * torch.finfo(A.dtype).eps:
        least = 10 * torch.finfo(A.dtype).eps
        raise ValueError(
            f"hierarchical(A, tol={tol:g}): A is in {A.dtype}.\n"
            f"A relative error is at least {least:.0e}, ten roundings.\n"
            "Use double precision for smaller ones: A.to(torch.float64)."
        )


def _check_finite(A: LinearOperator) -> None:
    """Refuse NaN, which ends up in the leaves."""
    if not all(bool(t.isfinite().all()) for t in named_tensors(A).values()):
        raise ValueError(
            "hierarchical(A): its entries, or its products, are not finite.\n"
            "A matrix with NaN or infinite entries cannot be compressed."
        )


def _check_error(A: LinearOperator, found: LinearOperator, tol: float) -> None:
    """Refuse what missed its tolerance."""
    miss = relative_error(A, found)
    if not miss <= 10 * tol:
        raise ValueError(
            f"hierarchical({A!r}, tol={tol:g}): the error is {miss:.1e}.\n"
            "Products with A are less accurate than that, or A.T is not its transpose.\n"
            "Use a larger tol."
        )


def _order(
    A: LinearOperator | Entries, points: Numbers | None, size: int | None, leaf: int
) -> Int[Tensor, " n"]:
    """The rows in their order.

    Raises:
        ValueError: If their number is not known, or differs.
    """
    n = A.shape[-1] if isinstance(A, LinearOperator) else size
    X = None if points is None else checked_points("points", points)
    n = n if X is None or n is not None else len(X)
    if n is None or (X is not None and len(X) != n):
        raise ValueError(
            f"hierarchical(A, points): A has {n} rows, and there are "
            f"{'no' if X is None else len(X)} points.\n"
            "Give a point for each row, or size= where A is a function."
        )
    if isinstance(A, LinearOperator) and A.shape != (n, n):
        raise ValueError(
            f"hierarchical(A): A is {A!r}; it must be a single square matrix.\n"
            "A stack is compressed matrix by matrix."
        )
    if X is None:
        return torch.arange(n, device=A.device if isinstance(A, LinearOperator) else None)
    return bisected(X.detach(), max(math.ceil(math.log2(max(n, 1) / leaf)), 0))


def bisected(X: Float[Tensor, "n d"], levels: int) -> Int[Tensor, " n"]:
    """The order of a balanced tree: halves across the longest side, all nodes of a level at once.

    The last leaf is not full where the number of points is no multiple of that of the leaves.
    """
    n, c = len(X), 2**levels
    surplus = -n % c
    order = torch.arange(n + surplus, device=X.device)  # from n on: nobody
    for level in range(levels):
        nodes = order.reshape(2**level, -1)
        there = (nodes < n)[..., None]
        P = X[nodes.clamp(max=n - 1)]  # s m d
        low = torch.where(there, P, torch.inf).amin(1)
        high = torch.where(there, P, -torch.inf).amax(1)
        axis = (high - low).argmax(-1)[:, None, None].expand(-1, P.shape[1], 1)
        keys = torch.where(there, P.gather(-1, axis), torch.inf)[..., 0]
        order = nodes.gather(1, keys.argsort(dim=1, stable=True)).flatten()
    return order[order < n]


class _Reordered:
    """Products in another order of the rows, padded by rows of zeros."""

    def __init__(self, A: LinearOperator, order: Int[Tensor, " n"]) -> None:
        self.A, self.order = A, order

    def times(self, X: Tensor, *, transposed: bool = False) -> Tensor:
        """`A X`, or `A.T X`."""
        n = len(self.order)
        Z = torch.zeros_like(X[:n]).index_copy(0, self.order, X[:n])
        Y = (self.A.T if transposed else self.A).matmat(Z)[self.order]
        return torch.nn.functional.pad(Y, (0, 0, 0, len(X) - n))


def _peeled(A: _Reordered, levels: int, tol: float, seed: int) -> HODLRMatrix:
    """Level by level, the coarsest first; the leaves last."""
    n, c = len(A.order), 2**levels
    p = math.ceil(n / c)
    generator = torch.Generator(A.A.device).manual_seed(seed)
    like = torch.zeros((), dtype=A.A.dtype, device=A.A.device)
    size = _norm(A, n, c * p, generator, like)
    known = HODLRMatrix(like.new_zeros(c, p, p))
    if not math.isfinite(size):
        return HODLRMatrix(known.leaves + size)
    for level in range(levels):
        error = 0.5 * tol * size / (levels + 1) ** 0.5 / 2 ** ((level + 1) / 2)  # half: it spreads
        U, V = _level(A, known, 2 ** (level + 1), error, generator)
        known = HODLRMatrix(known.leaves, (*known.left, U), (*known.right, V))
    eye = torch.eye(p, dtype=like.dtype, device=like.device).repeat(c, 1)
    leaves = (A.times(eye) - known.matmat(eye)).unflatten(0, (c, p))
    return HODLRMatrix(leaves, known.left, known.right)


def _norm(A: _Reordered, n: int, rows: int, generator: torch.Generator, like: Tensor) -> float:
    """The Frobenius norm, by random vectors."""
    G = _random(rows, PROBES, generator, like)
    G[n:] = 0
    return float(A.times(G).norm()) / PROBES**0.5


def _random(rows: int, k: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian vectors."""
    return torch.randn(rows, k, generator=generator, dtype=like.dtype, device=like.device)


def _level(
    A: _Reordered, known: HODLRMatrix, s: int, error: float, generator: torch.Generator
) -> tuple[Inexact[Tensor, "s m r"], Inexact[Tensor, "s m r"]]:
    """The factors of all blocks of a level, up to an absolute error of each.

    Raises:
        ValueError: If a block does not compress.
    """
    rows = known.shape[-1]
    m, k = rows // s, START
    while True:
        k = min(k, m)
        G = _random(rows, k, generator, known.leaves).unflatten(0, (s, m))
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
    A: _Reordered, known: HODLRMatrix, G: Inexact[Tensor, "s m k"], *, transposed: bool
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


def _refuse(A: _Reordered, m: int, rank: int) -> None:
    """Say that a matrix does not compress."""
    raise ValueError(
        f"hierarchical({A.A!r}): a block of {m}x{m} beside the diagonal has rank {rank} at this "
        "tolerance.\nIn this order of the rows the matrix does not compress.\n"
        "Give points, or a larger tol; for a kernel in space use kernel_matrix."
    )


def _crossed(A: Entries, order: Int[Tensor, " n"], levels: int, tol: float) -> HODLRMatrix:
    """Cross approximation on each level, of entries at places in the order of the tree."""
    n, c = len(order), 2**levels
    p = math.ceil(n / c)
    places = torch.arange(c * p, device=order.device, dtype=torch.float64)

    def entries(X: Tensor, Y: Tensor) -> Tensor:
        """Entries at places of the order; behind the last there is nothing."""
        i, j = X.long()[..., :, None, 0], Y.long()[..., None, :, 0]
        inside = (i < n) & (j < n)
        return A(order[i.clamp(max=n - 1)], order[j.clamp(max=n - 1)]) * inside

    def finite(X: Tensor, Y: Tensor) -> Tensor:
        """Entries that a cross can be made of."""
        found = entries(X, Y)
        _check_finite(DenseMatrix(found))
        return found

    left, right = [], []
    for level in range(levels):
        blocks = places.reshape(2 ** (level + 1), -1, 1)
        C, R = cross_factors(finite, blocks, _exchanged(blocks), tol)
        left.append(C)
        right.append(_exchanged(R))
    grid = places.reshape(c, p, 1)
    return HODLRMatrix(entries(grid, grid), tuple(left), tuple(right))
