"""Direct sums: block-diagonal matrices of any operators, which answer block by block.

Shapes: m = rows, n = columns, d = min(m, n), k = right-hand sides.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._algebra import multiplied, summed
from matrigami.operators._base import LinearOperator, add, compose, power, scale
from matrigami.operators._dense import operator
from matrigami.operators._eigen import (
    Eigh,
    Svd,
    cholesky,
    descending,
    eigh,
    exp,
    largest,
    norm,
    schatten,
    squared_norm,
    svd,
    svdvals,
)
from matrigami.operators._functions import (
    Cost,
    cost,
    diagonal,
    inverse,
    pinv,
    shift,
    slogdet,
    solve,
)
from matrigami.operators._kernels import is_concrete, root_of_squares


@dataclass(frozen=True, eq=False, repr=False)
class DirectSumMatrix(LinearOperator):
    """Block-diagonal matrix of any operators, of any sizes: `diag(A_1, ..., A_t)`."""

    blocks: tuple[LinearOperator, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        batch = torch.broadcast_shapes(*[A.shape[:-2] for A in self.blocks])
        return (*batch, *[sum(A.shape[axis] for A in self.blocks) for axis in (-2, -1)])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Each block multiplies its own rows."""
        return _stacked([A @ part for A, part in zip(self.blocks, self.split(X), strict=True)])

    @property
    def T(self) -> "DirectSumMatrix":
        """Transpose each block."""
        return DirectSumMatrix(tuple(A.T for A in self.blocks))

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        n, start, rows = self.shape[-1], 0, []
        for A in self.blocks:
            end = start + A.shape[-1]
            rows.append(torch.nn.functional.pad(A.dense(), (start, n - end)))
            start = end
        return _stacked(rows)

    def split(self, X: Inexact[Tensor, "... n k"]) -> tuple[Tensor, ...]:
        """The rows of `X` that belong to each block."""
        return X.split([A.shape[-1] for A in self.blocks], -2)

    @property
    def square(self) -> bool:
        """Whether every block is square."""
        return all(A.shape[-2] == A.shape[-1] for A in self.blocks)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Concatenate rows, broadcasting batch axes."""
    batch = torch.broadcast_shapes(*[p.shape[:-2] for p in parts])
    return torch.cat([p.expand(*batch, *p.shape[-2:]) for p in parts], -2)


def direct_sum(*blocks: LinearOperator | Tensor) -> DirectSumMatrix:
    """The block-diagonal matrix of the given tensors or values.

    Raises:
        ValueError: If there is no block.

    Examples:
        >>> direct_sum(torch.ones(1, 2), torch.ones(2, 1)).dense()
        tensor([[1., 1., 0.],
                [0., 0., 1.],
                [0., 0., 1.]])
    """
    if not blocks:
        raise ValueError(
            "direct_sum(): no blocks were given.\nGive at least one tensor or operator."
        )
    return DirectSumMatrix(tuple(map(operator, blocks)))


@cost.register
def _(A: DirectSumMatrix) -> Cost:
    return reduce(Cost.__add__, map(cost, A.blocks))


def _square(A: DirectSumMatrix, *_: Any) -> bool:
    """Whether every block is square, so that each is asked by itself."""
    return A.square


@compose.register(
    where=lambda A, B: [F.shape[-1] for F in A.blocks] == [G.shape[-2] for G in B.blocks]
)
def _(A: DirectSumMatrix, B: DirectSumMatrix) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(F @ G for F, G in zip(A.blocks, B.blocks, strict=True)))


@add.register(where=lambda A, B: [F.shape for F in A.blocks] == [G.shape for G in B.blocks])
def _(A: DirectSumMatrix, B: DirectSumMatrix) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(F + G for F, G in zip(A.blocks, B.blocks, strict=True)))


@scale.register
def _(A: DirectSumMatrix, factor: Tensor) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(scale(F, factor) for F in A.blocks))


@shift.register(where=_square)
def _(A: DirectSumMatrix, amount: Tensor) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(shift(F, amount) for F in A.blocks))


@solve.register(where=_square)
def _(A: DirectSumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return _stacked([solve(F, part) for F, part in zip(A.blocks, A.split(B), strict=True)])


@inverse.register(where=_square)
def _(A: DirectSumMatrix) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(map(inverse, A.blocks)))


@slogdet.register(where=_square)
def _(A: DirectSumMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    signs, logs = zip(*map(slogdet, A.blocks), strict=True)
    return multiplied(signs), summed(logs)


@diagonal.register(where=_square)
def _(A: DirectSumMatrix) -> Inexact[Tensor, "*batch d"]:
    return _stacked([diagonal(F)[..., None] for F in A.blocks])[..., 0]


@svdvals.register
def _(A: DirectSumMatrix) -> Float[Tensor, "*batch d"]:
    return descending(_stacked([svdvals(F)[..., None] for F in A.blocks])[..., 0], A)


@norm.register
def _(A: DirectSumMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    each = torch.broadcast_tensors(*[norm(F, order) for F in A.blocks])
    size = schatten(torch.stack(each, -1), order)
    return size if order else root_of_squares(summed(map(squared_norm, A.blocks)), size)


@power.register(where=_square)
def _(A: DirectSumMatrix, p: float) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(power(F, p) for F in A.blocks))


@exp.register(where=_square)
def _(A: DirectSumMatrix) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(map(exp, A.blocks)))


@pinv.register
def _(A: DirectSumMatrix) -> DirectSumMatrix:
    """That of each block; one that is negligible beside the others counts as zero."""
    sizes = torch.stack(torch.broadcast_tensors(*[norm(F.detach(), 2) for F in A.blocks]))
    kept = sizes > sizes.amax(0) * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
    blocks = [pinv(F) for F in A.blocks]
    if is_concrete(kept) and not bool(kept.all()):
        blocks = [scale(F, k.to(F.dtype)) for F, k in zip(blocks, kept, strict=True)]
    return DirectSumMatrix(tuple(blocks))


@svd.register
def _(A: DirectSumMatrix) -> Svd:
    U, values, V = zip(*map(svd, A.blocks), strict=True)
    joined = _stacked([s[..., None] for s in values])[..., 0]
    return Svd(DirectSumMatrix(U), joined, DirectSumMatrix(V))


@eigh.register(where=_square)
def _(A: DirectSumMatrix, k: int | None = None) -> Eigh:
    """The pairs of all blocks; the largest of all are among the largest of each."""
    most = [F.shape[-1] if k is None else min(k, F.shape[-1]) for F in A.blocks]
    found = [
        eigh(F) if n == F.shape[-1] else eigh(F, n) for F, n in zip(A.blocks, most, strict=True)
    ]
    values = _stacked([pairs.values[..., None] for pairs in found])[..., 0]
    pairs = Eigh(values, DirectSumMatrix(tuple([pairs.vectors for pairs in found])))
    return pairs if k is None else largest(pairs, k)


@cholesky.register(where=_square)
def _(A: DirectSumMatrix) -> DirectSumMatrix:
    return DirectSumMatrix(tuple(map(cholesky, A.blocks)))
