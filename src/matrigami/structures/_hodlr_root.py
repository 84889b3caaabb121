"""The symmetric factor of a positive definite HODLR matrix, `A = W W.H`.

Leaves have Cholesky factors. Where two siblings are joined, let the factors of both already stand
on either side; what remains is `I + [0, K_a K_b.H; K_b K_a.H, 0]`, and with `K = Q R`, the columns
of `Q` orthonormal, and `T = R_a R_b.H`,

    F = I + Q (C - I) Q.H,   C C.H = [I, T; T.H, I],   W = L F_finest ... F_coarsest.

`A` is positive definite if and only if all these Cholesky factors exist: the singular values of `T`
are cosines between siblings. Then `log det A = 2 log det L + 2 sum of log det C`. Every `C` is as
well conditioned as `A` allows, which capacitance matrices of the general solution are not.
Source: Ambikasaran, O'Neil and Singh (2016), arXiv:1405.0223.

Shapes: c = leaves of p rows, s = blocks of a level, h = s / 2, m = rows of a block, r = rank, k =
vectors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov import is_hermitian
from matrigami.operators import (
    Cost,
    LinearOperator,
    cost,
    is_concrete,
    named_tensors,
    real_type,
    slogdet,
    solve,
)

__all__ = ["HODLRRootMatrix"]

Array = Inexact[Tensor, "..."]


@dataclass(frozen=True, eq=False, repr=False)
class HODLRRootMatrix(LinearOperator):
    """The factor `W`, or with `upper` its transpose: a product of sparse triangular matrices.

    Args:
        leaves: Cholesky factors of the leaves.
        bases: For each level, the finest first, an orthonormal basis of each block; `solve` and
            `slogdet` rely on that.
        joints: For each level, the Cholesky factor that joins each two siblings.
        upper: Whether this is the transpose.
    """

    leaves: Inexact[Tensor, "*batch c p p"]
    bases: tuple[Inexact[Tensor, "*batch _ _ _"], ...] = ()
    joints: tuple[Inexact[Tensor, "*batch _ _ _"], ...] = ()
    upper: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        *batch, c, p, _ = self.leaves.shape
        return (*batch, c * p, c * p)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Level by level, and the leaves: two products each."""
        if self.upper:
            X = self._leaves_times(X)
        levels = list(zip(self.bases, self.joints, strict=True))
        for Q, C in levels if self.upper else reversed(levels):
            X = _joined(Q.conj(), C.mT, X) if self.upper else _joined(Q, C, X)
        return X if self.upper else self._leaves_times(X)

    def _leaves_times(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """The factors of the leaves times vectors."""
        L = self.leaves.mT if self.upper else self.leaves
        return (L @ X.unflatten(-2, L.shape[-3:-1])).flatten(-3, -2)

    @property
    def T(self) -> "HODLRRootMatrix":
        """The factors in reverse order, each transposed."""
        return HODLRRootMatrix(self.leaves, self.bases, self.joints, not self.upper)

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


def _pairs(Q: Array, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... h _ k"]:
    """The coefficients of every two siblings."""
    s, m, _ = Q.shape[-3:]
    return (Q.mH @ X.unflatten(-2, (s, m))).unflatten(-3, (s // 2, 2)).flatten(-3, -2)


def _changed(Q: Array, X: Inexact[Tensor, "... n k"], change: Array) -> Inexact[Tensor, "... n k"]:
    """Vectors, and what is added to their coefficients."""
    r = Q.shape[-1]
    return X + (Q @ change.unflatten(-2, (2, r)).flatten(-4, -3)).flatten(-3, -2)


def _joined(Q: Array, C: Array, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """`(I + Q (C - I) Q.H) X` for every two siblings."""
    pairs = _pairs(Q, X)
    return _changed(Q, X, C @ pairs - pairs)


def _parted(
    Q: Array, C: Array, X: Inexact[Tensor, "... n k"], *, upper: bool = False
) -> Inexact[Tensor, "... n k"]:
    """`(I + Q (C - I) Q.H)^-1 X = (I + Q (C^-1 - I) Q.H) X`."""
    pairs = _pairs(Q, X)
    return _changed(Q, X, torch.linalg.solve_triangular(C, pairs, upper=upper) - pairs)


@solve.register
def _(A: HODLRRootMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """The factors one by one, in the order of the product."""
    levels = [
        (Q.conj(), C.mT) if A.upper else (Q, C) for Q, C in zip(A.bases, A.joints, strict=True)
    ]
    B = B if A.upper else _leaves_solve(A, B)
    for Q, C in reversed(levels) if A.upper else levels:
        B = _parted(Q, C, B, upper=A.upper)
    return _leaves_solve(A, B) if A.upper else B


def _leaves_solve(A: HODLRRootMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """The leaves alone."""
    L = A.leaves.mT if A.upper else A.leaves
    X = B.unflatten(-2, L.shape[-3:-1])
    return torch.linalg.solve_triangular(L, X, upper=A.upper).flatten(-3, -2)


@slogdet.register
def _(A: HODLRRootMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """All pivots are positive."""
    log = A.leaves.new_zeros((), dtype=real_type(A.dtype))
    for L in (A.leaves, *A.joints):
        log = log + torch.diagonal(L, dim1=-2, dim2=-1).real.log().sum((-2, -1))
    return torch.ones_like(log, dtype=A.dtype), log


@cost.register
def _(A: HODLRRootMatrix) -> Cost:
    """Every basis multiplies twice."""
    tensors = named_tensors(A).values()
    stored, again = sum(t.numel() for t in tensors), sum(Q.numel() for Q in A.bases)
    return Cost(stored, stored + again, sum(t.nbytes for t in tensors))


def symmetric_root(A: Any) -> HODLRRootMatrix | None:
    """`W` with `A = W W.H`; None if a HODLR matrix is not Hermitian and positive definite.

    Args:
        A: A square HODLR matrix, of which half of the factors are read: those of one of two
            siblings.
    """
    if not is_concrete(*named_tensors(A).values()) or not is_hermitian(A):
        return None
    leaves, info = torch.linalg.cholesky_ex(A.leaves)
    sides, ranks = _sides(A), [U.shape[-1] for U in A.left]
    c, p, _ = A.leaves.shape[-3:]
    Z = torch.cat(sides, -1) if sides else A.leaves.new_zeros(c * p, 0)
    Z = torch.linalg.solve_triangular(leaves, Z.unflatten(-2, (c, p)), upper=False).flatten(-3, -2)
    bases, joints, failed = [], [], info.any()
    for U in reversed(A.left):
        r = ranks.pop()
        Z, K = Z.split([sum(ranks), r], -1)
        Q, R = torch.linalg.qr(K.unflatten(-2, U.shape[-3:-1]))
        a, b = R.unflatten(-3, (-1, 2)).unbind(-3)
        eye = torch.eye(R.shape[-2], dtype=A.dtype, device=A.device).expand_as(a @ b.mH)
        T = a @ b.mH
        M = torch.cat([torch.cat([eye, T], -1), torch.cat([T.mH, eye], -1)], -2)
        C, info = torch.linalg.cholesky_ex(M)
        failed = failed | info.any()
        Z = _parted(Q, C, Z)
        bases.append(Q)
        joints.append(C)
    return None if failed else HODLRRootMatrix(leaves, tuple(bases), tuple(joints))


def _sides(A: Any) -> list[Inexact[Tensor, "... n r"]]:
    """`K` of each level, with `A_ab = K_a K_b.H`."""
    batch, sides = A.shape[:-2], []
    for U, V in zip(A.left, A.right, strict=True):
        first = (torch.arange(U.shape[-3], device=U.device) % 2 == 0)[:, None, None]
        K = torch.where(first, U, V.conj()).flatten(-3, -2)
        sides.append(K.expand(*batch, *K.shape[-2:]))
    return sides
