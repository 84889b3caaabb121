"""Fast multipole, H2 and HODLR matrices whose points are owned by several processes.

Each process keeps the blocks in the rows of its points, and computes their part of every product;
coefficients of cells travel where a neighbour needs them. Vectors are whole on every process, so
that every function of the algebra and every Krylov method works, and gives the same bits on all of
them; `local` is the product of the parts alone, for vectors that nobody should hold whole.

Shapes: m = rows, n = columns, k = vectors.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.geometry._shares import Group, owners, share
from matrigami.geometry._trees import SharedTreesMatrix, hodlr_of, shared_trees
from matrigami.geometry.particles._fast_multipole import fast_multipole_matrix
from matrigami.geometry.particles._kernels import Kernel
from matrigami.geometry.particles._matrix import checked, is_small, kernel_matrix
from matrigami.geometry.particles._points import TREE_BYTES, Numbers, check_memory
from matrigami.krylov import implicit_solve, is_large
from matrigami.operators import Cost, LinearOperator, Places, cost, slogdet, solve
from matrigami.structures import H2Matrix, HODLRMatrix, by_conjugate_gradients


class Split:
    """Which rows of a vector belong to which process.

    Args:
        owner: The owner of each row.
        group: The processes.
    """

    def __init__(self, owner: Int[Tensor, " n"], group: Group) -> None:
        self.group = group
        count = dist.get_world_size(group)
        self.rows = [(owner == j).nonzero()[:, 0] for j in range(count)]
        self.own = Places(self.rows[dist.get_rank(group)])

    def part(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... _ k"]:
        """The rows of this process."""
        return _Part.apply(X, self)  # pyright: ignore[reportReturnType]

    def whole(self, X: Inexact[Tensor, "... _ k"]) -> Inexact[Tensor, "... n k"]:
        """The rows of all processes, on all of them."""
        return _Whole.apply(X, self)  # pyright: ignore[reportReturnType]

    def gathered(self, X: Tensor) -> Tensor:
        """`whole`, without its derivative."""
        most = max(len(rows) for rows in self.rows)
        own = torch.nn.functional.pad(X, (0, 0, 0, most - X.shape[-2])).contiguous()
        found = own.new_empty(len(self.rows), *own.shape)
        dist.all_gather(list(found.unbind()), own, group=self.group)
        parts = [p[..., : len(r), :] for p, r in zip(found, self.rows, strict=True)]
        out = X.new_empty(*X.shape[:-2], sum(map(len, self.rows)), X.shape[-1])
        out[..., torch.cat(self.rows).to(X.device), :] = torch.cat(parts, -2)
        return out


class _Part(torch.autograd.Function):
    """Rows of a vector that is whole everywhere; the gradient is whole everywhere, too."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, split: Split) -> Tensor:
        """Take the rows."""
        ctx.split = split
        return X[..., split.own.on(X.device), :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gather."""
        return ctx.split.whole(grads[0]), None


class _Whole(torch.autograd.Function):
    """The adjoint."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, split: Split) -> Tensor:
        """Gather."""
        ctx.split = split
        return split.gathered(X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the rows."""
        return ctx.split.part(grads[0]), None


@dataclass(frozen=True, eq=False, repr=False)
class DistributedMatrix(LinearOperator):
    """A matrix whose rows are computed by several processes; a product is a collective.

    Args:
        local: From the columns of this process to its rows; it exchanges what it needs.
        rows: The rows of each process.
        columns: The columns of each process.
    """

    local: LinearOperator
    rows: Split
    columns: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns, of the whole matrix."""
        sizes = [sum(map(len, split.rows)) for split in (self.rows, self.columns)]
        return (*self.local.shape[:-2], *sizes)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Take the own columns, multiply together, gather the rows."""
        return self.rows.whole(self.local.matmat(self.columns.part(X)))

    @property
    def T(self) -> "DistributedMatrix":
        """The transpose: results are sent where operands were fetched."""
        return DistributedMatrix(self.local.T, self.columns, self.rows)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself, on every process."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


def distributed(A: LinearOperator, group: Group = None) -> DistributedMatrix:
    """Share the blocks of a matrix among processes; call it, and every product, on all of them.

    H2: cells are dealt out along the curve by their points; a process owns whole subtrees, and the
    few cells above them belong to the owner of their first child. HODLR: runs of nodes are dealt
    out; `solve` and `slogdet` are direct.

    Args:
        A: The value of `kernel_matrix` for many points, equal on all processes; a diagonal may have
            been added. Its blocks in the rows of others are dropped.
        group: The processes; by default all.

    Returns:
        A value of the same shape. `solve` and the Krylov methods give the same bits on all
        processes. Derivatives in vectors are whole on each; those in points and in the parameters
        of the kernel are the terms of the own blocks: add them up over the processes.
        `D.local @ x` multiplies the part of a vector that a process owns, at the columns
        `D.columns.own`, into the rows `D.rows.own`, without ever holding it whole.

    Raises:
        ValueError: If `A` is neither, there is no process group, or there are more processes than
            leaves.
    """
    halves = hodlr_of(A)
    if halves is None and not isinstance(A, H2Matrix):
        raise ValueError(
            f"distributed(A): A is {A!r}; it must be an H2Matrix or a HODLRMatrix.\n"
            "Few points make a dense matrix: one process is enough for them.\n"
            "Use kernel_matrix of many points."
        )
    _check_group()
    if isinstance(A, H2Matrix):
        found = owners(A, dist.get_world_size(group))
        local = share(A, found, dist.get_rank(group), group)
        return DistributedMatrix(local, Split(found.targets, group), Split(found.sources, group))
    local, owner = shared_trees(*cast("tuple[HODLRMatrix, Tensor]", halves), group)
    return DistributedMatrix(local, Split(owner, group), Split(owner, group))


def distributed_kernel_matrix(
    points: Numbers,
    kernel: str | Kernel,
    *,
    targets: Numbers | None = None,
    scale: Tensor | float = 1.0,
    tol: float | None = None,
    group: Group = None,
) -> DistributedMatrix:
    """`distributed(kernel_matrix(...))`, of which each process computes its own blocks alone.

    All have the coordinates and the tree, whose numbers are few; the near field and the bases at
    the points, which are most of time and memory, are of own points. On a line the whole matrix is
    built first, in a fraction of a second.

    Args:
        points: The sources, the same on all processes.
        kernel: As for `kernel_matrix`, and so `targets`, `scale` and `tol`.
        targets: The targets.
        scale: What distances are divided by.
        tol: The relative error.
        group: The processes; by default all.

    Raises:
        ValueError: As `kernel_matrix` and `distributed` do; few points are refused.
    """
    Y, X, function, tol = checked(points, kernel, targets, scale, tol)
    if is_small(Y, X, tol) or (X.shape[1] == 1 and targets is None):
        A = kernel_matrix(points, kernel, targets=targets, scale=scale, tol=tol)
        return distributed(A, group)
    _check_group()
    check_memory(f"the tree of {len(X)} points", len(X) * TREE_BYTES / X.dtype.itemsize, X)
    return distributed(fast_multipole_matrix(Y, X, function, scale, tol, planned=True), group)


def _check_group() -> None:
    """Refuse to share among nobody.

    Raises:
        ValueError: If there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "distributed(A): there is no process group.\n"
            "Start the program with torchrun, and call torch.distributed.init_process_group first."
        )


def _has_trees(A: Any, *_: Any) -> bool:
    """Whether solutions are direct."""
    return isinstance(A.local, SharedTreesMatrix)


def _directly(A: Any, B: Tensor) -> Tensor:
    """The solution of own rows, gathered."""
    return A.rows.whole(A.local.solution(A.columns.part(B)))


@solve.register(where=_has_trees)
def _(A: DistributedMatrix, B: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
    return implicit_solve(A, B, _directly)


@slogdet.register(where=_has_trees)
def _(A: DistributedMatrix) -> tuple[Tensor, Tensor]:
    local: Any = A.local
    return local.determinant()


@solve.register(where=lambda A, *_: is_large(A) and not _has_trees(A))
def _(A: DistributedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return implicit_solve(A, B, by_conjugate_gradients)


@cost.register
def _(A: DistributedMatrix) -> Cost:
    """Of this process."""
    return cost(A.local)
