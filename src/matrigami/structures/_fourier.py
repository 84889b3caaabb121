"""The Fourier matrix, and filters: products with what it makes diagonal.

`F[j, k] = exp(-2 pi i j k / n) / sqrt(n)`, unitary and symmetric. Of real vectors it is Hartley's,
`cos + sin` in place of `cos - i sin`: orthogonal, symmetric, its own inverse. Both diagonalise
Hermitian circulant matrices of their field. Sines, `sin(pi (j + 1) (k + 1) / (n + 1))`, diagonalise
second differences with zeros at both ends. Storage: none; cost per vector `O(n log n)`.

Shapes: n = rows = columns, f = frequencies kept, k = right-hand sides.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Inexact
from torch import Tensor

from matrigami.operators import Cost, LinearOperator, conj, cost

__all__ = ["FourierMatrix", "SineMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class FourierMatrix(LinearOperator):
    """The unitary discrete Fourier transform; of a real type Hartley's transform.

    Args:
        empty: Nothing, in the type and on the device of the matrix.
        size: Rows and columns.
        inverse: The conjugate; the same for a real type.

    Examples:
        >>> FourierMatrix(torch.empty(0), 2).dense()
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """

    empty: Inexact[Tensor, "*batch 0"]
    size: int
    inverse: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.empty.shape[:-1], self.size, self.size)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Transform each column."""
        batch = torch.broadcast_shapes(self.shape[:-2], X.shape[:-2])
        if X.numel() == 0:
            return X.expand(*batch, *X.shape[-2:])
        Y = X.mT.to(torch.promote_types(X.dtype, torch.float32))
        if Y.is_complex():
            transform = torch.fft.ifft if self.inverse else torch.fft.fft
            return transform(Y, norm="ortho").mT.expand(*batch, *X.shape[-2:])
        Z = torch.fft.fft(Y, norm="ortho").mT
        return (Z.real - Z.imag).to(X.dtype).expand(*batch, *X.shape[-2:])

    @property
    def T(self) -> "FourierMatrix":
        """Itself."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        D = self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return D.expand(*self.shape)


@dataclass(frozen=True, eq=False, repr=False)
class SineMatrix(LinearOperator):
    """The orthogonal discrete sine transform of type I, its own inverse.

    Args:
        empty: Nothing, in the type and on the device of the matrix.
        size: Rows and columns.

    Examples:
        >>> SineMatrix(torch.empty(0), 2).dense()
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """

    empty: Inexact[Tensor, "*batch 0"]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.empty.shape[:-1], self.size, self.size)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """The Fourier transform of the odd periodic continuation."""
        batch = torch.broadcast_shapes(self.shape[:-2], X.shape[:-2])
        if X.numel() == 0:
            return X.expand(*batch, *X.shape[-2:])
        if X.is_complex():
            return torch.complex(self.matmat(X.real), self.matmat(X.imag))
        Y = X.mT.to(torch.promote_types(X.dtype, torch.float32))
        odd = torch.nn.functional.pad(Y, (1, 1))
        Z = torch.fft.rfft(torch.cat([odd, -Y.flip(-1)], -1), norm="ortho").imag
        return -Z[..., 1 : self.size + 1].mT.to(X.dtype).expand(*batch, *X.shape[-2:])

    @property
    def T(self) -> "SineMatrix":
        """Itself."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        D = self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return D.expand(*self.shape)


@conj.register
def _(A: FourierMatrix) -> FourierMatrix:
    return FourierMatrix(A.empty, A.size, not A.inverse) if A.dtype.is_complex else A


@cost.register
def _(A: FourierMatrix) -> Cost:
    return Cost(0, math.prod(A.shape[:-2]) * fft_macs(A.size, A.dtype), 0)


@cost.register
def _(A: SineMatrix) -> Cost:
    return Cost(0, math.prod(A.shape[:-2]) * fft_macs(2 * (A.size + 1), A.dtype), 0)


def fft_macs(n: int, dtype: torch.dtype) -> int:
    """Multiply-adds of a transform: a complex product for each of `n / 2 log2(n)` butterflies.

    Of real numbers half.
    """
    return (2 if dtype.is_complex else 1) * n * max(math.ceil(math.log2(max(n, 1))), 1)


def spectrum(c: Inexact[Tensor, "*batch n"]) -> Complex[Tensor, "*batch f"]:
    """The transform of a filter; of a real one the frequencies that are not conjugates."""
    if c.is_complex():
        return torch.fft.fft(c)
    return torch.fft.rfft(c.to(torch.promote_types(c.dtype, torch.float32)))


def filtered(
    S: Complex[Tensor, "*batch f"], X: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """Multiply the transform of each column, `ifft(S fft(X))`."""
    if X.numel() == 0:  # the FFT refuses empty input; the gradients of S are zeros all the same
        return (S.real.sum(-1)[..., None, None] * X).to(X.dtype)
    S, Y = S[..., None, :], X.mT  # along rows: a layer hands over its tokens as such
    if X.is_complex():
        return torch.fft.ifft(S * torch.fft.fft(Y)).mT
    Y = Y.to(torch.promote_types(X.dtype, torch.float32))  # there is no FFT in half precision
    return torch.fft.irfft(S * torch.fft.rfft(Y), n=X.shape[-2]).mT.to(X.dtype)
