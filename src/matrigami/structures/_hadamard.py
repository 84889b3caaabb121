"""Hadamard: the elementwise product of two low-rank matrices, `A = (U1 V1.T) o (U2 V2.T)`.

The product of rank-`r` factors has rank up to `r^2`. By the Khatri-Rao identity `A = K_U K_V.T`
with `K_U = U1 . U2` and `K_V = V1 . V2` the row-wise (face-splitting) products, so `A` is never
formed. Storage `2 r (m + n)`; cost per vector `r^2 (m + n)`; forming `K_U` and `K_V`, once for all
vectors, takes as many multiplications (LoHa: Hyeon-Woo et al. 2022, arXiv:2108.06098).
Projection: no closed form; alternating least squares from the low-rank square root, with seeded
restarts (quasi-best).

Shapes: m = rows, n = columns, r = rank of each factor, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    DenseMatrix,
    Fan,
    LinearOperator,
    NormTerm,
    Structure,
    contraction,
    contractions,
    cost,
    diagonal,
    entries,
    example,
    fans,
    hadamard,
    is_frobenius,
    least_squares_fit,
    norm,
    norm_terms,
    project,
    resolve_rank,
    scale,
    stacked,
    truncated_svd,
)
from matrigami.structures._low_rank import LowRankMatrix

__all__ = ["Hadamard", "HadamardMatrix"]

RESTARTS = 31
"""Random starts besides the square root."""

SCREENING = 30
"""Sweeps of alternating least squares from each start; the best goes on alone."""

TOGETHER = 2**20
"""Entries up to which starts are screened as one stack."""

SWEEPS = 1000
"""Most further sweeps of that one."""

STALLED = 1e-6
"""Relative decrease of the squared error in one sweep below which it ends."""

SMALL = 256
"""Entries up to which Newton-like steps follow: sweeps creep where nearly all can be fitted."""


@dataclass(frozen=True, eq=False, repr=False)
class HadamardMatrix(LinearOperator):
    """The matrix `(U1 @ V1.T) * (U2 @ V2.T)`.

    Examples:
        >>> import torch
        >>> one = torch.ones(2, 1)
        >>> HadamardMatrix(2 * one, one, 3 * one, one).dense()
        tensor([[6., 6.],
                [6., 6.]])
    """

    U1: Inexact[Tensor, "*batch m r"]
    V1: Inexact[Tensor, "*batch n r"]
    U2: Inexact[Tensor, "*batch m s"]
    V2: Inexact[Tensor, "*batch n s"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.U1.shape[:-1], self.V1.shape[-2])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply by `K_U K_V.T`."""
        return _rowwise(self.U1, self.U2) @ (_rowwise(self.V1, self.V2).mT @ X)

    @property
    def T(self) -> "HadamardMatrix":
        """Swap rows and columns of both factors."""
        return HadamardMatrix(self.V1, self.U1, self.V2, self.U2)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return (self.U1 @ self.V1.mT) * (self.U2 @ self.V2.mT)


@example("hadamard", rank=2)
@dataclass(frozen=True)
class Hadamard(Structure):
    """Elementwise products of two matrices of rank `rank`: an int or a fraction of `min(m, n)`.

    Examples:
        >>> Hadamard(rank=2).init(3, 4)
        HadamardMatrix(3x4, 28 parameters)
    """

    exact_projection: ClassVar[bool] = False

    rank: float

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> HadamardMatrix:
        """The tensors of a member.

        Raises:
            ValueError: If the rank is below 1 or above `min(m, n)`.
        """
        r = resolve_rank(self.rank, min(m, n), str(self))
        return HadamardMatrix(*[empty(size, r) for size in (m, n, m, n)])


def _rowwise(
    A: Inexact[Tensor, "*batch m r"], B: Inexact[Tensor, "*batch m s"]
) -> Inexact[Tensor, "*batch m rs"]:
    """The face-splitting product: row `i` is `kron(A[i], B[i])`."""
    return (A[..., :, None] * B[..., None, :]).flatten(-2, -1)


@hadamard.register(where=lambda A, B: A.shape == B.shape)
def _(A: LowRankMatrix, B: LowRankMatrix) -> HadamardMatrix:
    return HadamardMatrix(A.U, A.V, B.U, B.V)


@fans.register
def _(A: HadamardMatrix) -> tuple[Fan, ...]:
    """Signals fill `n` of the `r` directions between the factors, so `m` counts for `m r / n`."""
    m, n = A.shape[-2:]
    r = A.U1.shape[-1] * A.U2.shape[-1]
    outputs = m * r // n if r > n else m
    return Fan(r, outputs, 2, last=True), Fan(n, r, 2), Fan(r, outputs, 2), Fan(n, r, 2)


@contractions.register
def _(A: HadamardMatrix) -> tuple[Contraction, ...]:
    """A tensor of rows sees, for each row, what the other one passes on; of columns likewise."""
    (m, r), (n, s) = A.U1.shape[-2:], A.V2.shape[-2:]
    sizes = {"m": m, "n": n, "r": r, "s": s}
    rows, columns = DenseMatrix(_rowwise(A.U1, A.U2)), DenseMatrix(_rowwise(A.V1, A.V2).mT)
    through_1 = contraction(A.U1, "m r", "r s", "m s", **sizes)
    through_2 = contraction(A.U2, "m s", "r s", "m r", **sizes)
    return (
        Contraction(contraction(A.U1, "m r", "m r", "m", **sizes), through_2 @ columns),
        Contraction(
            contraction(A.V1, "n r", "n s", "r s", **sizes),
            contraction(A.V2, "n s", "n", "n s", **sizes),
            rows,
        ),
        Contraction(contraction(A.U2, "m s", "m s", "m", **sizes), through_1 @ columns),
        Contraction(
            contraction(A.V2, "n s", "n r", "r s", **sizes),
            contraction(A.V1, "n r", "n", "n r", **sizes),
            rows,
        ),
    )


@norm_terms.register
def _(A: HadamardMatrix) -> tuple[NormTerm, ...]:
    """`A = K_U K_V.T`; rows of `K_U` are Kronecker products, and `K_V` is a part of `V1 (x) V2`.

    The norm of a stack of `m` rows is at most `sqrt(m)` times that of the longest.
    """
    return (NormTerm(A.shape[-2] ** 0.5, (0, 1, 2, 3)),)


@cost.register
def _(A: HadamardMatrix) -> Cost:
    stored = A.U1.numel() + A.V1.numel() + A.U2.numel() + A.V2.numel()
    r = A.U1.shape[-1] * A.U2.shape[-1]
    macs = r * sum(A.shape[-2:]) * math.prod(A.shape[:-2])
    return Cost(stored, macs, stored * A.U1.itemsize)


@scale.register
def _(A: HadamardMatrix, factor: Tensor) -> HadamardMatrix:
    return HadamardMatrix(A.U1 * factor[..., None, None], A.V1, A.U2, A.V2)


@diagonal.register
def _(A: HadamardMatrix) -> Inexact[Tensor, "*batch d"]:
    d = min(A.shape[-2:])
    one, two = ((U[..., :d, :] * V[..., :d, :]).sum(-1) for U, V in ((A.U1, A.V1), (A.U2, A.V2)))
    return one * two


@entries.register
def _(A: HadamardMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    one, two = (
        (U[..., rows, :] * V[..., columns, :]).sum(-1) for U, V in ((A.U1, A.V1), (A.U2, A.V2))
    )
    return one * two


@norm.register(where=is_frobenius)
def _(A: HadamardMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return norm(LowRankMatrix(_rowwise(A.U1, A.U2), _rowwise(A.V1, A.V2)))


@project.register
def _(recipe: Hadamard, W: Inexact[Tensor, "*batch m n"]) -> HadamardMatrix:
    double = torch.promote_types(W.dtype, torch.float64)  # in single another start may win
    flat = [_fit(recipe, D) for D in W.to(double).reshape(-1, *W.shape[-2:])]
    return stacked(flat, tuple(W.shape[:-2])).to(W.dtype)


def _fit(recipe: Hadamard, W: Inexact[Tensor, "m n"]) -> HadamardMatrix:
    """Least squares from the most promising of several starts, which are screened together."""
    m, n = W.shape
    r = resolve_rank(recipe.rank, min(m, n), str(recipe))
    U1, V1 = truncated_svd(W.abs().sqrt().to(W.dtype), r)
    U2, V2 = truncated_svd(W.abs().sqrt() * W.sgn(), r)
    generator = torch.Generator(W.device).manual_seed(0)
    starts: list[Any] = [HadamardMatrix(U1, V1.mT, U2, V2.mT)]
    starts += [
        recipe.init(m, n, generator=generator, dtype=W.dtype, device=W.device)
        for _ in range(RESTARTS)
    ]
    step = max(1, TOGETHER // W.numel())
    found = [_screened(starts[i : i + step], W) for i in range(0, len(starts), step)]
    best, error = min(found, key=itemgetter(1))
    A = _converged(best, W, error)
    return least_squares_fit(A, W) if W.numel() <= SMALL else A


def _screened(
    starts: list[HadamardMatrix], W: Inexact[Tensor, "m n"]
) -> tuple[HadamardMatrix, float]:
    """The best after a few sweeps, and its squared error."""
    A = stacked(starts, (len(starts),))
    for _ in range(SCREENING):
        A = _sweep(A, W)
    errors = torch.linalg.matrix_norm(W - A.dense()).square()
    best = HadamardMatrix(*[t[errors.argmin()] for t in (A.U1, A.V1, A.U2, A.V2)])
    return best, float(errors.min())


def _converged(A: HadamardMatrix, W: Inexact[Tensor, "m n"], error: float) -> HadamardMatrix:
    """Sweep until nothing is gained; a member is found again to rounding."""
    floor = torch.finfo(W.dtype).eps ** 2 * float(W.abs().square().sum())
    for _ in range(SWEEPS):
        A = _sweep(A, W)
        error, before = float((W - A.dense()).abs().square().sum()), error
        if before - error <= STALLED * before or error <= floor:
            break
    return A


def _sweep(A: HadamardMatrix, W: Inexact[Tensor, "m n"]) -> HadamardMatrix:
    """Each tensor in turn at its best, the other three held fixed."""
    U1, V1, U2, V2 = A.U1, A.V1, A.U2, A.V2
    U1 = _best(W, U2 @ V2.mT, V1)
    V1 = _best(W.mT, V2 @ U2.mT, U1)
    U2 = _best(W, U1 @ V1.mT, V2)
    V2 = _best(W.mT, V1 @ U1.mT, U2)
    return HadamardMatrix(U1, V1, U2, V2)


def _best(
    W: Inexact[Tensor, "m n"], S: Inexact[Tensor, "*batch m n"], V: Inexact[Tensor, "*batch n r"]
) -> Inexact[Tensor, "*batch m r"]:
    """The `U` that minimises `||W - (U V.T) o S||`, by the normal equations of each row."""
    r = V.shape[-1]
    gram = ((S.conj() * S) @ _rowwise(V.conj(), V)).unflatten(-1, (r, r))
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = torch.finfo(W.dtype).eps * size + torch.finfo(W.dtype).tiny
    eye = torch.eye(r, dtype=W.dtype, device=W.device)
    return torch.linalg.solve_ex(gram + ridge * eye, ((W * S.conj()) @ V.conj())[..., None]).result[
        ..., 0
    ]
