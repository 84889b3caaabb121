"""HODLR matrices whose rows are owned by several processes.

On the first level with a node for every process, nodes are dealt out in runs. Everything below is
the owner's alone: a stack of smaller HODLR matrices `D`. What couples nodes above has few numbers
for each node, which are summed over all processes: `A = D + U P V.T`, where `P` exchanges siblings.
So a product is one sum, and a solution is direct (Sherman, Morrison and Woodbury):
`A^-1 = D^-1 - D^-1 U (I + P V.T D^-1 U)^-1 P V.T D^-1`.

Shapes: t = nodes of a process, m = rows of a node, n = rows of a process, r = rank, k = vectors,
K = coefficients of all levels above.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.geometry._shares import Group
from matrigami.operators import (
    Cost,
    CroppedMatrix,
    LinearOperator,
    Places,
    cost,
    slogdet,
    solve,
)
from matrigami.structures import HODLRMatrix, PermutedMatrix


class _Sum(torch.autograd.Function):
    """The sum over all processes, on all of them; its adjoint is the same."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, group: Group) -> Tensor:
        """Add up."""
        ctx.group = group
        total = X.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add up."""
        return _summed(grads[0], ctx.group), None


def _summed(X: Tensor, group: Group) -> Tensor:
    """The sum over all processes."""
    return _Sum.apply(X.contiguous(), group)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False, repr=False)
class SharedTreesMatrix(LinearOperator):
    """The rows and columns of one process.

    Args:
        trees: What is below its nodes, a stack.
        left: For each level above, the factors in its rows.
        right: For each level above, the factors in its columns.
        above: For each level above, the ancestor of each node.
        place: Where its rows are in its nodes.
        group: The processes.
    """

    trees: HODLRMatrix
    left: tuple[Inexact[Tensor, "t m _"], ...]
    right: tuple[Inexact[Tensor, "t m _"], ...]
    above: tuple[Places, ...]
    place: Places
    group: Group

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of this process."""
        return (len(self.place.index), len(self.place.index))

    def matmat(self, X: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
        """The own blocks, and what the sum over all processes says of the others."""
        Z = self._in_nodes(X)
        Y = self.trees.matmat(Z)
        if self.left:
            W = _summed(self._coefficients(Z), self.group)[self._siblings()]
            Y = Y + torch.cat(self.left, -1) @ W[self._columns()]
        return self._outside(Y)

    @property
    def T(self) -> "SharedTreesMatrix":
        """The transposed stack; left and right change places."""
        return SharedTreesMatrix(
            self.trees.T, self.right, self.left, self.above, self.place, self.group
        )

    def dense(self) -> Inexact[Tensor, "m n"]:
        """The rows and columns of this process."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))

    def solution(self, B: Inexact[Tensor, "n k"]) -> Inexact[Tensor, "n k"]:
        """The rows of this process of `A^-1 B`, with a step of refinement."""
        if not self.left:
            return self._outside(solve(self.trees, self._in_nodes(B)))
        F = solve(self.trees, torch.cat(self.left, -1))
        capacitance = torch.linalg.lu_factor(self._capacitance(F))

        def approximate(R: Tensor) -> Tensor:
            """By the formula."""
            Z = solve(self.trees, self._in_nodes(R))
            right = _summed(self._coefficients(Z), self.group)[self._siblings()]
            return self._outside(
                Z - F @ torch.linalg.lu_solve(*capacitance, right)[self._columns()]
            )

        X = approximate(B)
        return X + approximate(B - self.matmat(X))

    def determinant(self) -> tuple[Tensor, Tensor]:
        """Sign and logarithm of that of the whole matrix."""
        signs, logs = slogdet(self.trees)
        log = _summed(logs.sum(), self.group)
        sign = signs.new_ones(dist.get_world_size(self.group))
        sign[dist.get_rank(self.group)] = signs.prod()
        dist.all_reduce(sign, dist.ReduceOp.PRODUCT, group=self.group)
        if not self.left:
            return sign.prod(), log
        last = torch.linalg.slogdet(self._capacitance(solve(self.trees, torch.cat(self.left, -1))))
        return sign.prod() * last.sign, log + last.logabsdet

    def _in_nodes(self, X: Tensor) -> Inexact[Tensor, "t m k"]:
        """Rows in their nodes; zeros where there is nobody."""
        t, m = self.trees.shape[0], self.trees.shape[-1]
        zeros = X.new_zeros(t * m, X.shape[-1])
        return zeros.index_copy(0, self.place.on(X.device), X).unflatten(0, (t, m))

    def _outside(self, Y: Inexact[Tensor, "t m k"]) -> Inexact[Tensor, "n k"]:
        """Rows of nodes as those of the process."""
        return Y.flatten(0, 1)[self.place.on(Y.device)]

    def _coefficients(self, Z: Inexact[Tensor, "t m k"]) -> Inexact[Tensor, "K k"]:
        """What the own columns add to those of all levels."""
        W = torch.cat(self.right, -1).mT @ Z  # t (levels r) k
        columns = self._columns().to(Z.device)
        return Z.new_zeros(self._total, Z.shape[-1]).index_add(
            0, columns.flatten(), W.flatten(0, 1)
        )

    @property
    def _total(self) -> int:
        """The coefficients of all levels."""
        return sum(2 ** (i + 1) * F.shape[-1] for i, F in enumerate(self.left))

    def _columns(self) -> Int[Tensor, "t _"]:
        """The places of the coefficients of each node, level after level."""
        found, first = [], 0
        for i, (F, above) in enumerate(zip(self.left, self.above, strict=True)):
            r = F.shape[-1]
            found.append(first + above.index[:, None] * r + torch.arange(r))
            first += 2 ** (i + 1) * r
        return torch.cat(found, 1)

    def _siblings(self) -> Int[Tensor, " K"]:
        """For each coefficient that of the sibling."""
        found, first = [], 0
        for i, F in enumerate(self.left):
            r, s = F.shape[-1], 2 ** (i + 1)
            index = torch.arange(s * r).reshape(s // 2, 2, r).flip(1).flatten()
            found.append(first + index)
            first += s * r
        return torch.cat(found)

    def _capacitance(self, F: Inexact[Tensor, "t m _"]) -> Inexact[Tensor, "K K"]:
        """`I + P V.T D^-1 U`."""
        K, columns = self._total, self._columns()
        W = torch.cat(self.right, -1).mT @ F  # t (levels r) (levels r)
        places = (columns[:, :, None] * K + columns[:, None, :]).flatten().to(F.device)
        G = F.new_zeros(K * K).index_add(0, places, W.flatten()).reshape(K, K)
        eye = torch.eye(K, dtype=F.dtype, device=F.device)
        return eye + _summed(G, self.group)[self._siblings()]


@cost.register
def _(A: SharedTreesMatrix) -> Cost:
    """Of this process."""
    numbers = sum(F.numel() for F in (*A.left, *A.right))
    size = sum(F.nbytes for F in (*A.left, *A.right))
    return cost(A.trees) + Cost(numbers, numbers, size)


def hodlr_of(A: LinearOperator) -> tuple[HODLRMatrix, Int[Tensor, " n"]] | None:
    """The HODLR matrix in another one, and the place of each row in it; None for other matrices."""
    n, place = A.shape[-1], torch.arange(A.shape[-1])
    if isinstance(A, PermutedMatrix) and A.columns is None:
        A, place = A.matrix, A.rows.index
    A = A.padded if isinstance(A, CroppedMatrix) else A
    square = isinstance(A, HODLRMatrix) and A.shape == (A.shape[-1],) * 2 and len(place) == n
    return (A, place) if square else None  # pyright: ignore[reportReturnType]


def shared_trees(
    A: HODLRMatrix, place: Int[Tensor, " n"], group: Group
) -> tuple[SharedTreesMatrix, Int[Tensor, " n"]]:
    """What a process owns, and the owner of each row.

    Raises:
        ValueError: If there are fewer leaves than processes.
    """
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    top, c = math.ceil(math.log2(processes)), A.leaves.shape[0]
    if 2**top > c:
        raise ValueError(
            f"distributed(A): A has {c} leaves for {processes} processes.\n"
            "Each process owns a leaf or more.\nUse fewer processes, or more rows."
        )
    N, m = 2**top, A.shape[-1] // 2**top
    owner = torch.arange(N) * processes // N
    own = (owner == rank).nonzero()[:, 0]

    def below(t: Tensor) -> Tensor:
        """The blocks of a level that are in the own nodes."""
        return t.unflatten(0, (N, -1))[own]

    def beside(t: Tensor) -> Tensor:
        """The rows of a level's factors that are in the own nodes."""
        return t.flatten(0, 1).unflatten(0, (N, m))[own]

    B = _alone(A, place)
    trees = HODLRMatrix(
        below(B.leaves), tuple(map(below, B.left[top:])), tuple(map(below, B.right[top:]))
    )
    owners = owner[place // m]
    mine = place[owners == rank]
    slot = torch.full((N,), -1)
    slot[own] = torch.arange(len(own))
    above = tuple([Places(own // 2 ** (top - 1 - i)) for i in range(top)])
    local = SharedTreesMatrix(
        trees,
        tuple(map(beside, B.left[:top])),
        tuple(map(beside, B.right[:top])),
        above,
        Places(slot[mine // m] * m + mine % m),
        group,
    )
    return local, owners


def _alone(A: HODLRMatrix, place: Int[Tensor, " n"]) -> HODLRMatrix:
    """Ones on the diagonal, and nothing beside them, in rows that are nobody's."""
    keep = torch.zeros(A.shape[-1], dtype=torch.bool, device=A.device)
    keep[place] = True
    inside = keep.reshape(A.leaves.shape[:2])
    both = inside[:, :, None] & inside[:, None, :]
    leaves = A.leaves * both + torch.diag_embed((~inside).to(A.dtype))
    left, right = (
        tuple([F * keep.reshape(*F.shape[:2], 1) for F in side]) for side in (A.left, A.right)
    )
    return HODLRMatrix(leaves, left, right)
