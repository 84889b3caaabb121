"""Functions of a multiple of the identity with an update of low rank, through their small core.

With an orthonormal basis `Q` of the columns of `U` and of `conj(V)`, `A = c I + U V.T` equals
`c (I - Q Q.H) + Q C Q.H` with the core `C = Q.H A Q`, of at most twice the rank. Hence for every
`f` that has a value at `c` (zero for a plain low rank)

    f(A) = f(c) I + Q (f(C) - f(c) I) Q.H,

and the singular values are those of `C`, and `|c|` as often as there are more. The exponential is
taken from the factors, `exp(A) = e^c I + U F V.T` with the divided difference
`F = exp[c I, c I + V.T U]`, a corner of one exponential of twice the rank: its derivatives need no
basis. Source: Higham (2008), Functions of Matrices, theorem 1.35 and, for the corner, (10.17).

Shapes: n = rows = columns, r = rank, q = rank of the core.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    SKEW,
    DenseMatrix,
    DiagonalMatrix,
    LinearOperator,
    SumMatrix,
    descending,
    differentiated,
    exp,
    is_big,
    is_concrete,
    named_tensors,
    norm,
    pinv,
    power,
    refuse_real_power,
    svdvals,
    times,
)
from matrigami.structures._low_rank import INDEPENDENT, LowRankMatrix
from matrigami.structures._update import SHARE, is_uniform, parted

__all__ = []


class Parts(NamedTuple):
    """`c I + U V.T`."""

    c: Inexact[Tensor, "*batch"]
    update: LowRankMatrix


def _parts(A: LinearOperator) -> Parts | None:
    """A square value as a multiple of the identity and an update of few columns, or None."""
    if A.shape[-1] != A.shape[-2]:
        return None
    if isinstance(A, LowRankMatrix):
        zero = torch.zeros((), dtype=A.dtype, device=A.device)
        return Parts(zero, A) if A.U.shape[-1] * SHARE <= A.shape[-1] else None
    found = parted(A) if isinstance(A, SumMatrix) else None
    if found is None or not isinstance(found[0], DiagonalMatrix):
        return None
    d = found[0].diagonal
    return Parts(d[..., 0], found[1]) if is_uniform(d) else None


def _has_exponential(A: LinearOperator, *_: Any) -> bool:
    """Whether it is such a value."""
    return _parts(A) is not None


def _has_core(A: LinearOperator, *_: Any, **__: Any) -> bool:
    """Whether its core may be taken: the basis has a derivative only where the rank is full.

    A small matrix that is differentiated is asked as it is.
    """
    if not is_concrete(*named_tensors(A).values()):
        return False
    return (is_big(A) or not differentiated(A)) and _parts(A) is not None


class _Core(NamedTuple):
    """`A = c (I - Q Q.H) + Q matrix Q.H`."""

    c: Inexact[Tensor, "*batch"]
    Q: Inexact[Tensor, "*batch n q"]
    matrix: Inexact[Tensor, "*batch q q"]

    def function(self, f: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        """`f(A)` for a function of matrices that is known for diagonal and for dense ones."""
        eye = torch.eye(self.Q.shape[-1], dtype=self.matrix.dtype, device=self.Q.device)
        inner = f(DenseMatrix(self.matrix)).dense()
        outer = f(DiagonalMatrix(self.c[..., None])).dense()
        low = LowRankMatrix(times(self.Q, inner - outer * eye), self.Q.conj())
        return _everywhere(outer[..., 0, 0], low)


def _everywhere(c: Inexact[Tensor, "*batch"], update: LowRankMatrix) -> LinearOperator:
    """`c I + U V.T`, the update alone where the multiple is zero."""
    if is_concrete(c) and not c.any():
        return update
    return DiagonalMatrix(c[..., None].expand(*c.shape, update.shape[-1])) + update


def _core(A: LinearOperator, *, one_sided: bool = False) -> _Core:
    """The core; where range and corange are one, the columns of `U` alone span it.

    Raises:
        ValueError: If a derivative is wanted where the columns of the factors are dependent.
    """
    c, update = _parts(A)  # pyright: ignore[reportGeneralTypeIssues]
    U, V = (t.expand(*update.shape[:-2], *t.shape[-2:]) for t in (update.U, update.V))
    Q, R = torch.linalg.qr(U if one_sided else torch.cat([U, V.conj()], -1))
    size = R.detach().diagonal(dim1=-2, dim2=-1).abs()
    if (
        differentiated(A)
        and is_concrete(size)
        and bool((size <= INDEPENDENT * size.amax(-1, True)).any())
    ):
        raise ValueError(
            f"A function of {A!r}: its factors have dependent columns, where their basis has no "
            "derivative.\nLeave columns out, or differentiate in a multiple of the identity alone."
        )
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    matrix = times(times(Q.mH, U), times(V.mT, Q)) + c[..., None, None] * eye
    return _Core(c, Q, matrix)


@exp.register(where=_has_exponential)
def _(A: LowRankMatrix) -> LinearOperator:
    return _exponential(A)


@exp.register(where=_has_exponential)
def _(A: SumMatrix) -> LinearOperator:
    return _exponential(A)


def _exponential(A: LinearOperator) -> LinearOperator:
    """`e^c I + U F V.T`."""
    c, update = _parts(A)  # pyright: ignore[reportGeneralTypeIssues]
    K = times(update.V.mT, update.U)
    r = K.shape[-1]
    eye = torch.eye(r, dtype=K.dtype, device=K.device)
    multiple = (c[..., None, None] * eye).expand(*K.shape[:-2], r, r)
    below = torch.cat([torch.zeros_like(multiple), multiple], -1)
    above = torch.cat([K + multiple, eye.expand_as(K)], -1)
    F = torch.linalg.matrix_exp(torch.cat([above, below], -2))[..., :r, r:]
    return _everywhere(c.exp(), LowRankMatrix(times(update.U, F), update.V))


def _has_real_power(A: LinearOperator, p: float) -> bool:
    """Whether the core gives a power that is no whole number."""
    return not float(p).is_integer() and _has_core(A)


@power.register(where=_has_real_power)
def _(A: LowRankMatrix, p: float) -> LinearOperator:
    return _real_power(A, p)


@power.register(where=_has_real_power)
def _(A: SumMatrix, p: float) -> LinearOperator:
    return _real_power(A, p)


def _real_power(A: LinearOperator, p: float) -> LinearOperator:
    """The power of a Hermitian value, as far as the default asks for it.

    Raises:
        ValueError: If it does not equal its adjoint.
    """
    c, update = _parts(A)  # pyright: ignore[reportGeneralTypeIssues]
    fixed, real = update.detach(), not (c.is_complex() and bool(c.imag.any()))
    if not real or not bool((norm(fixed - fixed.H) <= SKEW * norm(fixed)).all()):
        refuse_real_power(A, p)
    return _core(A, one_sided=True).function(lambda M: power(M, p))


@power.register(where=lambda A, p: float(p).is_integer() and _has_core(A) and is_big(A))
def _(A: SumMatrix, p: float) -> LinearOperator:
    return _core(A).function(lambda M: power(M, p))


@svdvals.register(where=_has_core)
def _(A: SumMatrix) -> Float[Tensor, "*batch d"]:
    c, Q, matrix = _core(A)
    values = torch.linalg.svdvals(matrix)
    rest = c.abs()[..., None].expand(*values.shape[:-1], A.shape[-1] - Q.shape[-1])
    return descending(torch.cat([values, rest], -1), A)


@pinv.register(where=_has_core)
def _(A: SumMatrix) -> LinearOperator:
    core = _core(A)
    largest_value = torch.maximum(torch.linalg.matrix_norm(core.matrix, 2), core.c.abs())
    zero = largest_value * A.shape[-1] * torch.finfo(A.dtype).eps

    def inverted(M: LinearOperator) -> LinearOperator:
        """The pseudoinverse with what counts as zero in the whole matrix."""
        D = M.dense()
        return DenseMatrix(torch.linalg.pinv(D, atol=zero, rtol=torch.zeros_like(zero)))

    return core.function(inverted)
