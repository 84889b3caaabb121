"""Toeplitz: constant along every diagonal, `A[i, j] = t[i - j + n - 1]`.

A product is a convolution, by the FFT of any length that is not less than `m + n - 1` and has small
factors. Storage `m + n - 1`; cost per vector `O((m + n) log(m + n))`. `solve` by Levinson's
recursion in `O(n^2)` operations and `O(n)` memory; large ones by conjugate gradients or GMRES with
the nearest circulant matrix as preconditioner. Projection: the means of the diagonals, the best.
Sources: Levinson (1947), J. Math. Phys. 25; T. Chan (1988), SIAM J. Sci. Stat. Comput. 9(4); Chan
and Ng (1996), SIAM Review 38(3).

Shapes: s = m + n - 1 diagonals, m = rows, n = columns, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov import Solution, cg, gmres, implicit_solve, is_large
from matrigami.operators import (
    Contraction,
    Cost,
    Fan,
    LinearOperator,
    Structure,
    add,
    as_array,
    contraction,
    contractions,
    cost,
    diagonal,
    entries,
    example,
    fans,
    hermitian,
    is_concrete,
    is_frobenius,
    lu_solve,
    norm,
    project,
    real_type,
    root_of_squares,
    round_to,
    scale,
    shift,
    solve,
    trace,
)
from matrigami.structures._circulant import Circulant, CirculantMatrix
from matrigami.structures._fourier import fft_macs, filtered, spectrum
from matrigami.structures._sparse import SparseMatrix

__all__ = ["Toeplitz", "ToeplitzMatrix"]

DIRECT = 128
"""Rows up to which a dense factorisation takes no longer than the recursion."""

RECURSION = 2**17
"""Rows up to which the recursion is a way out where no iteration converges: a minute."""

STEPS = 1000
"""Most steps of the iteration: a useful preconditioner leaves a few dozen."""

ACCURATE = 1e-8
"""Relative residual above which a recursion, which does not pivot, has failed."""


@dataclass(frozen=True, eq=False, repr=False)
class ToeplitzMatrix(LinearOperator):
    """The matrix with these diagonals.

    Args:
        diagonals: From the upper right corner, up the first row, then down the first column.
        rows: How many.

    Examples:
        >>> ToeplitzMatrix(torch.tensor([5.0, 4.0, 1.0, 2.0]), 2).dense()
        tensor([[1., 4., 5.],
                [2., 1., 4.]])
    """

    diagonals: Inexact[Tensor, "*batch s"]
    rows: int

    @classmethod
    def of(
        cls, column: Inexact[Tensor, "*batch m"], row: Inexact[Tensor, "*batch n"] | None = None
    ) -> "ToeplitzMatrix":
        """From the first column and the first row, as `scipy.linalg.toeplitz`.

        Args:
            column: The first column.
            row: The first row, whose first number is not read; by default the conjugate column.

        Examples:
            >>> ToeplitzMatrix.of(torch.tensor([2.0, -1.0, 0.0])).dense()
            tensor([[ 2., -1.,  0.],
                    [-1.,  2., -1.],
                    [ 0., -1.,  2.]])
        """
        row = column.conj() if row is None else row
        return cls(torch.cat([row[..., 1:].flip(-1), column], -1), column.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.diagonals.shape[:-1], self.rows, self.diagonals.shape[-1] - self.rows + 1)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Convolve each column by the FFT."""
        n, s = X.shape[-2], self.diagonals.shape[-1]
        length = _fast_length(s)
        t = torch.nn.functional.pad(self.diagonals, (0, length - s))
        Y = filtered(spectrum(t), torch.nn.functional.pad(X, (0, 0, 0, length - n)))
        return Y[..., n - 1 : s, :]

    @property
    def T(self) -> "ToeplitzMatrix":
        """The diagonals in reverse."""
        return ToeplitzMatrix(self.diagonals.flip(-1), self.shape[-1])

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        m, n = self.shape[-2:]
        return self.diagonals[..., _places(m, n, self.diagonals)]


@example("toeplitz")
@dataclass(frozen=True)
class Toeplitz(Structure):
    """Toeplitz matrices of any shape: `m + n - 1` numbers.

    Examples:
        >>> Toeplitz().init(4, 6)
        ToeplitzMatrix(4x6, 9 parameters)
    """

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> ToeplitzMatrix:
        """The numbers of all diagonals."""
        return ToeplitzMatrix(empty(m + n - 1), m)


def _fast_length(s: int) -> int:
    """The least `f 2^e` that is not below `s`, for a few odd `f`."""
    return min(f * 2 ** max(math.ceil(math.log2(s / f)), 0) for f in (1, 3, 5, 9, 15))


def _places(m: int, n: int, like: Tensor) -> Tensor:
    """`i - j + n - 1`."""
    i, j = torch.arange(m, device=like.device), torch.arange(n, device=like.device)
    return i[:, None] - j + n - 1


@fans.register
def _(A: ToeplitzMatrix) -> tuple[Fan, ...]:
    m, n = A.shape[-2:]
    return (Fan(n, m, last=True),)


@contractions.register
def _(A: ToeplitzMatrix) -> tuple[Contraction, ...]:
    """`y[i] = sum over d of t[d] x[i - d + n - 1]`, where there is such an `x`."""
    (m, n), s = A.shape[-2:], A.diagonals.shape[-1]
    columns = (torch.arange(m) - torch.arange(s)[:, None] + n - 1).flatten()
    inside = (columns >= 0) & (columns < n)
    ones = torch.ones(m * n, dtype=A.dtype, device=A.device)
    pointers = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
    index = (columns[inside].to(A.device), pointers.to(A.device))
    moved = SparseMatrix(ones, *index, (s * m, n))
    return (Contraction(contraction(A.diagonals, "d", "d i", "i", d=s, i=m), before=moved),)


@cost.register
def _(A: ToeplitzMatrix) -> Cost:
    """Two transforms of a vector, and that of the diagonals."""
    s = A.diagonals.shape[-1]
    macs = 3 * fft_macs(_fast_length(s), A.dtype) * (A.diagonals.numel() // s)
    return Cost(A.diagonals.numel(), macs, A.diagonals.nbytes)


@add.register(where=lambda A, B: A.rows == B.rows)
def _(A: ToeplitzMatrix, B: ToeplitzMatrix) -> ToeplitzMatrix:
    return ToeplitzMatrix(A.diagonals + B.diagonals, A.rows)


@add.register(where=lambda A, B: A.shape[-2:] == B.shape[-2:])
def _(A: ToeplitzMatrix, B: CirculantMatrix) -> LinearOperator:
    return add(A, ToeplitzMatrix.of(B.column, B.T.column))


@add.register
def _(A: CirculantMatrix, B: ToeplitzMatrix) -> LinearOperator:
    return add(B, A)


@scale.register
def _(A: ToeplitzMatrix, factor: Tensor) -> ToeplitzMatrix:
    return ToeplitzMatrix(A.diagonals * factor[..., None], A.rows)


@shift.register
def _(A: ToeplitzMatrix, amount: Tensor) -> ToeplitzMatrix:
    middle = torch.arange(A.diagonals.shape[-1], device=A.device) == A.rows - 1
    return ToeplitzMatrix(A.diagonals + amount[..., None] * middle, A.rows)


@diagonal.register
def _(A: ToeplitzMatrix) -> Inexact[Tensor, "*batch d"]:
    n, d = A.shape[-1], min(A.shape[-2:])
    return A.diagonals[..., n - 1 : n].expand(*A.shape[:-2], d)


@trace.register
def _(A: ToeplitzMatrix) -> Inexact[Tensor, "*batch"]:
    return A.diagonals[..., A.rows - 1] * A.rows


@entries.register
def _(A: ToeplitzMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return A.diagonals[..., rows - columns + A.shape[-1] - 1]


@norm.register(where=is_frobenius)
def _(A: ToeplitzMatrix, order: float | None = None) -> Inexact[Tensor, "*batch"]:
    return root_of_squares((A.diagonals.abs().square() * _lengths(A)).sum(-1))


def _lengths(A: ToeplitzMatrix) -> Inexact[Tensor, " s"]:
    """How many entries each diagonal has."""
    (m, n), s = A.shape[-2:], A.diagonals.shape[-1]
    d = torch.arange(s, device=A.device)
    count = torch.minimum(d, s - 1 - d) + 1
    return count.clamp(max=min(m, n)).to(real_type(A.dtype))


@hermitian.register
def _(A: ToeplitzMatrix) -> bool:
    if A.shape[-1] != A.shape[-2] or not is_concrete(A.diagonals):
        return False
    t = A.diagonals.detach()
    rounding = A.rows * torch.finfo(A.dtype).eps
    return bool((t - t.conj().flip(-1)).abs().max() <= rounding * t.abs().max())


@round_to.register(where=lambda A, recipe: isinstance(recipe, Circulant))
def _(A: ToeplitzMatrix, recipe: Structure) -> CirculantMatrix:
    """`c[k] = ((n - k) t[k] + k t[k - n]) / n`: the means of the wrapped diagonals."""
    recipe.blank(A.shape[-2], A.shape[-1], A.diagonals.new_empty)  # refuses rectangles
    n = A.rows
    weighted = A.diagonals * _lengths(A) / n
    above = torch.nn.functional.pad(weighted[..., : n - 1], (1, 0))
    return CirculantMatrix(weighted[..., n - 1 :] + above)


@solve.register(where=lambda A, B: A.rows > DIRECT)
def _(A: ToeplitzMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, _by_iteration if is_large(A) else _by_recursion)


def _by_iteration(A: ToeplitzMatrix, B: Tensor) -> Tensor:
    """Precondition by the nearest circulant matrix; the recursion where that is of no use."""
    if not A.diagonals.isfinite().all():
        return torch.full_like(B, torch.nan)  # the caller says why
    found = _iterated(A, B)
    if found.converged.all():
        return found.X
    if A.rows > RECURSION:
        raise RuntimeError(
            f"solve(A, B): the iteration with a circulant preconditioner did not converge for "
            f"{A!r}.\nIt reached a relative residual of {float(found.residuals[-1].max()):.1e} in "
            f"{found.steps} steps.\nUse solve(A, B, preconditioner=) with a better one, or a tol."
        )
    return _by_recursion(A, B)


def _iterated(A: ToeplitzMatrix, B: Tensor) -> Solution:
    """Conjugate gradients for a definite matrix, GMRES for any other."""
    C = spectrum(project(Circulant(), A).column)
    sizes = C.abs()
    usable = sizes > sizes.amax(-1, keepdim=True) * torch.finfo(A.dtype).eps ** 0.75
    inverse = torch.where(usable, 1 / torch.where(usable, C, 1), 1 / sizes.amax(-1, keepdim=True))
    definite = hermitian(A) and bool((C.real > 0).all()) and bool(usable.all())
    method = cg if definite else gmres
    return method(A, B, preconditioner=lambda R: filtered(inverse, R), max_steps=STEPS)


def _by_recursion(A: ToeplitzMatrix, B: Tensor) -> Tensor:
    """Levinson's recursion, and a correction by the residual; LU where leading minors vanish."""
    X = _levinson(A, B)
    if X is not None:
        X = X + _levinson(A, B - A.matmat(X))  # pyright: ignore[reportOperatorIssue]
        misses = (B - A.matmat(X)).norm(dim=-2) > ACCURATE * B.norm(dim=-2)
        if X.isfinite().all() and not misses.any():
            return X
    return lu_solve(A.dense(), B)


def _levinson(A: ToeplitzMatrix, B: Tensor) -> Tensor | None:
    """One matrix of a stack after the other, on the CPU; None where a leading minor is zero."""
    from scipy.linalg import solve_toeplitz  # noqa: PLC0415 - heavy, and rarely needed

    n, batch = A.rows, torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    t = A.diagonals.expand(*batch, -1).reshape(-1, A.diagonals.shape[-1])
    parts = B.expand(*batch, *B.shape[-2:]).reshape(-1, *B.shape[-2:])
    try:
        each = [
            torch.as_tensor(
                solve_toeplitz(
                    (as_array(d[n - 1 :]), as_array(d[:n].flip(0))), b, check_finite=False
                )
            )
            for d, b in zip(t, map(as_array, parts), strict=True)
        ]
    except np.linalg.LinAlgError:
        return None
    return torch.stack(each).to(B).reshape(*batch, *B.shape[-2:])


@project.register
def _(recipe: Toeplitz, W: Inexact[Tensor, "*batch m n"]) -> ToeplitzMatrix:
    m, n = W.shape[-2:]
    zeros = W.new_zeros(*W.shape[:-2], m + n - 1)
    total = zeros.index_add(-1, _places(m, n, W).flatten(), W.flatten(-2))
    A = ToeplitzMatrix(total, m)
    return ToeplitzMatrix(total / _lengths(A), m)
