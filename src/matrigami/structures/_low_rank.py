"""Low rank: `A = U V.T`.

Storage and cost per vector: `r (m + n)`. Projection: truncated SVD, optimal in every unitarily
invariant norm (Eckart and Young 1936); in a metric, the SVD of the whitened matrix, which is
optimal too.

Shapes: m = rows, n = columns, r = rank, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DenseMatrix,
    Fan,
    LinearOperator,
    Search,
    Structure,
    Svd,
    add,
    chained,
    compose,
    contraction,
    contractions,
    descending,
    diagonal,
    differentiated,
    entries,
    example,
    expand,
    fans,
    is_concrete,
    is_frobenius,
    metric_project,
    moving_spaces,
    norm,
    outer,
    pinv,
    power,
    project,
    resolve_rank,
    root_of_squares,
    round_to,
    scale,
    slogdet,
    solve,
    svd,
    svdvals,
    take_rows,
    times,
    truncated_svd,
    whitening,
)

__all__ = ["LowRank", "LowRankMatrix"]

INDEPENDENT = 1e-12
"""Columns whose rest beyond the others is below this share of the largest are dependent."""

SMALL = 2**18
"""Entries up to which a matrix that is differentiated may be made dense for it."""


@dataclass(frozen=True, eq=False, repr=False)
class LowRankMatrix(LinearOperator):
    """The matrix `U @ V.T`.

    Examples:
        >>> import torch
        >>> LowRankMatrix(torch.ones(3, 1), torch.ones(4, 1)) @ torch.ones(4, dtype=torch.float32)
        tensor([4., 4., 4.])
    """

    U: Inexact[Tensor, "*batch m r"]
    V: Inexact[Tensor, "*batch n r"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(self.U.shape[:-2], self.V.shape[:-2])
        return (*batch, self.U.shape[-2], self.V.shape[-2])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply right to left, never forming the product."""
        return self.U @ (self.V.mT @ X)

    @property
    def T(self) -> "LowRankMatrix":
        """Swap the factors."""
        return LowRankMatrix(self.V, self.U)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return self.U @ self.V.mT


@example("lowrank", rank=2)
@dataclass(frozen=True)
class LowRank(Structure):
    """Matrices of rank at most `rank`: an int, a fraction of full, by default its root.

    The default is the compute-optimal scaling of Qiu et al. (2024), arXiv:2406.06248: cost
    `O(n^1.5)` as for BTT.

    Examples:
        >>> LowRank(rank=2).init(3, 4)
        LowRankMatrix(3x4, 14 parameters)
    """

    rank: float | None = None

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LowRankMatrix:
        """The tensors of a member.

        Raises:
            ValueError: If the rank is below 1 or above `min(m, n)`.
        """
        r = self._rank(m, n)
        return LowRankMatrix(empty(m, r), empty(n, r))

    def _rank(self, m: int, n: int) -> int:
        """The rank for one shape."""
        full = min(m, n)
        return resolve_rank(
            math.ceil(full**0.5) if self.rank is None else self.rank, full, str(self)
        )


@outer.register
def _(u: Tensor, v: Inexact[Tensor, "*batch n"]) -> LowRankMatrix:
    return LowRankMatrix(u[..., None], v[..., None])


@fans.register
def _(A: LowRankMatrix) -> tuple[Fan, ...]:
    m, r = A.U.shape[-2:]
    return Fan(r, m, last=True), Fan(A.V.shape[-2], r)


@contractions.register
def _(A: LowRankMatrix) -> tuple[Contraction, ...]:
    (m, r), n = A.U.shape[-2:], A.V.shape[-2]
    V = contraction(A.V, "n r", "n", "r", n=n, r=r)
    U = contraction(A.U, "m r", "r", "m", m=m, r=r)
    return tuple(reversed(chained(V, U)))


@add.register
def _(A: LowRankMatrix, B: LowRankMatrix) -> LowRankMatrix:
    """The ranks add up."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = expand(A, batch), expand(B, batch)
    return LowRankMatrix(torch.cat([A.U, B.U], -1), torch.cat([A.V, B.V], -1))


@compose.register
def _(A: LowRankMatrix, B: LinearOperator) -> LowRankMatrix:
    return _aligned(A.U, B.T @ A.V)


@compose.register
def _(A: LinearOperator, B: LowRankMatrix) -> LowRankMatrix:
    return _aligned(A @ B.U, B.V)


@compose.register(where=lambda A, B: A.U.shape[-1] > B.U.shape[-1])
def _(A: LowRankMatrix, B: LowRankMatrix) -> LowRankMatrix:
    """The smaller of the two ranks remains."""
    return _aligned(A @ B.U, B.V)


def _aligned(U: Tensor, V: Tensor) -> LowRankMatrix:
    """`U V.T` of two stacks that broadcast, in the type to which both promote."""
    batch = torch.broadcast_shapes(U.shape[:-2], V.shape[:-2])
    kind = torch.promote_types(U.dtype, V.dtype)
    return LowRankMatrix(*[F.to(kind).expand(*batch, *F.shape[-2:]) for F in (U, V)])


@scale.register
def _(A: LowRankMatrix, factor: Tensor) -> LowRankMatrix:
    return LowRankMatrix(A.U * factor[..., None, None], A.V)


@entries.register
def _(A: LowRankMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    return (A.U[..., rows, :] * A.V[..., columns, :]).sum(-1)


@take_rows.register
def _(A: LowRankMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    return A.U[..., index, :] @ A.V.mT


@diagonal.register
def _(A: LowRankMatrix) -> Inexact[Tensor, "*batch d"]:
    d = min(A.shape[-2:])
    return (A.U[..., :d, :] * A.V[..., :d, :]).sum(-1)


@solve.register(where=lambda A, B: A.U.shape[-1] < A.shape[-1])
def _(A: LowRankMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """There is none: the rank is not full."""
    raise torch.linalg.LinAlgError("the rank is not full")


@slogdet.register(where=lambda A: A.U.shape[-1] < A.shape[-1])
def _(A: LowRankMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """The determinant is zero, and so is its derivative where the rank is lower by two."""
    zero = torch.zeros(A.shape[:-2], dtype=A.dtype, device=A.device)
    return zero, zero.abs().log()


@power.register(where=lambda A, p: float(p).is_integer() and p > 0)
def _(A: LowRankMatrix, p: float) -> LowRankMatrix:
    """`U (V.T U)^(p-1) V.T`."""
    core = torch.linalg.matrix_power(times(A.V.mT, A.U), int(p) - 1)
    return LowRankMatrix(times(A.U, core), A.V)


@svdvals.register
def _(A: LowRankMatrix) -> Float[Tensor, "*batch d"]:
    """Those that are zero have a zero derivative."""
    values = descending(svd(A.detach()).values, A)
    if not differentiated(A):
        return values
    moving = _two_orders(A, torch.linalg.svdvals)
    zero = values <= values[..., :1] * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
    found = torch.nn.functional.pad(moving, (0, values.shape[-1] - moving.shape[-1]))
    return torch.where(zero, values, found)


def _two_orders(A: LowRankMatrix, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of singular values with its first and second derivative, whatever the rank.

    In fixed bases of the columns at this point, `A = [[K L, b], [a, 0]]` with `a = b = 0` here. A
    change of the sign of `a` or `b` is unitary, so that to second order `f` is the sum of what
    `[K L; a]` and `[K L, b]` add to `f(K L)`; they are `U L` and `K V.T` up to an isometry.
    """
    Q1, Q2 = (torch.linalg.qr(F.detach()).Q for F in (A.U, A.V))
    K, L = times(Q1.mH, A.U), times(A.V.mT, Q2.conj())
    return f(times(A.U, L)) + f(times(K, A.V.mT)) - f(times(K, L))


def orthogonalized(A: LowRankMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """`Q1, core, Q2` with `A = Q1 core Q2.T`: orthonormal bases, and what is between them."""
    (Q1, R1), (Q2, R2) = torch.linalg.qr(A.U), torch.linalg.qr(A.V)
    return Q1, times(R1, R2.mT), Q2


@svd.register
def _(A: LowRankMatrix) -> Svd:
    Q1, core, Q2 = orthogonalized(A)
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    d = min(A.shape[-2:])  # more columns than that make no more singular values
    return Svd(
        DenseMatrix(times(Q1, U[..., :d])),
        values[..., :d],
        DenseMatrix(times(Q2.conj(), Vh.mH[..., :d])),
    )


@norm.register(where=is_frobenius)
def _(A: LowRankMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """Digits from orthonormal bases, derivatives from Gram matrices: `U = 0` is no exception."""
    _, core, _ = orthogonalized(A.detach())
    squares = (times(A.U.mH, A.U) * times(A.V.mH, A.V)).sum((-2, -1)).real
    return root_of_squares(squares, torch.linalg.matrix_norm(core))


@norm.register(where=lambda A, order=None: order is not None and differentiated(A))
def _(A: LowRankMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return _two_orders(A, lambda M: norm(DenseMatrix(M), order))


def _keeps_rank(A: LowRankMatrix) -> bool:
    """Whether bases of the columns have the derivative that is wanted: where these are independent.

    A matrix that cannot be looked at is asked as it is while it is small.
    """
    if not differentiated(A):
        return True
    if not is_concrete(A.U, A.V):
        return torch.Size(A.shape).numel() > SMALL
    sizes = [torch.linalg.qr(F.detach()).R.diagonal(dim1=-2, dim2=-1).abs() for F in (A.U, A.V)]
    return all(bool((size > INDEPENDENT * size.amax(-1, True)).all()) for size in sizes)


@pinv.register(where=_keeps_rank)
def _(A: LowRankMatrix) -> LowRankMatrix:
    Q1, core, Q2 = orthogonalized(A)
    inner = torch.linalg.pinv(core, rtol=max(A.shape[-2:]) * torch.finfo(A.dtype).eps)
    return LowRankMatrix(times(Q2.conj(), inner), Q1.conj())


@project.register
def _(recipe: LowRank, W: Inexact[Tensor, "*batch m n"]) -> LowRankMatrix:
    U, Vh = truncated_svd(W, recipe._rank(*W.shape[-2:]))
    return LowRankMatrix(U, Vh.mT)


@round_to.register
def _(A: LowRankMatrix, recipe: LowRank) -> LowRankMatrix:
    return lower_rank(A, recipe._rank(*A.shape[-2:]))


def lower_rank(A: LowRankMatrix, rank: int) -> LowRankMatrix:
    """The nearest of a rank at most: the SVD of the small matrix between orthonormal bases."""
    rank = min(rank, A.U.shape[-1], *A.shape[-2:])
    Q1, core, Q2 = orthogonalized(A.detach())
    if not differentiated(A):
        L, R = truncated_svd(core, rank)
        return LowRankMatrix(times(Q1, L), times(Q2, R.mT))
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    L, R = moving_spaces(A, times(Q1, U), values, times(Vh, Q2.mT), rank)
    root = values[..., None, :rank].sqrt()
    return LowRankMatrix(L * root, R.mT / torch.where(root > 0, root, 1))


@metric_project.register
def _(recipe: LowRank, W: Inexact[Tensor, "*batch m n"], search: Search) -> LowRankMatrix:
    """The truncated SVD of the whitened matrix, taken back."""
    left, right = (
        None if M is None else whitening(M) for M in (search.metric.left, search.metric.right)
    )
    W = W if left is None else left[0] @ W
    W = W if right is None else W @ right[0].H
    U, Vh = truncated_svd(W, recipe._rank(*W.shape[-2:]))
    Vh = Vh if right is None else Vh @ right[1].H
    return LowRankMatrix(U if left is None else left[1] @ U, Vh.mT)
