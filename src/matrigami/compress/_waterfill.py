"""Waterfilling: integers without bounds, steps by the need of each column, bits by entropy coding.

The loss of rounding with feedback is `sum_ij C_i D_j r_ij^2` (see `_rounding`). With the steps
`c / sqrt(C_i D_j)` every entry costs the same, which is where an ideal coder of Gaussian weights
spends its bits; equal steps cost `log2(AM / GM) / 2` bits more, of the arithmetic and geometric mean
of the pivots. The codes have an entropy below any fixed number of bits; nothing is clipped. A column
of few bits is shrunk by the factor of least squares. One-sided: WaterSIC (Lifar et al. 2026, arXiv
2603.04956); the two-sided form follows from the same identity.

Shapes: m = rows, n = columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact, Int32
from torch import Tensor

from matrigami.compress._rounding import PANEL, Problem, by_tiles, damped, row_losses, unit_lower
from matrigami.operators import Cost, LinearOperator, conj, cost, operator

SEARCH_STEPS = 24
"""Most bisections for the step; each halves the interval of its logarithm."""

CLOSE = 2e-3
"""Bits by which the entropy may stay below the wanted one."""

SWEEPS = 2
"""Rounds of least squares over the scales of columns and rows."""

UNBOUNDED = -(2**30)
"""The lowest code of a grid without bounds."""


@dataclass(frozen=True, eq=False, repr=False)
class LatticeMatrix(LinearOperator):
    """The matrix `diag(rows) codes diag(columns)` with integers of any size.

    Examples:
        >>> codes = torch.tensor([[1, -2]], dtype=torch.int32)
        >>> LatticeMatrix(codes, torch.ones(1), torch.tensor([0.5, 1.0])).dense()
        tensor([[ 0.5000, -2.0000]])
    """

    codes: Int32[Tensor, "m n"]
    rows: Float[Tensor, " m"]
    columns: Float[Tensor, " n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns."""
        return tuple(self.codes.shape)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """By the integers, scaled before and after."""
        codes = self.codes.to(self.rows.dtype)
        return self.rows[:, None] * (codes @ (self.columns[:, None] * X))

    @property
    def T(self) -> "LatticeMatrix":
        """The same with rows and columns exchanged."""
        return LatticeMatrix(self.codes.mT.contiguous(), self.columns, self.rows)

    def dense(self) -> Float[Tensor, "m n"]:
        """The numbers that the codes stand for."""
        return self.rows[:, None] * self.codes.to(self.rows.dtype) * self.columns


@conj.register
def _(A: LatticeMatrix) -> LatticeMatrix:
    return A


@cost.register
def _(A: LatticeMatrix) -> Cost:
    scales = A.rows.numel() + A.columns.numel()
    size = A.codes.numel() * entropy(A.codes) / 8 + A.rows.nbytes + A.columns.nbytes
    return Cost(A.codes.numel() + scales, A.codes.numel() + scales, math.ceil(size))


@dataclass(frozen=True)
class Waterfilling:
    """A matrix of integers without bounds, and how well it was done.

    Attributes:
        value: The matrix.
        entropy: Bits of a code, by columns: what an ideal coder that knows each column needs.
        loss: `tr(B E A E.T) / tr(B W A W.T)`, on the held-out moment where there is one.
    """

    value: LatticeMatrix
    entropy: float
    loss: float


@torch.no_grad()
def round_waterfill(
    W: Float[Tensor, "m n"],
    A: LinearOperator | Tensor,
    B: LinearOperator | Tensor | None = None,
    *,
    bits: float,
    damping: float = 1e-4,
    holdout: LinearOperator | Tensor | None = None,
) -> Waterfilling:
    """Round to integers of a given entropy so that the loss of the model rises least.

    Args:
        W: The weights, outputs by inputs.
        A: Second moment of the inputs, `(n, n)`.
        B: Second moment of the output gradients, `(m, m)`; None treats all rows alike.
        bits: Entropy of a code, above 0; any real number.
        damping: Added to the diagonals, relative to their mean.
        holdout: Second moment of inputs that `A` has not seen, for the loss that is told.

    Raises:
        ValueError: If `bits` is not positive, or a moment does not fit.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> W = torch.randn(256, 8, generator=generator)
        >>> found = round_waterfill(W, torch.eye(8), bits=2.5)
        >>> found.entropy <= 2.5, 0.02 < found.loss < 0.05  # 2^(-2 bits) 2 pi e / 12 = 0.044
        (True, True)
    """
    if not 0 < bits <= 24:
        raise ValueError(f"round_waterfill(bits={bits}): give a number above 0 and up to 24.")
    work = W.double()
    A, B = operator(A).dense().double(), None if B is None else operator(B).dense().double()
    Ad, Bd = damped(A, damping), None if B is None else damped(B, damping)
    L, D = unit_lower(Ad, "A")
    K, C = (None, torch.ones(len(W)).to(D)) if Bd is None else unit_lower(Bd, "B")
    scales = C.rsqrt(), D.rsqrt()

    def rounded(c: float) -> LatticeMatrix:
        """The codes of one step."""
        if K is None:
            return _by_columns(work, L, c * scales[1])
        steps = c * scales[0][:, None] * scales[1]
        codes = by_tiles(Problem(work, steps, None, UNBOUNDED), K, L)
        return LatticeMatrix(codes.to(torch.int32), scales[0], c * scales[1])

    value = _fitted(_searched(rounded, work, D, C, bits), work, Ad, Bd)
    judge = A if holdout is None else operator(holdout).dense().double()
    E = work - value.dense()
    loss = float(row_losses(E, judge, B).sum() / row_losses(work, judge, B).sum())
    narrow = LatticeMatrix(value.codes, value.rows.to(W.dtype), value.columns.to(W.dtype))
    return Waterfilling(narrow, entropy(value.codes), loss)


def entropy(codes: Int32[Tensor, "m n"]) -> float:
    """Bits of a code, from the frequencies in each column (with Miller and Madow's correction).

    The correction, `(values - 1) / (2 m ln 2)`, is what short columns hide.
    """
    m, n = codes.shape
    shifted = (codes - codes.amin(0)).long()
    counts = torch.zeros(int(shifted.max()) + 1, n, dtype=torch.float64, device=codes.device)
    counts.scatter_add_(0, shifted, torch.ones_like(shifted, dtype=torch.float64))
    plain = -torch.special.xlogy(counts / m, counts / m).sum(0) / math.log(2)
    hidden = ((counts > 0).sum(0) - 1) / (2 * m * math.log(2))
    return float((plain + hidden).mean())


def _by_columns(W: Tensor, L: Tensor, steps: Tensor) -> LatticeMatrix:
    """Column by column from the last, each shrunk by least squares once it is rounded."""
    W = W.mT.contiguous()
    target, codes, E, scales = W.clone(), torch.zeros_like(W), torch.empty_like(W), steps.clone()
    for stop in range(len(W), 0, -PANEL):
        start = max(stop - PANEL, 0)
        for j in range(stop - 1, start - 1, -1):
            code = codes[j].copy_((target[j] / steps[j]).round_())
            square = code.square().sum()
            scales[j] = torch.where(square > 0, code @ target[j] / square.clamp_min(1), steps[j])
            E[j] = W[j] - scales[j] * code
            target[start:j] += L[j, start:j, None] * E[j]
        target[:start] += L[start:stop, :start].mT @ E[start:stop]
    return LatticeMatrix(codes.mT.to(torch.int32), torch.ones_like(W[0]), scales)


def _searched(
    rounded: Callable[[float], LatticeMatrix], W: Tensor, D: Tensor, C: Tensor, bits: float
) -> LatticeMatrix:
    """The finest step whose codes need no more than the wanted bits, by bisection.

    It starts from the rate of fine steps, `h = mean log2(12 (w sqrt(C D))^2 / c^2) / 2`.
    """
    size = (W.square() * C[:, None]).mean(0) * D
    guess = 0.5 * float((12 * size).clamp_min(1e-300).log().mean()) - bits * math.log(2)
    low, high = guess - 4, guess + 4
    best = rounded(math.exp(high))
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        value = rounded(math.exp(middle))
        found = entropy(value.codes)
        if found > bits:
            low = middle
            continue
        best, high = value, middle
        if found > bits - CLOSE:
            break
    return best


def _fitted(value: LatticeMatrix, W: Tensor, A: Tensor, B: Tensor | None) -> LatticeMatrix:
    """The scales of columns, then of rows, that are best for the codes; alternately."""
    Z, t, s = value.codes.to(W.dtype), value.rows, value.columns
    for _ in range(SWEEPS):
        s = _least(t[:, None] * Z, W, A, B, s)
        eye = torch.eye(len(t)).to(W) if B is None else B
        t = _least((Z * s).mT, W.mT, eye, A, t)
    return LatticeMatrix(value.codes, t, s)


def _least(Z: Tensor, W: Tensor, A: Tensor, B: Tensor | None, old: Tensor) -> Tensor:
    """The `s` that minimises `tr(B E A E.T)`, `E = W - Z diag(s)`; of columns of zeros the old."""
    left = Z if B is None else B @ Z
    N = A * (Z.mT @ left)
    rhs = (left * (W @ A)).sum(0) - N @ old
    d = N.diagonal()
    ridge = torch.where(d > 0, 1e-9 * d, torch.ones_like(d))
    return old + torch.linalg.solve(N + torch.diag(ridge), rhs)
