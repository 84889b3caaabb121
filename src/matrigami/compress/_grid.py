"""Integer grids, and matrices on them: `W = (codes - zero) * scale`, a scale for each group.

A group is a run of `group` neighbouring inputs of one row, or the whole row. Storage: `bits` for a
code, and a scale (and a zero) for each group.

Shapes: m = rows, n = columns, g = groups of a row, k = right-hand sides.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Inexact, Int8
from torch import Tensor

from matrigami.operators import Cost, LinearOperator, conj, cost, scale

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Shares of the full range that a fitted grid tries."""


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedMatrix(LinearOperator):
    """The matrix `(codes - zero) * scale`, group by group.

    Args:
        codes: Signed integers of `bits` bits.
        scale: Step of each group.
        zero: The code that stands for 0, an integer, for each group; None for 0 everywhere.
        bits: Bits of a code, 2 to 8.
        group: Neighbouring columns that share a scale; the last group may be shorter.

    Examples:
        >>> codes = torch.tensor([[1, -2]], dtype=torch.int8)
        >>> QuantizedMatrix(codes, torch.tensor([[0.5]]), None, 2, 2).dense()
        tensor([[ 0.5000, -1.0000]])
    """

    codes: Int8[Tensor, "*codes m n"]
    scale: Inexact[Tensor, "*batch m g"]
    zero: Inexact[Tensor, "*batch m g"] | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(self.codes.shape[:-2], self.scale.shape[:-2])
        return (*batch, *self.codes.shape[-2:])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """By the dense weights."""
        return self.dense() @ X

    @property
    def T(self) -> LinearOperator:
        """The transpose, whose groups run along its columns."""
        return _Transposed(self)

    @property
    def support(self) -> Bool[Tensor, "*batch m n"]:
        """Which of the numbers are not zero."""
        zero = 0 if self.zero is None else spread(self.zero, self.group, self.codes.shape[-1])
        return self.codes != zero

    @property
    def stored_bits(self) -> int:
        """Bits of the codes in a file: zeros by a mask where that is smaller."""
        every, kept = self.codes.numel(), int(self.support.sum())
        return min(self.bits * every, every + self.bits * kept)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The numbers that the codes stand for."""
        codes, n = self.codes.to(self.scale.dtype), self.codes.shape[-1]
        if self.zero is not None:
            codes = codes - spread(self.zero, self.group, n)
        return spread(self.scale, self.group, n) * codes


@dataclass(frozen=True, eq=False, repr=False)
class _Transposed(LinearOperator):
    """The transpose of a quantised matrix."""

    matrix: QuantizedMatrix

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, m, n = self.matrix.shape
        return (*batch, n, m)

    def matmat(self, X: Inexact[Tensor, "... m k"]) -> Inexact[Tensor, "... n k"]:
        return self.dense() @ X

    @property
    def T(self) -> QuantizedMatrix:
        return self.matrix

    def dense(self) -> Inexact[Tensor, "*batch n m"]:
        return self.matrix.dense().mT


@scale.register
def _(A: QuantizedMatrix, factor: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(A.codes, A.scale * factor[..., None, None], A.zero, A.bits, A.group)


@conj.register
def _(A: QuantizedMatrix) -> QuantizedMatrix:
    return QuantizedMatrix(A.codes, A.scale.conj(), A.zero, A.bits, A.group)


@cost.register
def _(A: QuantizedMatrix) -> Cost:
    stack, codes = torch.Size(A.shape[:-2]).numel(), torch.Size(A.shape[-2:]).numel()
    groups = A.scale.shape[-2:].numel()
    zeros = 0 if A.zero is None else groups
    size = -(-(codes + zeros) * A.bits // 8) + groups * A.scale.element_size()
    return Cost(stack * (codes + groups + zeros), stack * codes, stack * size)


@dataclass(frozen=True)
class Grid:
    """A recipe for codes: how many bits, and what shares a scale.

    Args:
        bits: Bits of a code, 2 to 8.
        group: Inputs that share a scale; None for the whole row. The last group may be shorter.
        symmetric: Whether 0 is the code 0, which stored formats and kernels prefer; else the range
            reaches from the least to the greatest weight of the group.
        fitted: Whether the range of each group is shrunk to the least squared rounding error, which
            cuts outliers off; else nothing is cut off.

    Examples:
        >>> Grid(4, group=2).round(torch.tensor([[1.0, -7.5, 0.1, 0.15]])).codes
        tensor([[ 1, -8,  5,  7]], dtype=torch.int8)
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = True
    fitted: bool = True

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"Grid(bits={self.bits!r}): bits must be 2 to 8.\nUse 2, 3, 4 or 8.")
        if self.group is not None and not (isinstance(self.group, int) and self.group >= 1):
            raise ValueError(
                f"Grid(group={self.group!r}): it must be a number of inputs, at least one.\n"
                "Use None for whole rows."
            )

    @property
    def least(self) -> int:
        """The lowest code; the highest is `-1 - least`."""
        return -(2 ** (self.bits - 1))

    def levels(
        self, W: Float[Tensor, "*batch m n"], activity: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every group of a matrix, `(*batch, m, g)`.

        Args:
            W: The matrix.
            activity: How much an error in each column counts when a range is fitted, `(*batch, n)`:
                the mean square of the inputs; None for all alike.
        """
        parts = self._parts(W)
        counts = torch.ones_like(W[..., :1, :]) if activity is None else activity[..., None, :]
        misfit = partial(_misfit, parts, self._parts(counts.to(W)), self.least)
        steps, zero = self._range(parts, 1.0)
        best = misfit(steps, zero) if self.fitted else torch.zeros(())
        for shrink in SHRINKS[1:] if self.fitted else ():
            tried = self._range(parts, shrink)
            error = misfit(*tried)
            better = error < best
            best = torch.where(better, error, best)
            steps, zero = torch.where(better, tried[0], steps), torch.where(better, tried[1], zero)
        return steps, None if self.symmetric else zero

    def round(
        self, W: Float[Tensor, "*batch m n"], activity: Tensor | None = None
    ) -> QuantizedMatrix:
        """Round every weight to the nearest point of the grid (RTN), whose range may be fitted."""
        (steps, zero), size, n = self.levels(W, activity), self.size(W.shape[-1]), W.shape[-1]
        codes = W / spread(steps, size, n) + (0 if zero is None else spread(zero, size, n))
        codes = codes.round().clamp(self.least, -1 - self.least).to(torch.int8)
        return QuantizedMatrix(codes, steps, zero, self.bits, size)

    def size(self, n: int) -> int:
        """Columns of a group of a matrix with `n` columns."""
        return min(self.group or n, n)

    def _parts(self, W: Tensor) -> Tensor:
        """The groups on an axis of their own, the last filled up with its first weight."""
        n = W.shape[-1]
        size = self.size(n)
        groups = -(-n // size)
        lacking = groups * size - n
        if lacking:
            first = W[..., (groups - 1) * size, None]
            W = torch.cat([W, first.expand(*W.shape[:-1], lacking)], -1)
        return W.unflatten(-1, (groups, size))

    def _range(self, parts: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Scale and zero that cover a share of the range of the weights."""
        span = 2**self.bits - 1
        if self.symmetric:
            top = parts.abs().amax(-1) * shrink
            return _positive(top / (span / 2)), torch.zeros_like(top)
        low, high = (parts.amin(-1) * shrink).clamp_max(0), (parts.amax(-1) * shrink).clamp_min(0)
        steps = _positive((high - low) / span)
        return steps, (self.least - low / steps).round()


def quantized_bytes(value: QuantizedMatrix) -> float:
    """Stored bytes of a matrix, scales of 16 bits and zero points counted."""
    groups = value.scale.numel() * (16 + (0 if value.zero is None else value.bits))
    return (value.stored_bits + groups) / 8


def spread(levels: Tensor, size: int, n: int) -> Tensor:
    """Numbers of groups as numbers of the `n` columns."""
    return levels.repeat_interleave(size, -1)[..., :n]


def _positive(steps: Tensor) -> Tensor:
    """A step of 1 where all weights are zero, so that nothing is divided by zero."""
    return torch.where(steps > 0, steps, torch.ones_like(steps))


def _misfit(
    parts: Tensor, counts: Tensor, least: int, steps: Tensor, zero: Tensor
) -> Float[Tensor, "*batch m g"]:
    """The rounding error of each group, column by column as it counts."""
    offset = zero[..., None]
    codes = (parts / steps[..., None] + offset).round_().clamp_(least, -1 - least)
    return (codes.sub_(offset).mul_(steps[..., None]).sub_(parts).square_() * counts).sum(-1)
