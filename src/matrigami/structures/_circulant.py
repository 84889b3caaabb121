"""Circulant: every column is the one before, moved down by one place: `A[i, j] = c[(i - j) mod n]`.

`A = F.H diag(fft(c)) F` with the unitary Fourier matrix `F`, so that products, powers, solutions
and determinants are transforms of `c`. Storage `n`; cost per vector `O(n log n)`, for any `n`.
Projection: the means of the wrapped diagonals, the best. Source: Davis (1979), Circulant Matrices;
as preconditioners of Toeplitz matrices T. Chan (1988), SIAM J. Sci. Stat. Comput. 9(4).

Shapes: n = rows = columns, f = frequencies kept, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    DiagonalMatrix,
    Eigh,
    Fan,
    LinearOperator,
    Structure,
    Svd,
    add,
    compose,
    contraction,
    contractions,
    cost,
    diagonal,
    eigh,
    entries,
    example,
    exp,
    fans,
    hermitian,
    inverse,
    is_concrete,
    is_frobenius,
    largest,
    norm,
    pinv,
    power,
    project,
    raised,
    real_type,
    refuse_zeros,
    root_of_squares,
    scale,
    schatten,
    shift,
    slogdet,
    solve,
    svd,
    svdvals,
    trace,
)
from matrigami.structures._fourier import FourierMatrix, fft_macs, filtered, spectrum
from matrigami.structures._sparse import SparseMatrix

__all__ = ["Circulant", "CirculantMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class CirculantMatrix(LinearOperator):
    """The matrix whose columns are the rotations of `column`.

    Examples:
        >>> CirculantMatrix(torch.tensor([1.0, 2.0, 3.0])).dense()
        tensor([[1., 3., 2.],
                [2., 1., 3.],
                [3., 2., 1.]])
    """

    column: Inexact[Tensor, "*batch n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.column.shape, self.column.shape[-1])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Convolve each column by the FFT."""
        return filtered(spectrum(self.column), X)

    @property
    def T(self) -> "CirculantMatrix":
        """Read the column backwards, from its first entry."""
        return CirculantMatrix(self.column.flip(-1).roll(1, -1))

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return self.column[..., _turns(self.column)]


@example("circulant")
@dataclass(frozen=True)
class Circulant(Structure):
    """Circulant matrices: `n` numbers, `n log n` operations.

    Examples:
        >>> Circulant().init(4, 4)
        CirculantMatrix(4x4, 4 parameters)
    """

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> CirculantMatrix:
        """The numbers of a first column.

        Raises:
            ValueError: If `m != n`.
        """
        if m != n:
            raise ValueError(
                f"Circulant() cannot be {m}x{n}: a circulant matrix is square.\n"
                "Use Toeplitz for rectangles."
            )
        return CirculantMatrix(empty(n))


def _turns(c: Inexact[Tensor, "*batch n"]) -> Tensor:
    """`(i - j) mod n`."""
    i = torch.arange(c.shape[-1], device=c.device)
    return (i[:, None] - i) % c.shape[-1]


@fans.register
def _(A: CirculantMatrix) -> tuple[Fan, ...]:
    n = A.shape[-1]
    return (Fan(n, n, last=True),)


@contractions.register
def _(A: CirculantMatrix) -> tuple[Contraction, ...]:
    """`y = sum over k of c[k] x[(i - k) mod n]`."""
    n = A.shape[-1]
    ones = torch.ones(n * n, dtype=A.dtype, device=A.device)
    rows = torch.arange(n * n + 1, device=A.device)
    rotations = SparseMatrix(ones, _turns(A.column).mT.flatten(), rows, (n * n, n))
    return (Contraction(contraction(A.column, "k", "k i", "i", k=n, i=n), before=rotations),)


def _values(A: CirculantMatrix) -> Inexact[Tensor, "*batch n"]:
    """The eigenvalues, in the order of the frequencies; complex numbers."""
    kind = torch.promote_types(A.dtype, torch.float32)
    return torch.fft.fft(A.column.to(kind))


def _rounded(values: Tensor, A: CirculantMatrix) -> Tensor:
    """Eigenvalues, with zeros in place of what is no more than the rounding of the transform."""
    rounding = 4 * math.log2(2 * A.shape[-1]) * torch.finfo(A.dtype).eps
    sizes = values.detach().abs()
    return torch.where(sizes <= rounding * sizes.amax(-1, keepdim=True), 0, values)


def _circulant(values: Tensor, A: CirculantMatrix) -> CirculantMatrix:
    """The matrix of these eigenvalues, in the type of another."""
    c = torch.fft.ifft(values)
    return CirculantMatrix((c if A.dtype.is_complex else c.real).to(A.dtype))


@cost.register
def _(A: CirculantMatrix) -> Cost:
    """Two transforms of a vector, and that of the column."""
    macs = 3 * fft_macs(A.shape[-1], A.dtype) * (A.column.numel() // max(A.shape[-1], 1))
    return Cost(A.column.numel(), macs, A.column.nbytes)


@add.register
def _(A: CirculantMatrix, B: CirculantMatrix) -> CirculantMatrix:
    return CirculantMatrix(A.column + B.column)


@compose.register
def _(A: CirculantMatrix, B: CirculantMatrix) -> CirculantMatrix:
    """The column of the product is `A` times that of `B`; they commute."""
    return CirculantMatrix((A @ B.column[..., None])[..., 0])


@scale.register
def _(A: CirculantMatrix, factor: Tensor) -> CirculantMatrix:
    return CirculantMatrix(A.column * factor[..., None])


@shift.register
def _(A: CirculantMatrix, amount: Tensor) -> CirculantMatrix:
    first = torch.arange(A.shape[-1], device=A.device) == 0
    return CirculantMatrix(A.column + amount[..., None] * first)


@diagonal.register
def _(A: CirculantMatrix) -> Inexact[Tensor, "*batch n"]:
    return A.column[..., :1].expand(A.column.shape)


@trace.register
def _(A: CirculantMatrix) -> Inexact[Tensor, "*batch"]:
    return A.column[..., 0] * A.shape[-1]


@entries.register
def _(A: CirculantMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return A.column[..., (rows - columns) % A.shape[-1]]


@hermitian.register
def _(A: CirculantMatrix) -> bool:
    if not is_concrete(A.column):
        return False
    c, adjoint = A.column.detach(), A.T.column.conj().detach()
    rounding = A.shape[-1] * torch.finfo(A.dtype).eps
    return not c.numel() or bool((c - adjoint).abs().max() <= rounding * c.abs().max())


@solve.register
def _(A: CirculantMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """Divide by the eigenvalues."""
    S = spectrum(A.column)
    refuse_zeros(_rounded(S, A))
    return filtered(1 / S, B)


@inverse.register
def _(A: CirculantMatrix) -> CirculantMatrix:
    values = _values(A)
    refuse_zeros(_rounded(values, A))
    return _circulant(1 / values, A)


@pinv.register
def _(A: CirculantMatrix) -> CirculantMatrix:
    return _circulant(diagonal(pinv(DiagonalMatrix(_values(A)))), A)


@slogdet.register
def _(A: CirculantMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """The product of the eigenvalues; those of a real matrix come in conjugate pairs."""
    values, n = _rounded(_values(A), A), A.shape[-1]
    alone = values if A.dtype.is_complex else values[..., :: max(n // 2, 1) if n % 2 == 0 else n]
    sign = alone.sgn() if A.dtype.is_complex else alone.real.sgn()
    sizes = values.abs()
    sign = torch.where((sizes == 0).any(-1), 0, sign.prod(-1))
    return sign.to(A.dtype), sizes.log().sum(-1).to(real_type(A.dtype))


@eigh.register(where=lambda A, k=None: hermitian(A))
def _(A: CirculantMatrix, k: int | None = None) -> Eigh:
    """The vectors are Fourier's, or Hartley's real ones, whatever the column is."""
    values = _values(A).real.to(real_type(A.dtype))
    pairs = Eigh(values, FourierMatrix(A.column.new_empty(0), A.shape[-1], inverse=True))
    return pairs if k is None else largest(pairs, k)


@svd.register
def _(A: CirculantMatrix) -> Svd:
    """`A V = P V diag(|values|)` with the circulant matrix `P` of their phases, for `V` is real."""
    values = _values(A)
    phases = torch.where(values == 0, 1, values.sgn())
    V = FourierMatrix(A.column.new_empty(0), A.shape[-1], inverse=True)
    return Svd(compose(_circulant(phases, A), V), values.abs().to(real_type(A.dtype)), V)


@svdvals.register
def _(A: CirculantMatrix) -> Float[Tensor, "*batch n"]:
    return _values(A).abs().sort(-1, descending=True).values.to(real_type(A.dtype))


@norm.register(where=is_frobenius)
def _(A: CirculantMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return root_of_squares(A.shape[-1] * A.column.abs().square().sum(-1))


@norm.register(where=lambda A, order=None: order is not None)
def _(A: CirculantMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return schatten(svdvals(A), order)


def _is_regular_power(A: CirculantMatrix, p: float) -> bool:
    """Whether the power is whole, or that of a Hermitian matrix."""
    return float(p).is_integer() or hermitian(A)


@power.register(where=_is_regular_power)
def _(A: CirculantMatrix, p: float) -> CirculantMatrix:
    values = _values(A)
    if not float(p).is_integer():
        return _circulant(raised(values.real, p), A)
    if p < 0:
        refuse_zeros(_rounded(values, A))
    return _circulant(values**p, A)


@exp.register
def _(A: CirculantMatrix) -> CirculantMatrix:
    return _circulant(_values(A).exp(), A)


@project.register
def _(recipe: Circulant, W: Inexact[Tensor, "*batch m n"]) -> CirculantMatrix:
    recipe.blank(W.shape[-2], W.shape[-1], W.new_empty)  # refuses rectangles
    zeros = W.new_zeros(W.shape[:-1])
    turns = _turns(zeros).flatten()
    return CirculantMatrix(zeros.index_add(-1, turns, W.flatten(-2)) / W.shape[-1])
