"""Multigrid: a hierarchy of coarser equations that makes a preconditioner.

On a grid the coarse unknowns are every second one along each axis, and the coarse matrices
`P' A P` with linear interpolation `P`. For any other sparse matrix the hierarchy is that of
Ruge and Stueben (1987) as PyAMG builds it. Both run in torch as a symmetric V-cycle; the smoother
is a Chebyshev polynomial of degree 2 on the upper part of the spectrum (Adams et al. 2003).

Shapes: n = unknowns, k = right-hand sides.
"""

import warnings
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.geometry.mesh._diffusion import DiffusionMatrix
from matrigami.krylov import cg, implicit_solve
from matrigami.operators import (
    Cost,
    DiagonalMatrix,
    LinearOperator,
    as_array,
    cost,
    diagonal,
    iterate,
    lstsq,
    solve,
)
from matrigami.structures import SparseMatrix
from matrigami.structures._sparse import solve_sparse

COARSEST = 600
"""Unknowns that are solved directly."""

SHORT = 3
"""Unknowns of an axis that is not made coarser."""

SMOOTHED = 0.25
"""The part of the spectrum above which the smoother acts, relative to its upper end."""

FACTORED = 200_000
"""Rows up to which a sparse matrix is factorised (measured on the five-point stencil)."""

DIRECT = 20_000
"""Unknowns up to which sparse LU takes less time than a hierarchy (measured in two dimensions)."""


@dataclass(frozen=True, eq=False)
class _Level:
    """One equation: its matrix, the inverse of its diagonal, its largest eigenvalue, and `P`."""

    A: Tensor
    inverse_diagonal: Tensor
    top: float
    P: Tensor
    PT: Tensor


@dataclass(frozen=True, eq=False)
class _Hierarchy:
    """Levels from fine to coarse, and the inverse of the coarsest matrix."""

    levels: tuple[_Level, ...]
    inverse: Tensor

    def cycle(self, B: Tensor, depth: int = 0) -> Tensor:
        """Smooth, correct on the next level, smooth."""
        if depth == len(self.levels):
            return self.inverse @ B
        level = self.levels[depth]
        X = _smooth(level, torch.zeros_like(B), B)
        R = B - level.A @ X
        X = X + level.P @ self.cycle(level.PT @ R, depth + 1)
        return _smooth(level, X, B)


@dataclass(frozen=True, eq=False, repr=False)
class MultigridMatrix(LinearOperator):
    """One V-cycle: a symmetric positive definite approximation of an inverse.

    Args:
        empty: Nothing, in the type of the answers.
        hierarchy: The levels.
        n: Rows.
    """

    empty: Inexact[Tensor, " 0"]
    hierarchy: object
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns."""
        return (self.n, self.n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """A V-cycle; the axes of a stack are more columns."""
        columns = X.movedim(-2, 0).flatten(1).to(self.dtype)
        Y = self.hierarchy.cycle(columns)  # pyright: ignore[reportAttributeAccessIssue]
        return Y.unflatten(1, (*X.shape[:-2], X.shape[-1])).movedim(0, -2)

    @property
    def T(self) -> "MultigridMatrix":
        """Symmetric."""
        return self

    def dense(self) -> Inexact[Tensor, "n n"]:
        """The matrix itself, by products with the identity."""
        return self.matmat(torch.eye(self.n, dtype=self.dtype))

    def __repr__(self) -> str:
        """Size and unknowns of each level."""
        sizes = [len(level.inverse_diagonal) for level in self.hierarchy.levels]  # pyright: ignore[reportAttributeAccessIssue]
        return f"MultigridMatrix({self.n}x{self.n}, levels {sizes})"


def multigrid(A: LinearOperator) -> MultigridMatrix:
    """A preconditioner for symmetric positive definite equations on a mesh; built once, kept.

    Args:
        A: `Grid.stiffness` with a coefficient that varies, or a sparse matrix (which needs PyAMG:
            `pip install pyamg`).

    Returns:
        A V-cycle; give it as `solve(A, b, preconditioner=...)`, or to `matrigami.krylov.cg`.

    Raises:
        TypeError: If `A` is neither, or complex.

    Examples:
        >>> from matrigami.geometry.mesh import Grid
        >>> grid = Grid((31, 31))
        >>> A = grid.stiffness(lambda x, y: 1 + x * y)
        >>> multigrid(A)
        MultigridMatrix(961x961, levels [961])
    """
    if A.dtype.is_complex:
        raise TypeError(
            f"multigrid(A): A, a {A!r}, is complex, and not definite.\n"
            "Its real part has a hierarchy, which preconditions A in krylov.gmres."
        )
    if isinstance(A, DiffusionMatrix):
        matrices, steps = _grid_hierarchy(A)
    elif isinstance(A, SparseMatrix):
        matrices, steps = _algebraic_hierarchy(A)
    else:
        raise TypeError(
            f"multigrid(A): A is a {type(A).__name__}; it must be a DiffusionMatrix or a "
            "SparseMatrix.\nSuch are Grid(...).stiffness(function) and Simplices(...).stiffness()."
        )
    levels = [_level(M, P, A.dtype) for M, P in zip(matrices, steps, strict=False)]
    last = torch.as_tensor(matrices[-1].toarray())
    inverse = torch.linalg.pinv(last, hermitian=True).to(A.dtype)
    return MultigridMatrix(inverse.new_empty(0), _Hierarchy(tuple(levels), inverse), A.shape[-1])


def _smooth(level: _Level, X: Tensor, B: Tensor) -> Tensor:
    """Two steps of Chebyshev's iteration on `D^-1 A` between a part of its top and its top."""
    low, high = SMOOTHED * level.top, level.top
    centre, half = (high + low) / 2, (high - low) / 2
    d = level.inverse_diagonal[:, None]
    step = d * (B - level.A @ X) / centre
    X = X + step
    rho = half / centre
    new = 1 / (2 * centre / half - rho)
    step = new * rho * step + 2 * new / half * d * (B - level.A @ X)
    return X + step


def _level(A: Any, P: Any, dtype: torch.dtype) -> _Level:
    """The tensors of a level; its largest eigenvalue by Gershgorin's circles."""
    d = A.diagonal()
    top = float((abs(A) @ np.ones(len(d)) / d).max())
    inverse = torch.as_tensor(1 / d).to(dtype)
    return _Level(_csr(A, dtype), inverse, top, _csr(P, dtype), _csr(P.T.tocsr(), dtype))


def _csr(A: Any, dtype: torch.dtype) -> Tensor:
    """SciPy's rows as torch's, with short indices, which are faster."""
    pointers, indices = (torch.as_tensor(t.astype(np.int32)) for t in (A.indptr, A.indices))
    data = torch.as_tensor(A.data).to(dtype)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of being beta
        return torch.sparse_csr_tensor(pointers, indices, data, A.shape, check_invariants=False)


def _grid_hierarchy(A: DiffusionMatrix) -> tuple[list[Any], list[Any]]:
    """Every second unknown along each axis that is long enough."""
    from scipy.sparse import kron  # noqa: PLC0415 - heavy, and rarely needed

    matrices, steps, sizes = [_rows_of(A)], [], list(A.sizes)
    while int(np.prod(sizes)) > COARSEST and max(sizes) > SHORT:
        along = [_interpolation(n, end) for n, end in zip(sizes, A.ends, strict=True)]
        P = reduce(lambda a, b: kron(a, b, format="csr"), along)
        steps.append(P)
        matrices.append((P.T.tocsr() @ matrices[-1] @ P).tocsr())
        sizes = [p.shape[1] for p in along]
    return matrices, steps


def _algebraic_hierarchy(A: SparseMatrix) -> tuple[list[Any], list[Any]]:
    """PyAMG's."""
    try:
        import pyamg  # noqa: PLC0415 - an extra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "multigrid(A) of a sparse matrix needs PyAMG.\nInstall it: pip install pyamg."
        ) from error
    levels: Any = pyamg.ruge_stuben_solver(_scipy(A), max_coarse=COARSEST).levels
    return [level.A.tocsr() for level in levels], [level.P.tocsr() for level in levels[:-1]]


def _rows_of(A: DiffusionMatrix) -> Any:
    """As SciPy has it, in double precision."""
    from scipy.sparse import coo_matrix  # noqa: PLC0415 - heavy, and rarely needed

    entries, rows, columns = (as_array(t.detach()) for t in A.triplets())
    return coo_matrix((entries.astype(float), (rows, columns)), shape=A.shape[-2:]).tocsr()


def _scipy(A: SparseMatrix) -> Any:
    """As SciPy has it, in double precision."""
    from scipy.sparse import csr_matrix  # noqa: PLC0415 - heavy, and rarely needed

    parts = [as_array(t.detach()) for t in (A.entries.double(), A.columns, A.pointers)]
    return csr_matrix(tuple(parts), shape=A.size)


def _interpolation(n: int, end: str) -> Any:
    """Linear interpolation from every second unknown: between two, their mean."""
    from scipy.sparse import csr_matrix, identity  # noqa: PLC0415 - heavy, and rarely needed

    if n <= SHORT:
        return identity(n, format="csr")
    first = 1 if end == "dirichlet" else 0
    coarse = np.arange(first, n, 2)
    between = np.arange(1 - first, n, 2)
    column = {int(i): j for j, i in enumerate(coarse)}
    rows, columns, weights = list(coarse), list(range(len(coarse))), [1.0] * len(coarse)
    for i in map(int, between):
        sides = [(j % n if end == "periodic" else j) for j in (i - 1, i + 1)]
        found = [column[j] for j in sides if j in column]
        weight = 0.5 if end != "neumann" or len(found) == 2 else 1.0
        rows += [i] * len(found)
        columns += found
        weights += [weight] * len(found)
    return csr_matrix((weights, (rows, columns)), shape=(n, len(coarse)))


@solve.register
def _(A: DiffusionMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """Small ones by sparse LU, else conjugate gradients with a V-cycle.

    Raises:
        ValueError: If no boundary holds the values: only differences are determined.
    """
    if "dirichlet" not in A.ends:
        raise torch.linalg.LinAlgError("only differences of the unknowns are determined")
    return implicit_solve(A, B, _solved)


@lstsq.register(where=lambda A, *_: "dirichlet" not in A.ends)
def _(A: DiffusionMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """The solution of mean zero: constants are lost, so one unknown may be held while solving."""
    rows = A.sparse()
    held = diagonal(rows)[..., :1] * torch.eye(1, A.shape[-1], dtype=A.dtype, device=A.device)[0]
    X = solve_sparse(rows + DiagonalMatrix(held), B - B.mean(-2, keepdim=True))
    return X - X.mean(-2, keepdim=True)


def _large_definite(A: SparseMatrix, *_: Any, **__: Any) -> bool:
    """Whether a hierarchy is faster than sparse LU, may be used, and there is PyAMG for it."""
    is_real = not A.dtype.is_complex
    if len(A.shape) != 2 or A.shape[-1] < FACTORED or not is_real or find_spec("pyamg") is None:
        return False
    rows = _scipy(A)
    symmetric = abs(rows - rows.T).max() <= 1e-12 * abs(rows).max()
    return bool(symmetric and (rows.diagonal() > 0).all())


@solve.register(where=_large_definite)
def _(A: SparseMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """Conjugate gradients with PyAMG's hierarchy; sparse LU if they do not converge."""
    try:
        return iterate(A, B, None, multigrid(A), cg)
    except RuntimeError:  # not definite
        return solve_sparse(A, B)


def _solved(A: DiffusionMatrix, B: Tensor) -> Tensor:
    """By size."""
    if A.shape[-1] <= DIRECT or A.dtype.is_complex:
        return solve(A.sparse(), B)
    return iterate(A, B, None, multigrid(A), cg)


@cost.register
def _(A: MultigridMatrix) -> Cost:
    """The entries that a cycle passes: five products with each matrix, one with each step."""
    levels = A.hierarchy.levels  # pyright: ignore[reportAttributeAccessIssue]
    stored = [level.A.values().numel() for level in levels]
    steps = [2 * level.P.values().numel() for level in levels]
    direct = A.hierarchy.inverse.numel()  # pyright: ignore[reportAttributeAccessIssue]
    total = sum(stored) + sum(steps) + direct
    return Cost(total, 5 * sum(stored) + sum(steps) + direct, 8 * total)
