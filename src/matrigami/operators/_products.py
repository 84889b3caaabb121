"""The other products: Kronecker, Hadamard, Khatri-Rao, face-splitting, outer.

Each takes tensors or values and returns a value. The rule that returns a structure stands in that
structure's file.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator
from matrigami.operators._convert import as_tensor, inexact
from matrigami.operators._dense import DenseMatrix, operator
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._functions import Cost, cost
from matrigami.operators._memory import dense


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


def _factors(function: OpenFunction, *factors: Any) -> Any:
    """Check the operands of a product of matrices, and bring tensors to one type."""
    if len(factors) < 2:
        raise TypeError(
            f"{function.name}(A, B, ...): {len(factors)} operands were given.\nGive two or more."
        )
    given = [_matrix(function.name, F) for F in factors]
    kinds = [F.dtype for F in given if isinstance(F, Tensor)]
    kind = reduce(torch.promote_types, kinds) if kinds else None
    return function.answer(*[F.to(kind) if isinstance(F, Tensor) else F for F in given])


def _matrix(name: str, F: Any) -> LinearOperator | Tensor:
    """A value as itself, numbers as a tensor with two axes or more."""
    if isinstance(F, LinearOperator):
        return F
    t = F if isinstance(F, Tensor) else as_tensor(F, torch.empty(0))
    if t.ndim < 2:
        raise TypeError(
            f"{name}(A, B, ...): a factor has shape {tuple(t.shape)}; a matrix has two axes.\n"
            "Write v[:, None] for a column, v[None] for a row."
        )
    return t if inexact(t) else t.to(torch.get_default_dtype())


def _numbers(name: str, F: Any) -> Tensor:
    """A value or numbers as a tensor with two axes or more."""
    M = _matrix(name, F)
    return M.dense() if isinstance(M, LinearOperator) else M


def _square_terms(function: OpenFunction, *terms: Any) -> Any:
    """Check that every term is square."""
    for F in terms:
        if hasattr(F, "shape") and len(F.shape) > 1 and F.shape[-2] != F.shape[-1]:
            raise ValueError(
                f"{function.name}(A, B, ...): a term is {F.shape[-2]}x{F.shape[-1]}; each must be "
                "square.\nA Kronecker sum adds multiples of identities to its terms."
            )
    return _factors(function, *terms)


@lambda default: OpenFunction(default, around=_factors)
def kron(*factors: LinearOperator | Tensor) -> LinearOperator:
    """The Kronecker product `A (x) B (x) ...`: block `(i, j)` is `A[i, j] B`.

    Args:
        factors: Two matrices or more, tensors `(*batch, m, n)`, arrays or values.

    Returns:
        A `KroneckerMatrix`.

    Raises:
        TypeError: If a factor is no matrix.
    """
    raise NotImplementedError  # in matrigami.structures


@lambda default: OpenFunction(default, around=_square_terms)
def kron_sum(*terms: LinearOperator | Tensor) -> LinearOperator:
    """The Kronecker sum `A (x) I + I (x) B` of square matrices, e.g. a Laplacian on a grid.

    Args:
        terms: Two square matrices or more, one for each axis of the grid, the slowest first.

    Returns:
        A `KroneckerSumMatrix`.

    Raises:
        ValueError: If a term is not square.
    """
    raise NotImplementedError  # in matrigami.structures


def _vectors(function: OpenFunction, u: Any, v: Any) -> Any:
    """Check two vectors."""
    u, v = (as_tensor(x, torch.empty(0)) for x in (u, v))
    if not (u.ndim and v.ndim):
        raise TypeError("outer(u, v): one is a number.\nBoth must be vectors, or stacks of them.")
    kind = torch.promote_types(u.dtype, v.dtype)
    return function.answer(u.to(kind), v.to(kind))


@lambda default: OpenFunction(default, around=_vectors)
def outer(u: Inexact[Tensor, "*batch m"], v: Inexact[Tensor, "*batch n"]) -> LinearOperator:
    """The outer product `u v.T`, a `LowRankMatrix` of rank 1."""
    raise NotImplementedError  # in matrigami.structures


def _same_shape(function: OpenFunction, A: Any, B: Any) -> Any:
    """Check two operands of one shape."""
    A, B = operator(A), operator(B)
    if A.shape[-2:] != B.shape[-2:]:
        raise ValueError(
            f"hadamard(A, B): A is {tuple(A.shape)}, but B is {tuple(B.shape)}.\n"
            "Both matrices must have the same rows and columns."
        )
    return function.answer(A, B)


@lambda default: OpenFunction(default, around=_same_shape)
def hadamard(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """The elementwise product `A o B`, in the narrowest structure known to hold it.

    Two low ranks give a `HadamardMatrix`, a diagonal and anything a `DiagonalMatrix`.

    Raises:
        ValueError: If the shapes differ.
    """
    return DenseMatrix(dense(A, "hadamard") * dense(B, "hadamard"))


def khatri_rao(
    A: Inexact[Tensor, "*batch m1 _"], B: Inexact[Tensor, "*batch m2 _"]
) -> KhatriRaoMatrix:
    """The column-wise Kronecker product, of as many columns as `A` and `B` have.

    Examples:
        >>> khatri_rao(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])).dense()
        tensor([[ 3.,  8.],
                [ 5., 12.]])
    """
    A, B = (_numbers("khatri_rao", F) for F in (A, B))
    if A.shape[-1] != B.shape[-1]:
        raise ValueError(
            f"khatri_rao(A, B): A has {A.shape[-1]} columns, B has {B.shape[-1]}.\n"
            "Both must have as many."
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
    A, B = (_numbers("face_split", F) for F in (A, B))
    if A.shape[-2] != B.shape[-2]:
        raise ValueError(
            f"face_split(A, B): A has {A.shape[-2]} rows, B has {B.shape[-2]}.\n"
            "Both must have as many."
        )
    return FaceSplitMatrix(A, B)


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
