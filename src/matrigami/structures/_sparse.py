"""Sparse matrices in compressed rows (CSR), and operators of SciPy: what comes from elsewhere.

Storage: the entries, and as indices a column for each and a pointer for each row; cost per vector:
the entries.
`solve` and `slogdet` factorise with SuperLU on the CPU, with gradients from the equation itself.

Shapes: m = rows, n = columns, e = stored entries, k = right-hand sides.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from matrigami.krylov import implicit_solve
from matrigami.operators import (
    Cost,
    DiagonalMatrix,
    LinearOperator,
    add,
    as_array,
    conj,
    cost,
    diagonal,
    differentiated,
    expand,
    is_concrete,
    is_differentiated,
    refuse_lost,
    scale,
    slogdet,
    solve,
)

__all__ = ["ScipyMatrix", "SparseMatrix", "from_scipy"]


@dataclass(frozen=True, eq=False, repr=False)
class SparseMatrix(LinearOperator):
    """A matrix in compressed rows: row `i` has the entries from `pointers[i]` to `pointers[i+1]`.

    Examples:
        >>> import scipy.sparse
        >>> from_scipy(scipy.sparse.eye(3, format="csr"))
        SparseMatrix(3x3, 3 entries)
    """

    entries: Inexact[Tensor, "*batch e"]
    columns: Int[Tensor, " e"]
    pointers: Int[Tensor, " m1"]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.entries.shape[:-1], *self.size)

    @property
    def rows(self) -> Int[Tensor, " e"]:
        """The row of each entry."""
        rows = torch.arange(self.size[0], device=self.device)
        counts = self.pointers.diff()
        return rows.repeat_interleave(counts, output_size=self.columns.shape[0])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """A compiled product; gathered and summed where a derivative or a stack is in play."""
        plain = is_concrete(self.entries, X) and not is_differentiated(self.entries, X)
        if plain and X.ndim == 2 and self.entries.ndim == 1:
            return self.compressed() @ X
        gathered = self.entries[..., None] * X[..., self.columns, :]
        zeros = gathered.new_zeros(*gathered.shape[:-2], self.size[0], X.shape[-1])
        return zeros.index_add(-2, self.rows, gathered)

    @property
    def T(self) -> "SparseMatrix":
        """The entries sorted by their columns."""
        return assembled(self.entries, self.columns, self.rows, (self.size[1], self.size[0]))

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself; entries of one place add up."""
        place = self.rows * self.size[1] + self.columns
        zeros = self.entries.new_zeros(*self.shape[:-2], self.size[0] * self.size[1])
        return zeros.index_add(-1, place, self.entries).unflatten(-1, self.size)

    def compressed(self) -> Tensor:
        """As a sparse tensor of torch: by rows where there is a compiled product of such."""
        if self.entries.is_cpu and self.entries.itemsize > 2 and torch.backends.mkl.is_available():
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of being beta
                return torch.sparse_csr_tensor(
                    self.pointers, self.columns, self.entries, self.size, check_invariants=False
                )
        place = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(
            place, self.entries, self.size, is_coalesced=True, check_invariants=False
        )

    def __abs__(self) -> "SparseMatrix":
        """The sizes of the entries."""
        A = coalesced(self)
        return SparseMatrix(A.entries.abs(), A.columns, A.pointers, A.size)

    def __repr__(self) -> str:
        """Size and stored entries."""
        stack = "x".join(map(str, self.shape[:-2]))
        size = f"{stack + ' of ' if stack else ''}{self.size[0]}x{self.size[1]}"
        return f"SparseMatrix({size}, {self.columns.shape[0]} entries)"


def assembled(
    entries: Inexact[Tensor, "*batch e"],
    rows: Int[Tensor, " e"],
    columns: Int[Tensor, " e"],
    size: tuple[int, int],
) -> SparseMatrix:
    """A sparse matrix from entries in any order, those of one place added up."""
    places, slot = torch.unique(rows * size[1] + columns, return_inverse=True)
    total = entries.new_zeros(*entries.shape[:-1], len(places)).index_add(-1, slot, entries)
    counts = torch.bincount(places // max(size[1], 1), minlength=size[0])
    pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseMatrix(total, places % max(size[1], 1), pointers, size)


def coalesced(A: SparseMatrix) -> SparseMatrix:
    """The same matrix with one entry for each place, in order."""
    return assembled(A.entries, A.rows, A.columns, A.size)


@dataclass(frozen=True, eq=False, repr=False)
class ScipyMatrix(LinearOperator):
    """A `scipy.sparse.linalg.LinearOperator`: products on the CPU, differentiable in the vectors.

    Args:
        empty: Nothing, in the type and on the device of the answers.
        operator: SciPy's.
    """

    empty: Inexact[Tensor, " 0"]
    operator: object

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns."""
        return tuple(self.operator.shape)  # pyright: ignore[reportAttributeAccessIssue]

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """By SciPy, the axes of a stack as more columns."""
        columns = X.movedim(-2, 0).flatten(1)
        Y = _Product.apply(self.operator, columns)
        return Y.unflatten(1, (*X.shape[:-2], X.shape[-1])).movedim(0, -2)

    @property
    def T(self) -> "ScipyMatrix":
        """SciPy's transpose."""
        return ScipyMatrix(self.empty, self.operator.T)  # pyright: ignore[reportAttributeAccessIssue]

    def dense(self) -> Inexact[Tensor, "m n"]:
        """The matrix itself, by products with the identity."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


class _Product(torch.autograd.Function):
    """`A X` by SciPy; linear, so its derivative is itself, and its adjoint SciPy's."""

    @staticmethod
    def forward(operator: Any, X: Tensor) -> Tensor:
        """NumPy in, NumPy out."""
        Y = operator.matmat(as_array(X))
        return torch.as_tensor(np.ascontiguousarray(Y)).to(X)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004
        """Keep the operator."""
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """The adjoint."""
        return None, _Product.apply(ctx.operator.H, grads[0])

    @staticmethod
    def jvp(ctx: Any, _: None, dX: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Linear."""
        return _Product.apply(ctx.operator, dX)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any,  # noqa: ARG004
        in_dims: Any,
        operator: Any,
        X: Tensor,
    ) -> tuple[Tensor, int]:
        """The mapped axis as more columns."""
        X = X.movedim(in_dims[1], -1)
        return _Product.apply(operator, X.flatten(1)).unflatten(1, X.shape[1:]), X.ndim - 1


def from_scipy(A: Any) -> LinearOperator:
    """A sparse matrix or array, or a `LinearOperator`, of SciPy as a value.

    Args:
        A: Sparse in any format (`SparseMatrix`; a diagonal format of one diagonal becomes a
            `DiagonalMatrix`), or an operator (`ScipyMatrix`, products on the CPU).

    Raises:
        TypeError: If `A` is neither.

    Examples:
        >>> import scipy.sparse
        >>> A = from_scipy(scipy.sparse.diags([1.0, 2.0]))
        >>> solve(A, torch.ones(2, dtype=torch.float64))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    from scipy.sparse import csr_array, issparse  # noqa: PLC0415 - heavy, and rarely needed
    from scipy.sparse.linalg import LinearOperator as ScipyOperator  # noqa: PLC0415

    if isinstance(A, ScipyOperator):
        kind = torch.as_tensor(np.empty(0, dtype=A.dtype if A.dtype is not None else float)).dtype
        kind = kind if kind.is_floating_point or kind.is_complex else torch.float64
        return ScipyMatrix(torch.empty(0, dtype=kind), A)
    if not issparse(A):
        raise TypeError(
            f"from_scipy(A): A is a {type(A).__name__}; it must be sparse, or a LinearOperator.\n"
            "A matrix of numbers becomes a value by DenseMatrix(A)."
        )
    if A.format == "dia" and A.shape[0] == A.shape[1] and list(A.offsets) == [0]:
        return DiagonalMatrix(torch.as_tensor(_inexact(A.data[0, : A.shape[0]]).copy()))
    m, n = A.shape
    rows = csr_array(A)
    rows.sum_duplicates()
    data = _inexact(rows.data)
    columns, pointers = (torch.as_tensor(t.astype(np.int64)) for t in (rows.indices, rows.indptr))
    return SparseMatrix(torch.as_tensor(data.copy()), columns, pointers, (m, n))


def _inexact(data: Any) -> Any:
    """Whole numbers and flags in double precision."""
    return data if np.issubdtype(data.dtype, np.inexact) else data.astype(float)


def _factorized(A: SparseMatrix) -> Any:
    """SuperLU's factors, kept as long as the entries live and are not changed.

    Raises:
        torch.linalg.LinAlgError: If the matrix is singular.
    """
    kept = FACTORS.get(A.entries)
    parts = [t.detach() for t in (A.entries, A.columns, A.pointers)]
    if kept is not None and kept[1] == A.size and all(map(torch.equal, kept[0], parts)):
        return kept[-1]
    factors = _factorize(A)
    FACTORS[A.entries] = ([parts[0].clone(), *parts[1:]], A.size, factors)
    return factors


def _factorize(A: SparseMatrix) -> Any:
    """By SuperLU."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - heavy, and rarely needed
    from scipy.sparse.linalg import splu  # noqa: PLC0415

    parts = [as_array(t) for t in (A.entries, A.columns, A.pointers)]
    try:
        return splu(csr_array(tuple(parts), shape=A.size).tocsc())
    except RuntimeError as error:
        raise torch.linalg.LinAlgError(str(error)) from error


FACTORS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Factors by the entries that they are of."""


@conj.register
def _(A: ScipyMatrix) -> ScipyMatrix:
    return ScipyMatrix(A.empty, A.operator.H.T)  # pyright: ignore[reportAttributeAccessIssue]


@add.register(where=lambda A, B: A.size == B.size)
def _(A: SparseMatrix, B: SparseMatrix) -> SparseMatrix:
    kind = torch.promote_types(A.dtype, B.dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    entries = torch.cat([M.entries.to(kind).expand(*batch, -1) for M in (A, B)], -1)
    rows, columns = torch.cat([A.rows, B.rows]), torch.cat([A.columns, B.columns])
    return assembled(entries, rows, columns, A.size)


@scale.register
def _(A: SparseMatrix, factor: Tensor) -> SparseMatrix:
    return SparseMatrix(A.entries * factor[..., None], A.columns, A.pointers, A.size)


@diagonal.register
def _(A: SparseMatrix) -> Inexact[Tensor, "*batch d"]:
    here = A.rows == A.columns
    zeros = A.entries.new_zeros(*A.shape[:-2], min(A.size))
    return zeros.index_add(-1, A.columns[here], A.entries[..., here])


@solve.register
def solve_sparse(A: SparseMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """By SuperLU's factors, with the derivative of the equation."""
    return implicit_solve(A, B, _by_superlu)


def _by_superlu(A: SparseMatrix, B: Tensor) -> Tensor:
    """Sparse LU: a factorisation for each matrix of a stack, all columns at once."""
    if len(A.shape) > 2:
        batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        flat = expand(A, batch).entries.reshape(-1, A.columns.shape[0])
        parts = B.expand(*batch, *B.shape[-2:]).reshape(-1, *B.shape[-2:])
        each = [
            _by_superlu(SparseMatrix(e, A.columns, A.pointers, A.size), b)
            for e, b in zip(flat, parts, strict=True)
        ]
        return torch.stack(each).reshape(*batch, *B.shape[-2:])
    columns = B.detach().movedim(-2, 0).flatten(1)
    double = as_array(columns.to(torch.promote_types(columns.dtype, torch.float64)))
    factors = _factorized(A.to(torch.promote_types(A.dtype, torch.float64)))
    X = torch.as_tensor(factors.solve(np.asfortranarray(double))).to(B)
    refuse_lost(A @ X, columns)
    return X.unflatten(1, (*B.shape[:-2], B.shape[-1])).movedim(0, -2)


@slogdet.register(where=lambda A: len(A.shape) == 2 and not differentiated(A))
def _(A: SparseMatrix) -> tuple[Inexact[Tensor, ""], Inexact[Tensor, ""]]:
    """From the diagonal of SuperLU's factor, and the signs of its two permutations."""
    try:
        factors = _factorized(A)
    except torch.linalg.LinAlgError:
        zero = A.entries.new_zeros(())
        return zero, zero.abs().log()
    d = torch.as_tensor(factors.U.diagonal()).to(A.entries)
    sign = _parity(factors.perm_r) * _parity(factors.perm_c)
    return sign * d.sgn().prod(), d.abs().log().sum()


def _parity(order: Any) -> int:
    """The sign of a permutation: minus one to the size less its cycles."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - heavy, and rarely needed
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    n = len(order)
    graph = csr_array((np.ones(n), (np.arange(n), order)), shape=(n, n))
    cycles = connected_components(graph, directed=False, return_labels=False)
    return 1 - 2 * ((n - cycles) % 2)


@cost.register
def _(A: SparseMatrix) -> Cost:
    stored = A.entries.numel()
    return Cost(stored, stored, A.entries.nbytes)
