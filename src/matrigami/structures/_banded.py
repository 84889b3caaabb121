"""Banded: nothing but the diagonals from `lower` below the main one to `upper` above it.

Storage and cost per vector: the entries of the band, `n (lower + upper + 1)` less the corners.
`solve` and `slogdet` by LAPACK's banded LU in `O(n lower (lower + upper))`; the derivative of a
large determinant by block cyclic reduction. Projection: the entries within the band, the best.
Source: Golub and Van Loan (2013), Matrix Computations, 4.3.

Shapes: e = entries of the band, b = diagonals, m = rows, n = columns, k = right-hand sides, h =
blocks of w rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov import implicit_solve, is_large
from matrigami.operators import (
    Contraction,
    Cost,
    DiagonalMatrix,
    Fan,
    LinearOperator,
    Structure,
    add,
    as_array,
    compose,
    contraction,
    contractions,
    cost,
    diagonal,
    differentiated,
    example,
    fans,
    is_concrete,
    is_frobenius,
    norm,
    project,
    real_type,
    reduced_slogdet,
    root_of_squares,
    scale,
    shift,
    slogdet,
    solve,
)
from matrigami.structures._sparse import SparseMatrix

__all__ = ["Banded", "BandedMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class BandedMatrix(LinearOperator):
    """The matrix with these entries along its diagonals.

    Args:
        band: The entries diagonal by diagonal, from the lowest to the highest, each from the top.
        lower: Diagonals below the main one.
        upper: Diagonals above it.
        size: Rows and columns.

    Examples:
        >>> BandedMatrix(torch.tensor([-1.0, 2.0, 2.0, -1.0]), 1, 1, (2, 2)).dense()
        tensor([[ 2., -1.],
                [-1.,  2.]])
    """

    band: Inexact[Tensor, "*batch e"]
    lower: int
    upper: int
    size: tuple[int, int]

    @classmethod
    def of(
        cls,
        diagonals: Sequence[Tensor | float],
        lower: int,
        size: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
    ) -> "BandedMatrix":
        """From one tensor or number for each diagonal, the lowest first.

        Raises:
            ValueError: If the main diagonal is not among them, or one has another length.

        Examples:
            >>> BandedMatrix.of([-1.0, 2.0, -1.0], 1, (3, 3)) @ torch.ones(3)
            tensor([1., 0., 1.])
        """
        upper = len(diagonals) - 1 - lower
        counts = [stop - start for _, start, stop in _segments(lower, upper, size)]
        given = [getattr(d, "shape", ())[-1:] for d in diagonals]
        fits = all(g in {(), (c,)} for g, c in zip(given, counts, strict=True))
        if min(lower, upper) < 0 or not fits:
            raise ValueError(
                f"BandedMatrix.of(diagonals, lower={lower}, size={size}): "
                f"there are {len(diagonals)} diagonals, of lengths {[*map(tuple, given)]}.\n"
                f"The main one must be among them, and the lengths are {counts}.\n"
                "A number stands for a constant diagonal."
            )
        parts = [
            torch.as_tensor(d, dtype=dtype).expand(*getattr(d, "shape", ())[:-1], count)
            for d, count in zip(diagonals, counts, strict=True)
        ]
        return cls(torch.cat(parts, -1), lower, upper, size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.band.shape[:-1], *self.size)

    @property
    def offsets(self) -> range:
        """Column less row of each diagonal."""
        return range(-self.lower, self.upper + 1)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """One diagonal after the other."""
        m, n = self.size
        P = torch.nn.functional.pad(X, (0, 0, self.lower, max(m + self.upper - n, 0)))
        rows = by_rows(self)
        Y = X.new_zeros(*torch.broadcast_shapes(rows.shape[:-2], X.shape[:-2]), m, X.shape[-1])
        for d, row in enumerate(rows.unbind(-2)):
            Y = Y + row[..., None] * P[..., d : d + m, :]
        return Y

    @property
    def T(self) -> "BandedMatrix":
        """The same diagonals from the last to the first."""
        counts = [stop - start for _, start, stop in _segments(self.lower, self.upper, self.size)]
        band = torch.cat(self.band.split(counts, -1)[::-1], -1)
        return BandedMatrix(band, self.upper, self.lower, self.size[::-1])  # pyright: ignore[reportArgumentType]

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        i, j = coordinates(self, self.device)
        zeros = self.band.new_zeros(*self.band.shape[:-1], self.size[0] * self.size[1])
        return zeros.index_add(-1, i * self.size[1] + j, self.band).unflatten(-1, self.size)


def _segments(lower: int, upper: int, size: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """The offset of each diagonal, its first row and the row behind its last."""
    m, n = size
    for offset in range(-lower, upper + 1):
        start = min(max(-offset, 0), m)
        yield offset, start, max(min(m, n - offset), start)


def by_rows(A: BandedMatrix) -> Inexact[Tensor, "*batch b m"]:
    """The entry of each diagonal in each row, zero where there is none."""
    segments = list(_segments(A.lower, A.upper, A.size))
    parts = A.band.split([stop - start for _, start, stop in segments], -1)
    pad, m = torch.nn.functional.pad, A.size[0]
    padded = [
        pad(d, (start, m - stop)) for d, (_, start, stop) in zip(parts, segments, strict=True)
    ]
    return torch.stack(padded, -2)


def coordinates(A: BandedMatrix, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each entry of the band."""
    rows = [
        torch.arange(start, stop, device=device)
        for _, start, stop in _segments(A.lower, A.upper, A.size)
    ]
    columns = [i + offset for i, offset in zip(rows, A.offsets, strict=True)]
    return torch.cat(rows), torch.cat(columns)


@example("banded")
@dataclass(frozen=True)
class Banded(Structure):
    """Banded matrices of any shape.

    Args:
        lower: Diagonals below the main one.
        upper: Diagonals above it.

    Examples:
        >>> Banded(lower=1, upper=1).init(4, 4)
        BandedMatrix(4x4, 10 parameters)
    """

    lower: int = 1
    upper: int = 1

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> BandedMatrix:
        """The numbers of the band.

        Raises:
            ValueError: If a bandwidth is negative.
        """
        if min(self.lower, self.upper) < 0:
            raise ValueError(
                f"{self} has a negative number of diagonals.\n"
                "The main diagonal is always in the band: give 0 or more on each side."
            )
        segments = _segments(self.lower, self.upper, (m, n))
        entries = sum(stop - start for _, start, stop in segments)
        return BandedMatrix(empty(entries), self.lower, self.upper, (m, n))


@fans.register
def _(A: BandedMatrix) -> tuple[Fan, ...]:
    (m, n), b = A.size, A.lower + A.upper + 1
    return (Fan(min(b, n), min(b, m), last=True),)


@contractions.register
def _(A: BandedMatrix) -> tuple[Contraction, ...]:
    """Every entry meets one number of the input, and is added to one of the output."""
    (i, j), e = coordinates(A, torch.device("cpu")), A.band.shape[-1]
    ones = torch.ones(e, dtype=A.dtype, device=A.device)
    starts = torch.nn.functional.pad(torch.bincount(i, minlength=A.size[0]).cumsum(0), (1, 0))
    index = (j, torch.arange(e + 1), i.argsort(stable=True), starts)
    columns, each, order, pointers = (t.to(A.device) for t in index)
    gather = SparseMatrix(ones, columns, each, (e, A.size[1]))
    scatter = SparseMatrix(ones, order, pointers, (A.size[0], e))
    part = contraction(A.band, "e", "e", "e", e=e)
    return (Contraction(part, before=gather, after=scatter),)


def _same_size(A: BandedMatrix, B: Any) -> bool:
    """Whether both have one size, stacks aside."""
    return A.shape[-2:] == B.shape[-2:]


@add.register(where=_same_size)
def _(A: BandedMatrix, B: BandedMatrix) -> BandedMatrix:
    """The wider of the bands, on each side."""
    lower, upper = max(A.lower, B.lower), max(A.upper, B.upper)
    return _widened(A, lower, upper, _widened(B, lower, upper))


def _widened(
    A: BandedMatrix, lower: int, upper: int, other: BandedMatrix | None = None
) -> BandedMatrix:
    """With zeros beyond its own band, plus another of that width."""
    before, after = (
        sum(stop - start for _, start, stop in list(_segments(lower, upper, A.size))[part])
        for part in (slice(0, lower - A.lower), slice(lower + A.upper + 1, None))
    )
    band = torch.nn.functional.pad(A.band, (before, after))
    return BandedMatrix(band if other is None else band + other.band, lower, upper, A.size)


@add.register(where=_same_size)
def _(A: BandedMatrix, B: DiagonalMatrix) -> BandedMatrix:
    main = BandedMatrix(B.diagonal, 0, 0, A.size)
    return _widened(A, A.lower, A.upper, _widened(main, A.lower, A.upper))


@add.register
def _(A: DiagonalMatrix, B: BandedMatrix) -> LinearOperator:
    return add(B, A)


@compose.register
def _(A: BandedMatrix, B: BandedMatrix) -> BandedMatrix:
    """The bandwidths add up: `C[i, i + d] = sum over e of A[i, i + e] B[i + e, i + d]`."""
    size, (lower, upper) = (A.size[0], B.size[1]), (A.lower + B.lower, A.upper + B.upper)
    left, right = by_rows(A), by_rows(B)
    shifted = torch.nn.functional.pad(right, (A.lower, max(size[0] + A.upper - A.size[1], 0)))
    total: list[Any] = [0] * (lower + upper + 1)
    for e, a in enumerate(left.unbind(-2)):
        for d, b in enumerate(shifted.unbind(-2)):
            total[e + d] = total[e + d] + a * b[..., e : e + size[0]]
    segments = _segments(lower, upper, size)
    parts = [t[..., start:stop] for t, (_, start, stop) in zip(total, segments, strict=True)]
    return BandedMatrix(torch.cat(parts, -1), lower, upper, size)


@scale.register
def _(A: BandedMatrix, factor: Tensor) -> BandedMatrix:
    return BandedMatrix(A.band * factor[..., None], A.lower, A.upper, A.size)


@shift.register
def _(A: BandedMatrix, amount: Tensor) -> LinearOperator:
    return add(A, DiagonalMatrix(amount[..., None].expand(*amount.shape, A.size[0])))


@diagonal.register
def _(A: BandedMatrix) -> Inexact[Tensor, "*batch d"]:
    return by_rows(A)[..., A.lower, : min(A.size)]


@cost.register
def _(A: BandedMatrix) -> Cost:
    return Cost(A.band.numel(), A.band.numel(), A.band.nbytes)


@norm.register(where=is_frobenius)
def _(A: BandedMatrix, order: float | None = None) -> Inexact[Tensor, "*batch"]:
    return root_of_squares(A.band.abs().square().sum(-1))


def _lapack(A: BandedMatrix) -> Any:
    """Each matrix of a stack as LAPACK has it: row `upper + i - j` of column `j`."""
    segments = list(_segments(A.lower, A.upper, A.size))
    double = torch.promote_types(A.dtype, torch.float64)
    bands = as_array(A.band.reshape(-1, A.band.shape[-1]).to(double))
    found = np.zeros((len(bands), len(segments), A.size[1]), dtype=bands.dtype)
    place = 0
    for d, (offset, start, stop) in enumerate(segments):
        part = bands[:, place : place + stop - start]
        found[:, -1 - d, start + offset : stop + offset] = part
        place += stop - start
    return found


@solve.register
def _(A: BandedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, _by_lapack)


def _by_lapack(A: BandedMatrix, B: Tensor) -> Tensor:
    """Banded LU with pivoting, on the CPU."""
    from scipy.linalg import solve_banded  # noqa: PLC0415 - heavy, and rarely needed

    if not B.numel():
        return B.clone()
    batch = torch.broadcast_shapes(A.band.shape[:-1], B.shape[:-2])
    stack = BandedMatrix(A.band.expand(*batch, -1), A.lower, A.upper, A.size)
    parts = as_array(B.expand(*batch, *B.shape[-2:]).reshape(-1, *B.shape[-2:]))
    widths = (min(A.lower, A.size[0] - 1), min(A.upper, A.size[0] - 1))
    rows = slice(A.upper - widths[1], A.upper + widths[0] + 1)
    pairs = zip(_lapack(stack), parts, strict=True)
    try:
        each = [solve_banded(widths, M[rows], b, check_finite=False) for M, b in pairs]
    except np.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError("a zero pivot") from error
    return torch.as_tensor(np.stack(each)).to(B).reshape(*batch, *B.shape[-2:])


@slogdet.register(where=lambda A: is_concrete(A.band) and not differentiated(A))
def _(A: BandedMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """From the pivots of LAPACK's LU, and the sign of its interchanges."""
    from scipy.linalg import get_lapack_funcs  # noqa: PLC0415 - heavy, and rarely needed

    signs, logs = [], []
    for M in _lapack(A):
        (factorize,) = get_lapack_funcs(("gbtrf",), (M,))
        room = np.zeros((A.lower, M.shape[1]), dtype=M.dtype)
        LU, pivots, _ = factorize(np.concatenate([room, M]), A.lower, A.upper)
        d, moves = LU[A.lower + A.upper], pivots != np.arange(len(pivots))
        sizes = np.abs(d)
        signs.append(np.prod(np.where(sizes == 0, 0, d / np.where(sizes == 0, 1, sizes))))
        signs[-1] = signs[-1] * (-1) ** int(moves.sum())
        logs.append(torch.as_tensor(sizes).log().sum())
    sign = torch.as_tensor(np.array(signs), device=A.device).to(A.dtype)
    log = torch.stack(logs).to(A.device, real_type(A.dtype))
    return sign.reshape(A.shape[:-2]), log.reshape(A.shape[:-2])


@slogdet.register(where=lambda A: is_large(A) and differentiated(A))
def _(A: BandedMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Block cyclic reduction, whose every step is a batch and has a derivative."""
    sign, log = reduced_slogdet(*_blocks(A))
    exact = slogdet(A.detach())[1]
    miss = float((log.detach() - exact).abs().max())
    if not miss <= torch.finfo(A.dtype).eps ** 0.5 * A.size[0]:
        raise ValueError(
            f"slogdet(A): the derivative for {A!r} is reduced without pivoting, and loses digits.\n"
            f"The logarithm is off by {miss:.1e}: A is far from definite or dominant.\n"
            "Without a derivative it is exact: slogdet(A.detach())."
        )
    return sign, log


def _blocks(A: BandedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """As block tridiagonal: what is left of each diagonal block, it, and what is right of it.

    The number of blocks is made a power of two by ones on the diagonal.
    """
    w, n = max(A.lower, A.upper, 1), A.size[0]
    h = 2 ** math.ceil(math.log2(math.ceil(n / w)))
    rows = torch.nn.functional.pad(by_rows(A), (0, h * w - n))
    main = (torch.arange(h * w, device=A.device) >= n).to(A.dtype)
    i = torch.arange(h * w, device=A.device) % w
    places = i + w + torch.tensor(list(A.offsets), device=A.device)[:, None]  # b (h w)
    wide = rows.new_zeros(*rows.shape[:-2], h * w, 3 * w)
    wide = wide.scatter(-1, places.mT.expand(*rows.shape[:-2], -1, -1), rows.mT)
    wide = wide + main[:, None] * (torch.arange(3 * w, device=A.device) == (i + w)[:, None])
    left, middle, right = wide.unflatten(-2, (h, w)).split(w, -1)
    return left, middle, right


@project.register
def _(recipe: Banded, W: Inexact[Tensor, "*batch m n"]) -> BandedMatrix:
    A = recipe.blank(W.shape[-2], W.shape[-1], W.new_empty)
    i, j = coordinates(A, A.device)
    return BandedMatrix(W[..., i, j], A.lower, A.upper, A.size)
