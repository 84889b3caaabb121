"""Waterfilling: integers without bounds, steps by the need of each column, bits by entropy coding.

The loss of rounding with feedback is `sum_ij C_i D_j r_ij^2` (see `_rounding`). With the steps
`c / sqrt(C_i D_j)` every entry costs the same, which is where an ideal coder of Gaussian weights
spends its bits; equal steps cost `log2(AM / GM) / 2` bits more, of the arithmetic and geometric
mean of the pivots. The codes have an entropy below any fixed number of bits; nothing is clipped. A
column of few bits is shrunk by the factor of least squares. One-sided: WaterSIC (Lifar et al. 2026,
arXiv 2603.04956); the two-sided form follows from the same identity.

Shapes: m = rows, n = columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Inexact, Int32
from torch import Tensor

from matrigami.compress._moments import checked_moments, damped, row_losses, unit_lower
from matrigami.compress._rounding import Problem, by_tiles, feed_back
from matrigami.operators import Cost, LinearOperator, conj, cost

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
"""What is tried: directions whose moment is far below the step get no bits."""

SEARCH_STEPS = 24
"""Most bisections for the step; each halves the interval of its logarithm."""

CLOSE = 2e-3
"""Bits by which the entropy may stay below the wanted one."""

SWEEPS = 2
"""Rounds of least squares over the scales of columns and rows."""

OCTAVES = 12
"""Below so many octaves under the mean size, codes are of one class."""

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
    rows: Inexact[Tensor, " m"]
    columns: Inexact[Tensor, " n"]

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

    def dense(self) -> Inexact[Tensor, "m n"]:
        """The numbers that the codes stand for."""
        return self.rows[:, None] * self.codes.to(self.rows.dtype) * self.columns


@conj.register
def _(A: LatticeMatrix) -> LatticeMatrix:
    return LatticeMatrix(A.codes, A.rows.conj(), A.columns.conj())


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
        damping: The damping that was used, relative to the mean of the diagonals.
    """

    value: LatticeMatrix
    entropy: float
    loss: float
    damping: float


@torch.no_grad()
def round_waterfill(
    W: Float[Tensor, "m n"],
    A: LinearOperator | Tensor,
    B: LinearOperator | Tensor | None = None,
    *,
    bits: float,
    damping: float | tuple[float, ...] = DAMPINGS,
    holdout: LinearOperator | Tensor | None = None,
) -> Waterfilling:
    """Round to integers of a given entropy so that the loss of the model rises least.

    Args:
        W: The weights, outputs by inputs.
        A: Second moment of the inputs, `(n, n)`.
        B: Second moment of the output gradients, `(m, m)`; None treats all rows alike.
        bits: Entropy of a code, above 0; any real number.
        damping: Added to the diagonals, relative to their mean. Of several the best is taken, by
            the held-out moment or else by `A`: few bits want more of it.
        holdout: Second moment of inputs that `A` has not seen.

    Raises:
        ValueError: If `bits` is not positive, or a moment does not fit.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> W = torch.randn(256, 64, generator=generator)
        >>> found = round_waterfill(W, torch.eye(64), bits=2.5)
        >>> found.entropy <= 2.5, 0.04 < found.loss < 0.07  # 2^(-2 bits) 2 pi e / 12 = 0.044
        (True, True)
    """
    if not 0 < bits <= 24:
        raise ValueError(f"round_waterfill(bits={bits}): give a number above 0 and up to 24.")
    double, inputs, gradients, judge = checked_moments("round_waterfill", W, A, B, holdout)
    whole = float(row_losses(double, judge, gradients).sum())
    tried = []
    for amount in damping if isinstance(damping, tuple) else (damping,):
        Bd = None if gradients is None else damped(gradients, amount)
        value = _rounded(double, damped(inputs, amount), Bd, bits)
        lost = float(row_losses(double - value.dense(), judge, gradients).sum())
        narrow = replace(value, rows=value.rows.to(W.dtype), columns=value.columns.to(W.dtype))
        loss = lost / whole if whole > 0 else 0.0
        tried.append(Waterfilling(narrow, entropy(value.codes), loss, amount))
    return min(tried, key=lambda found: found.loss)


def _rounded(W: Tensor, A: Tensor, B: Tensor | None, bits: float) -> LatticeMatrix:
    """The codes of the wanted entropy, with fitted scales."""
    L, D = unit_lower(A, "A")
    K, C = (None, torch.ones_like(W[:, 0])) if B is None else unit_lower(B, "B")
    rows, columns = C.rsqrt(), D.rsqrt()

    def rounded(c: float) -> LatticeMatrix:
        """The codes of one step."""
        if K is None:
            return _by_columns(W, L, c * columns)
        codes = by_tiles(Problem(W, c * rows[:, None] * columns, None, UNBOUNDED), K, L)
        return LatticeMatrix(codes.to(torch.int32), rows, c * columns)

    return _fitted(_searched(rounded, W, D, C, bits), W, A, B)


def entropy(codes: Int32[Tensor, "m n"]) -> float:
    """Bits of a code for a coder that knows how large the codes of each row and column are.

    It predicts the size of a code as `row * column / mean` of mean magnitudes and has a table for
    each half octave of it. Counted are the entropy in each class, with the correction of Miller
    and Madow for what its table was fitted to, and a byte for each row and column.

    Examples:
        >>> round(entropy(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32).repeat(500, 500)), 2)
        1.02
    """
    m, n = codes.shape
    size = codes.abs().double()
    rows, columns, mean = size.mean(1), size.mean(0), size.mean()
    if not mean > 0:
        return 0.0
    predicted = (rows[:, None] * columns / mean).clamp_min(mean * 2.0**-OCTAVES)
    kind = (2 * predicted.log2()).round().long()
    kind -= kind.min()
    shifted = codes.long() - int(codes.min())
    every = int(shifted.max()) + 1
    counts = torch.bincount((kind * every + shifted).flatten()).double()
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % every)).unflatten(0, (-1, every))
    totals = counts.sum(1, keepdim=True)
    nats = torch.special.xlogy(counts, totals / counts.clamp_min(1)).sum()
    hidden = ((counts > 0).sum(1) - 1).clamp_min(0).sum() / 2
    return float((nats + hidden) / math.log(2) + 8 * (m + n)) / (m * n)


def _by_columns(W: Tensor, L: Tensor, steps: Tensor) -> LatticeMatrix:
    """Column by column from the last, each shrunk by least squares once it is rounded."""
    W = W.mT.contiguous()
    codes, scales = torch.zeros_like(W), steps.clone()

    def rounded(j: int, target: Tensor) -> Tensor:
        """The code of one column, and its scale."""
        code = codes[j].copy_((target / steps[j]).round_())
        square = code.square().sum()
        scales[j] = torch.where(square > 0, code @ target / square.clamp_min(1), steps[j])
        return W[j] - scales[j] * code

    feed_back(W, L, rounded)
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
