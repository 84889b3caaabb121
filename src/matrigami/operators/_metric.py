"""Positive semi-definite matrices as metrics, and the part of one that a structure can take in.

Shapes: m = rows, n = columns, b = blocks, s = shared positions, o, i = rows and columns of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, Value
from matrigami.operators._contraction import contractions
from matrigami.operators._dense import DenseMatrix, operator
from matrigami.operators._eigen import eigh
from matrigami.operators._functions import cost
from matrigami.operators._kernels import SKEW, is_hermitian
from matrigami.operators._spectral import SpectralMatrix
from matrigami.operators._tree import named_tensors, with_tensors

NEGATIVE = 1e-5
"""An eigenvalue below minus this share of the largest is no rounding error."""

RANK = 1e-12
"""Eigenvalues below this share of the largest are taken as zeros."""

COLUMNS = 1024
"""Columns of a metric that a structure is multiplied by at once: its states need memory, too."""

PIVOT = 1e-4
"""A Cholesky factor with a diagonal entry below this share of the largest is not relied on."""


@dataclass(frozen=True)
class Metric:
    """`<X, Y> = trace(left X right Y.H)`, `left` (m x m), `right` (n x n) semi-definite."""

    left: LinearOperator | None = None
    right: LinearOperator | None = None

    def apply(self, X: Inexact[Tensor, "*batch m n"]) -> Inexact[Tensor, "*batch m n"]:
        """`left @ X @ right`."""
        X = X if self.left is None else self.left @ X
        return X if self.right is None else X @ self.right

    def right_of(self, A: LinearOperator) -> Inexact[Tensor, "m n"]:
        """`A @ right`, by the structure of `A` where that is less work."""
        m, n = A.shape[-2:]
        if isinstance(self.right, DenseMatrix) and cost(A).macs < m * n:
            parts = self.right.entries.split(COLUMNS, -1)
            return torch.cat([A.matmat(part) for part in parts], -1)
        D = A.dense()
        return D if self.right is None else D @ self.right

    def square(self, X: Inexact[Tensor, "*batch m n"]) -> float:
        """`trace(left X right X.H)`."""
        return float(torch.sum(X * self.apply(X).conj()).real)

    def each(self, function: Callable[[LinearOperator], LinearOperator]) -> "Metric":
        """A function of both sides."""
        left, right = (None if M is None else function(M) for M in (self.left, self.right))
        return Metric(left, right)


@dataclass(frozen=True)
class Target:
    """A matrix to come near to in a metric; what every search needs of it is computed once."""

    W: Inexact[Tensor, "m n"]
    metric: Metric

    @cached_property
    def seen(self) -> Inexact[Tensor, "m n"]:
        """`W right`."""
        return Metric(right=self.metric.right).apply(self.W)

    @cached_property
    def whole(self) -> float:
        """The squared norm in the metric."""
        return float(torch.sum(self.W * Metric(self.metric.left).apply(self.seen).conj()).real)

    def pull(self, A: LinearOperator) -> tuple[Inexact[Tensor, "m n"], float]:
        """`left (W - A) right`, and the squared error of `A` in the metric."""
        pull = Metric(self.metric.left).apply(self.seen - self.metric.right_of(A))
        return pull, float(torch.sum((self.W - A.dense()) * pull.conj()).real)


def metric_of(W: Inexact[Tensor, "*batch m n"], left: Any, right: Any) -> Metric:
    """The metric of operators or tensors, checked, in the type of a matrix.

    Raises:
        ValueError: If one does not fit `W`, is not finite, or has a negative eigenvalue.
    """
    m, n = W.shape[-2:]
    return Metric(_checked("left", left, m, W.dtype), _checked("right", right, n, W.dtype))


def _checked(name: str, M: Any, size: int, dtype: torch.dtype) -> LinearOperator | None:
    """One side of it."""
    if M is None:
        return None
    A = operator(M).detach()
    if tuple(A.shape[-2:]) != (size, size):
        raise ValueError(
            f"project(recipe, W, {name}=M): M is {'x'.join(map(str, A.shape))}.\n"
            f"It must be {size}x{size}, as W."
        )
    if fault := metric_fault(A):
        raise ValueError(
            f"project(recipe, W, {name}=M): M {fault}.\n"
            "A metric is symmetric and positive semi-definite, as a second moment is."
        )
    return A.to(torch.promote_types(A.dtype, dtype) if A.dtype.is_complex else dtype)


def metric_fault(A: LinearOperator) -> str:
    """Why a square matrix is no metric; nothing if it is one."""
    if not all(bool(t.isfinite().all()) for t in named_tensors(A).values()):
        return "has NaN or infinite entries"
    if not A.shape[-1]:
        return ""
    if isinstance(A, DenseMatrix) and not is_hermitian(A.entries, SKEW):
        return "does not equal its adjoint"
    values = None if _factors(A) or _factors(_double(A)) else eigh(_double(A)).values
    if values is not None and bool((values.amin(-1) < -NEGATIVE * values.abs().amax(-1)).any()):
        return f"has the eigenvalue {float(values.amin()):.2g}"
    return ""


def _factors(A: LinearOperator) -> bool:
    """Whether a dense matrix has a Cholesky factor once a share of its largest diagonal is added.

    Its least eigenvalue is then above minus this share of the largest: a tenth of the work of
    looking at them all.
    """
    if not isinstance(A, DenseMatrix):
        return False
    M = A.dense().to(torch.promote_types(A.dtype, torch.float32))
    top = M.diagonal(dim1=-2, dim2=-1).real.amax(-1).clamp_min(0)
    shift = NEGATIVE * top[..., None, None] * torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return not bool(torch.linalg.cholesky_ex(M + shift).info.any())


def whitening(A: LinearOperator) -> tuple[LinearOperator, LinearOperator]:
    """`F` with `F.H F = A`, of a positive semi-definite matrix, and its pseudoinverse.

    Of a dense matrix far from singular the Cholesky factor: a tenth of the work of its square root.
    """
    if isinstance(A, DenseMatrix):
        M = _double(A).dense()
        L, info = torch.linalg.cholesky_ex(M)
        d = L.diagonal(dim1=-2, dim2=-1).real
        if bool(((info == 0) & (d.amin(-1) > PIVOT * d.amax(-1))).all()):
            one = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            inverse = torch.linalg.solve_triangular(L, one, upper=False)
            return DenseMatrix(L.mH).to(A.dtype), DenseMatrix(inverse.mH).to(A.dtype)
    return roots(A)


def roots(A: LinearOperator) -> tuple[LinearOperator, LinearOperator]:
    """`A^(1/2)` of a positive semi-definite matrix, and its pseudoinverse."""
    d, Q = eigh(_double(A))
    d = d.clamp_min(0)
    kept = d > RANK * d.amax(-1, keepdim=True)
    root = torch.where(kept, d.sqrt(), 0)
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1), 0)
    return SpectralMatrix(root, Q).to(A.dtype), SpectralMatrix(inverse, Q).to(A.dtype)


def whitened(
    project: Callable[[Tensor], LinearOperator], W: Tensor, start: LinearOperator, metric: Metric
) -> LinearOperator | None:
    """The projection of the whitened matrix, taken back by the outermost tensors.

    That is `F W G.H`, where `F.H F` is `left` and `G.H G` `right`. Exact where the metric is block
    diagonal in the blocks of those tensors and the projection in the Frobenius norm is; else that
    of the blocks on its diagonal. None where they cannot take it.
    """
    sides = []
    for M, on_rows in ((metric.left, True), (metric.right, False)):
        side = None if M is None else _side(start, M, on_rows=on_rows)
        if M is not None and side is None:
            return None
        sides.append(side)
        if side is not None:
            W = side.whitened(W) if on_rows else side.whitened(W.mH).mH
    A = project(W)
    for side in sides:
        A = A if side is None else side.taken(A)
    return A


@dataclass(frozen=True)
class _Side:
    """One side of a metric as blocks that one tensor can take in."""

    factor: Inexact[Tensor, "b i i"]
    inverse: Inexact[Tensor, "b i i"]
    at: Tensor
    index: int
    on_rows: bool

    def whitened(self, X: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
        """The factors on the rows of a matrix, block by block."""
        Y = torch.empty_like(X)
        Y[self.at] = self.factor[:, None] @ X[self.at]  # b s i k
        return Y

    def taken(self, A: Value) -> Value:
        """A value with the inverse root taken in."""
        matrix = contractions(A)[self.index].matrix
        C = matrix.blocks()
        C = self.inverse @ C if self.on_rows else C @ self.inverse.mH
        tensors = list(named_tensors(A).values())
        tensors[self.index] = matrix.with_blocks(C)
        return with_tensors(A, iter(tensors))


def _side(A: LinearOperator, M: LinearOperator, *, on_rows: bool) -> _Side | None:
    """The blocks on the diagonal that the outermost tensor sees, and their roots.

    They are averaged over its shared positions.
    """
    parts = contractions(A)
    free = [part.after is None if on_rows else part.before is None for part in parts]
    if not any(free):
        return None
    matrix, D = parts[free.index(True)].matrix, M.dense()
    matrix = matrix.T if on_rows else matrix
    order = matrix.split_inputs(torch.arange(len(D), device=D.device, dtype=torch.float64)[:, None])
    at = order[..., 0].long()  # b s i
    blocks = D[at[..., :, None], at[..., None, :]].mean(-3)
    factor, inverse = (t.dense() for t in whitening(DenseMatrix(blocks)))  # b i i
    return _Side(factor, inverse, at, free.index(True), on_rows)


def _double(A: LinearOperator) -> LinearOperator:
    """In double precision, real or complex."""
    return A.to(torch.promote_types(A.dtype, torch.float64))
