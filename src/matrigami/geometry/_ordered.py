"""A square matrix that is known by products or by entries, in an order that geometry gives.

Shapes: n = rows = columns, d = dimension, s = nodes of a level, k = vectors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matrigami.geometry._given import answer_of
from matrigami.geometry.particles._points import Numbers, checked_points
from matrigami.operators import DenseMatrix, LinearOperator, Places, cropped, named_tensors
from matrigami.structures import PermutedMatrix

PROBES = 4
"""Random vectors that measure an error."""

LEAST = 16
"""Rows of a block at least where their number is not given."""

CHUNK = 2**22
"""Entries that are computed at a time for products."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Indices of rows and of columns, which broadcast, to entries."""


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


@dataclass(frozen=True)
class Ordered:
    """A matrix in the order of a balanced tree, padded by rows of zeros.

    Args:
        call: Who asks, for messages.
        A: The matrix, or a function of indices.
        order: The row at each place.
        points: The point at each place, if there are any.
        tol: The error that is allowed.
        levels: Of halvings.
    """

    call: str
    A: LinearOperator | Entries
    order: Int[Tensor, " n"]
    points: Float[Tensor, "n d"] | None
    tol: float
    levels: int

    @property
    def leaves(self) -> tuple[int, int]:
        """How many there are, and their rows."""
        c = 2**self.levels
        return c, math.ceil(len(self.order) / c)

    def zero(self) -> Tensor:
        """A number of its type, on its device."""
        if isinstance(self.A, LinearOperator):
            return torch.zeros((), dtype=self.A.dtype, device=self.A.device)
        place = torch.zeros(1, 1, dtype=torch.float64, device=self.order.device)
        return torch.zeros_like(self.entries(place, place)[0, 0])

    def times(self, X: Tensor, transposed: bool = False) -> Tensor:
        """`A X`, or `A.T X`; where entries are given, from some rows at a time."""
        n = len(self.order)
        if isinstance(self.A, LinearOperator):
            Z = torch.zeros_like(X[:n]).index_copy(0, self.order, X[:n])
            Y = (self.A.T if transposed else self.A).matmat(Z)[self.order]
            return torch.nn.functional.pad(Y, (0, 0, 0, len(X) - n))
        places = torch.arange(len(X), device=X.device, dtype=torch.float64)[:, None]
        parts = []
        for part in places.split(max(CHUNK // max(len(X), 1), 1)):
            pair = (places, part) if transposed else (part, places)
            block = self.entries(*pair)
            parts.append((block.mT if transposed else block) @ X)
        return torch.cat(parts)

    def entries(self, X: Float[Tensor, "*h m 1"], Y: Float[Tensor, "*h k 1"]) -> Tensor:
        """Entries at places of the order; behind the last there is nothing."""
        if isinstance(self.A, LinearOperator):
            raise TypeError(f"{self.call}(A): A is a value.\nIt is known by products.")
        i, j = X.long()[..., :, None, 0], Y.long()[..., None, :, 0]
        n = len(self.order)
        inside = (i < n) & (j < n)
        rows, columns = (self.order[k.clamp(max=n - 1)] for k in (i, j))
        found = answer_of(f"{self.call}(A)", self.A, rows, columns)
        if not isinstance(found, Tensor) or found.shape != inside.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"{self.call}(A): A(rows, columns) is {got} for indices of {tuple(i.shape)} and "
                f"{tuple(j.shape)}.\n"
                "Give a function of two tensors of indices, which broadcast, to entries."
            )
        return found * inside

    def finite(self, X: Tensor, Y: Tensor) -> Tensor:
        """Entries that a cross can be made of."""
        found = self.entries(X, Y)
        _check_finite(self.call, DenseMatrix(found))
        return found

    def norm(self, seed: int) -> float:
        """The Frobenius norm, by random vectors.

        Raises:
            ValueError: If it is not finite.
        """
        generator, (c, p) = torch.Generator(self.order.device).manual_seed(seed), self.leaves
        like = self.zero()
        G = torch.randn(c * p, PROBES, generator=generator, dtype=like.dtype, device=like.device)
        G[len(self.order) :] = 0
        Y = self.times(G)
        _check_finite(self.call, DenseMatrix(Y))
        return float(Y.norm()) / PROBES**0.5

    def delivered(self, H: LinearOperator) -> LinearOperator:
        """The value in the order of the rows.

        Raises:
            ValueError: If it is not finite, or misses the tolerance.
        """
        _check_finite(self.call, H)
        n = len(self.order)
        found = cropped(H, n, n)
        if not bool((self.order[1:] > self.order[:-1]).all()):
            found = PermutedMatrix(found, Places(self.order.argsort()))
        if isinstance(self.A, LinearOperator):
            _check_error(self.call, self.A, found, self.tol)
        return found


def ordered(
    call: str,
    A: LinearOperator | Entries,
    points: Numbers | None,
    tol: float | None,
    size: int | None,
    leaf: int | None,
) -> Ordered:
    """The rows in the order of points, or as they are, in leaves of as many rows at most.

    Args:
        call: Who asks, for messages.
        A: The matrix, or a function of indices.
        points: The place of each row.
        tol: Relative error; by default 1e-6, or a hundred roundings if that is more.
        size: Rows, where `A` is a function and there are no points.
        leaf: Rows of a leaf at most; the root of their number by default.

    Raises:
        TypeError: If `A` is no matrix.
        ValueError: If a number is out of range, or the rows are not as many as the points.
    """
    if tol is None:
        tol = max(1e-6, 100 * torch.finfo(A.dtype).eps if isinstance(A, LinearOperator) else 0.0)
    _check_options(call, A, tol, size, leaf)
    n, X = _rows(call, A, points, size)
    if leaf is None:
        leaf = max(math.isqrt(n), LEAST)
    levels = max(math.ceil(math.log2(max(n, 1) / leaf)), 0)
    if X is None:
        device = A.device if isinstance(A, LinearOperator) else None
        return Ordered(call, A, torch.arange(n, device=device), None, tol, levels)
    order = bisected(X, levels)
    return Ordered(call, A, order, X[order], tol, levels)


def _rows(
    call: str, A: LinearOperator | Entries, points: Numbers | None, size: int | None
) -> tuple[int, Float[Tensor, "n d"] | None]:
    """Their number, and points."""
    n = A.shape[-1] if isinstance(A, LinearOperator) else size
    X = None if points is None else checked_points("points", points).detach()
    n = n if X is None or n is not None else len(X)
    if n is None or (X is not None and len(X) != n):
        raise ValueError(
            f"{call}(A, points): A has {n} rows, and there are "
            f"{'no' if X is None else len(X)} points.\n"
            "Give a point for each row, or size= where A is a function."
        )
    if isinstance(A, LinearOperator) and A.shape != (n, n):
        raise ValueError(
            f"{call}(A): A is {A!r}; it must be a single square matrix.\n"
            "A stack is compressed matrix by matrix."
        )
    return n, X


def _check_options(call: str, A: Any, tol: float, size: int | None, leaf: int | None) -> None:
    """Refuse what is no matrix, and numbers out of range."""
    if isinstance(A, Tensor) or not (isinstance(A, LinearOperator) or callable(A)):
        raise TypeError(
            f"{call}(A): A is a {type(A).__name__}; it must be a value or a function.\n"
            "Wrap a matrix of numbers: DenseMatrix(A)."
        )
    whole = all(isinstance(number, int | None) for number in (leaf, size))
    holds = whole and isinstance(tol, int | float) and 0 < tol < 1
    if not (holds and (leaf is None or leaf >= 1) and (size is None or size >= 0)):
        raise ValueError(
            f"{call}(A, tol={tol!r}, size={size!r}) of blocks of {leaf!r} rows: a number is out of "
            "range.\n"
            "tol is above 0 and below 1, a block has 1 row or more, and size is not negative."
        )
    if isinstance(A, LinearOperator) and tol < 10 * torch.finfo(A.dtype).eps:
        least = 10 * torch.finfo(A.dtype).eps
        raise ValueError(
            f"{call}(A, tol={tol:g}): A is in {A.dtype}.\n"
            f"A relative error is at least {least:.0e}, ten roundings.\n"
            "Use double precision for smaller ones: A.to(torch.float64)."
        )


def _check_finite(call: str, A: LinearOperator) -> None:
    """Refuse NaN, which ends up in the leaves."""
    if not all(bool(t.isfinite().all()) for t in named_tensors(A).values()):
        raise ValueError(
            f"{call}(A): its entries, or its products, are not finite.\n"
            "A matrix with NaN or infinite entries cannot be compressed."
        )


def _check_error(call: str, A: LinearOperator, found: LinearOperator, tol: float) -> None:
    """Refuse what missed its tolerance."""
    miss = relative_error(A, found)
    if not miss <= 10 * tol:
        raise ValueError(
            f"{call}({A!r}, tol={tol:g}): the error is {miss:.1e}.\n"
            "Products with A are less accurate than that, or A.T is not its transpose.\n"
            "Use a larger tol."
        )


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
