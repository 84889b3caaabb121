"""Low rank: `A = U V.T`.

Storage and cost per vector: `r (m + n)`. Projection: truncated SVD, optimal in every unitarily
invariant norm (Eckart and Young 1936); in a metric, the SVD of the whitened matrix, which is
optimal too.

Shapes: m = rows, n = columns, r = rank, k = right-hand sides.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Fan,
    LinearOperator,
    Metric,
    Structure,
    add as add_rule,
    chained,
    compose,
    contraction,
    contractions,
    diagonal,
    draw,
    fans,
    metric_project,
    norm,
    operator,
    outer,
    power,
    project,
    resolve_rank,
    scale,
    svdvals,
    truncated_svd,
)


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
        return (*self.U.shape[:-1], self.V.shape[-2])

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

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankMatrix:
        """Draw Gaussian factors.

        Raises:
            ValueError: If the rank is below 1 or above `min(m, n)`.
        """
        r = self._rank(m, n)
        U, V = (torch.empty(size, r, dtype=dtype, device=device) for size in (m, n))
        return draw(LowRankMatrix(U, V), generator)

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


@add_rule.register
def _(A: LowRankMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, LowRankMatrix) and A.shape[:-2] == B.shape[:-2]:
        return LowRankMatrix(torch.cat([A.U, B.U], -1), torch.cat([A.V, B.V], -1))
    return add_rule.dispatch(LinearOperator)(A, B)


@compose.register
def _(A: LowRankMatrix, B: LinearOperator) -> LinearOperator:
    V = B.T @ A.V
    batch = torch.broadcast_shapes(A.U.shape[:-2], V.shape[:-2])
    return LowRankMatrix(A.U.expand(*batch, -1, -1), V)


@scale.register
def _(A: LowRankMatrix, factor: float | Tensor) -> LowRankMatrix:
    return LowRankMatrix(
        A.U * (factor[..., None, None] if isinstance(factor, Tensor) else factor), A.V
    )


@diagonal.register
def _(A: LowRankMatrix) -> Inexact[Tensor, "*batch d"]:
    d = min(A.shape[-2:])
    return (A.U[..., :d, :] * A.V[..., :d, :]).sum(-1)


@svdvals.register
def _(A: LowRankMatrix) -> Float[Tensor, "*batch d"]:
    core = torch.linalg.qr(A.U).R @ torch.linalg.qr(A.V).R.mT
    values = torch.linalg.svdvals(core)
    return torch.nn.functional.pad(values, (0, min(A.shape[-2:]) - values.shape[-1]))


@norm.register
def _(A: LowRankMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    if order is not None:
        return norm.dispatch(LinearOperator)(A, order)
    return torch.linalg.matrix_norm(torch.linalg.qr(A.U).R @ torch.linalg.qr(A.V).R.mT)


@project.register
def _(recipe: LowRank, W: Inexact[Tensor, "*batch m n"]) -> LowRankMatrix:
    U, Vh = truncated_svd(W, recipe._rank(*W.shape[-2:]))
    return LowRankMatrix(U, Vh.mT)


@metric_project.register
def _(
    recipe: LowRank, W: Float[Tensor, "*batch m n"], start: LowRankMatrix, metric: Metric
) -> LowRankMatrix:
    left, right = (_roots(A) for A in (metric.left, metric.right))
    white = Metric(left[0], right[0]).apply(W)
    U, Vh = truncated_svd(white, recipe._rank(*W.shape[-2:]))
    return LowRankMatrix(
        U if left[1] is None else left[1] @ U, Vh.mT if right[1] is None else right[1] @ Vh.mT
    )


def _roots(A: LinearOperator | None) -> tuple[LinearOperator | None, LinearOperator | None]:
    """`A^(1/2)` and `A^(-1/2)`, or None for the identity."""
    if A is None:
        return None, None
    return power(operator(A), 0.5), power(operator(A), -0.5)
