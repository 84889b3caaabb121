"""The other products: Kronecker, Hadamard, Khatri-Rao, face-splitting, outer, direct sum.

Each takes tensors or values and returns a value. The rule that returns a structure stands in that
structure's file.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

import math
from dataclasses import dataclass
from functools import reduce, singledispatch

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, compose
from matrigami.operators._dense import DenseMatrix, operator
from matrigami.operators._functions import (
    Cost,
    cost,
    diagonal,
    inverse,
    power,
    slogdet,
    solve,
    svdvals,
)


@dataclass(frozen=True, eq=False, repr=False)
class KhatriRaoMatrix(LinearOperator):
    """Column-wise Kronecker product: column `c` is `kron(left[:, c], right[:, c])`."""

    left: Inexact[Tensor, "*batch m1 n"]
    right: Inexact[Tensor, "*batch m2 n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        *batch, m1, n = self.left.shape
        return (*batch, m1 * self.right.shape[-2], n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """`vec(left diag(x) right.T)` for each column `x`."""
        return torch.einsum("...ic,...jc,...ck->...ijk", self.left, self.right, X).flatten(-3, -2)

    @property
    def T(self) -> "FaceSplitMatrix":
        """The face-splitting product of the transposes."""
        return FaceSplitMatrix(self.left.mT, self.right.mT)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return (self.left[..., :, None, :] * self.right[..., None, :, :]).flatten(-3, -2)


@dataclass(frozen=True, eq=False, repr=False)
class FaceSplitMatrix(LinearOperator):
    """Row-wise Kronecker product: row `i` is `kron(left[i], right[i])`; never formed."""

    left: Inexact[Tensor, "*batch m n1"]
    right: Inexact[Tensor, "*batch m n2"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        *batch, m, n1 = self.left.shape
        return (*batch, m, n1 * self.right.shape[-1])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Rows of `left`, the matrix of `X`, rows of `right`."""
        X = X.unflatten(-2, (self.left.shape[-1], self.right.shape[-1]))
        return torch.einsum("...ia,...ib,...abk->...ik", self.left, self.right, X)

    @property
    def T(self) -> KhatriRaoMatrix:
        """The Khatri-Rao product of the transposes."""
        return KhatriRaoMatrix(self.left.mT, self.right.mT)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        return (self.left[..., :, None] * self.right[..., None, :]).flatten(-2, -1)


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
        return _stacked(
            [A.matmat(part) for A, part in zip(self.blocks, self.split(X), strict=True)]
        )

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


@singledispatch
def kron(
    A: LinearOperator | Tensor, B: LinearOperator | Tensor, *more: LinearOperator | Tensor
) -> LinearOperator:
    """The Kronecker product `A (x) B (x) ...`: block `(i, j)` is `A[i, j] B`.

    Args:
        A: A tensor `(*batch, m1, n1)` or a value.
        B: A tensor `(*batch, m2, n2)` or a value.
        more: Further factors.

    Returns:
        A `KroneckerMatrix`.

    Raises:
        TypeError: If a factor is neither a tensor nor a value.
    """
    raise TypeError(
        f"kron was asked for a {type(A).__name__}.\nIts factors are tensors or linear operators."
    )


@singledispatch
def kron_sum(A: LinearOperator | Tensor, B: LinearOperator | Tensor) -> LinearOperator:
    """The Kronecker sum `A (x) I + I (x) B` of square matrices, e.g. a Laplacian on a grid.

    Raises:
        ValueError: If a term is not square.
    """
    raise TypeError(
        f"kron_sum was asked for a {type(A).__name__}.\nIts terms are tensors or linear operators."
    )


@singledispatch
def outer(u: Inexact[Tensor, "*batch m"], v: Inexact[Tensor, "*batch n"]) -> LinearOperator:
    """The outer product `u v.T`, a `LowRankMatrix` of rank 1."""
    raise TypeError(f"outer was asked for a {type(u).__name__}.\nIt takes two vectors.")


@singledispatch
def hadamard(A: LinearOperator, B: LinearOperator | Tensor) -> LinearOperator:
    """The elementwise product `A o B`, in the narrowest structure known to hold it.

    Two low ranks give a `HadamardMatrix`, a diagonal and anything a `DiagonalMatrix`.

    Raises:
        ValueError: If the shapes differ.
    """
    left, right = operator(A).dense(), operator(B).dense()
    if left.shape[-2:] != right.shape[-2:]:
        raise ValueError(
            f"hadamard was asked for {tuple(left.shape)} and {tuple(right.shape)}.\n"
            "Both matrices should have the same rows and columns."
        )
    return DenseMatrix(left * right)


def khatri_rao(
    A: Inexact[Tensor, "*batch m1 _"], B: Inexact[Tensor, "*batch m2 _"]
) -> KhatriRaoMatrix:
    """The column-wise Kronecker product, of as many columns as `A` and `B` have.

    Examples:
        >>> khatri_rao(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])).dense()
        tensor([[ 3.,  8.],
                [ 5., 12.]])
    """
    if A.shape[-1] != B.shape[-1]:
        raise ValueError(
            f"khatri_rao was asked for {tuple(A.shape)} and {tuple(B.shape)}.\n"
            "Both should have the same number of columns."
        )
    return KhatriRaoMatrix(A, B)


def face_split(
    A: Inexact[Tensor, "*batch _ n1"], B: Inexact[Tensor, "*batch _ n2"]
) -> FaceSplitMatrix:
    """The row-wise Kronecker product, of as many rows as `A` and `B` have.

    Examples:
        >>> face_split(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).dense()
        tensor([[3., 4., 6., 8.]])
    """
    if A.shape[-2] != B.shape[-2]:
        raise ValueError(
            f"face_split was asked for {tuple(A.shape)} and {tuple(B.shape)}.\n"
            "Both should have the same number of rows."
        )
    return FaceSplitMatrix(A, B)


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
            "direct_sum was asked for no blocks.\nGive at least one tensor or operator."
        )
    return DirectSumMatrix(tuple(map(operator, blocks)))


@cost.register
def _(A: KhatriRaoMatrix) -> Cost:
    return _split_cost(A, A.shape[-1])


@cost.register
def _(A: FaceSplitMatrix) -> Cost:
    return _split_cost(A, A.shape[-2])


def _split_cost(A: KhatriRaoMatrix | FaceSplitMatrix, shared: int) -> Cost:
    """`m1 n` multiplications for `left diag(x)`, then a dense product with `right`."""
    stored, batch = A.left.numel() + A.right.numel(), math.prod(A.shape[:-2])
    a, b = A.left.numel() // max(batch * shared, 1), A.right.numel() // max(batch * shared, 1)
    return Cost(stored, batch * shared * (a + a * b), stored * A.left.itemsize)


@cost.register
def _(A: DirectSumMatrix) -> Cost:
    return reduce(Cost.__add__, map(cost, A.blocks))


@compose.register
def _(A: DirectSumMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, DirectSumMatrix) and [F.shape[-1] for F in A.blocks] == [
        G.shape[-2] for G in B.blocks
    ]:
        return DirectSumMatrix(
            tuple(operator(F @ G) for F, G in zip(A.blocks, B.blocks, strict=True))
        )
    return compose.dispatch(LinearOperator)(A, B)


@solve.register
def _(A: DirectSumMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    if not A.square:
        return solve.dispatch(LinearOperator)(A, B)
    return _stacked([solve(F, part) for F, part in zip(A.blocks, A.split(B), strict=True)])


@inverse.register
def _(A: DirectSumMatrix) -> LinearOperator:
    return (
        DirectSumMatrix(tuple(map(inverse, A.blocks)))
        if A.square
        else inverse.dispatch(LinearOperator)(A)
    )


@slogdet.register
def _(A: DirectSumMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    if not A.square:
        return slogdet.dispatch(LinearOperator)(A)
    signs, logs = zip(*map(slogdet, A.blocks), strict=True)
    return torch.stack(torch.broadcast_tensors(*signs)).prod(0), torch.stack(
        torch.broadcast_tensors(*logs)
    ).sum(0)


@diagonal.register
def _(A: DirectSumMatrix) -> Inexact[Tensor, "*batch d"]:
    if not A.square:
        return diagonal.dispatch(LinearOperator)(A)
    return _stacked([diagonal(F)[..., None] for F in A.blocks])[..., 0]


@svdvals.register
def _(A: DirectSumMatrix) -> Float[Tensor, "*batch d"]:
    values = (
        _stacked([svdvals(F)[..., None] for F in A.blocks])[..., 0].sort(-1, descending=True).values
    )
    return torch.nn.functional.pad(values, (0, min(A.shape[-2:]) - values.shape[-1]))


@power.register
def _(A: DirectSumMatrix, p: float) -> LinearOperator:
    return (
        DirectSumMatrix(tuple(power(F, p) for F in A.blocks))
        if A.square
        else power.dispatch(LinearOperator)(A, p)
    )
