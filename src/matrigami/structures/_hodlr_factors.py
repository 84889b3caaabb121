"""The factors of a HODLR matrix: leaves first, then a capacitance matrix for every two siblings.

With `D` the two diagonal blocks of a halving, `A = D + [U_a, U_b] [0 I; I 0] [V_a, V_b].T`. Let
`W = D^-1 U` and `G = V.T W`. Then (Sherman, Morrison, Woodbury; Sylvester for the determinant)

    A^-1 B = Y - W M^-1 [V_b.T Y_b; V_a.T Y_a],   Y = D^-1 B,   M = [I G_b; G_a I],
    det A = det D det M.

A Hermitian positive definite matrix takes its symmetric factor instead (`_hodlr_root.py`).

Digits are lost where the columns of `U` and `V` are nearly dependent; so each block is first given
orthonormal ones, that share its singular values, except where a derivative is asked for.

Shapes: c = leaves of p rows, s = blocks of a level, r = rank, k = right-hand sides.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov import implicit_solve
from matrigami.operators import (
    is_concrete,
    is_differentiated,
    lu_slogdet,
    lu_solve,
    named_tensors,
    real_type,
    slogdet,
    solve,
)
from matrigami.structures._hodlr_root import symmetric_root

__all__ = ["HODLRFactors"]

REFINEMENTS = 2
"""Corrections by the residual: each gains the digits that the first solution has."""


class HODLRFactors(NamedTuple):
    """What a solution needs.

    Attributes:
        leaves: LU of the leaves, and its pivots.
        W: For each level, the finest first, `D^-1 U`.
        V: The right factors.
        joints: LU of the capacitance matrices, and its pivots.
    """

    leaves: tuple[Tensor, Tensor]
    W: list[Tensor]
    V: list[Tensor]
    joints: list[tuple[Tensor, Tensor]]

    def solve(self, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """`A^-1 B`, level by level."""
        Y = _lu_solve(self.leaves, B.unflatten(-2, (self.leaves[0].shape[-3], -1)))
        Y = Y.flatten(-3, -2)
        for W, V, joint in zip(self.W, self.V, self.joints, strict=True):
            Y = Y - _through_joint(W, V, joint, Y)
        return Y


def factorized(A: Any) -> HODLRFactors:
    """Factorise a square HODLR matrix; every step is differentiable."""
    leaves = torch.linalg.lu_factor_ex(A.leaves)[:2]
    c = A.leaves.shape[-3]
    factors = HODLRFactors(leaves, [], [], [])
    if not A.left:
        return factors
    ranks = [U.shape[-1] for U in A.left]
    batch = torch.broadcast_shapes(*[U.shape[:-3] for U in A.left])
    columns = [U.flatten(-3, -2).expand(*batch, -1, U.shape[-1]) for U in A.left]
    Z = _lu_solve(leaves, torch.cat(columns, -1).unflatten(-2, (c, -1))).flatten(-3, -2)
    for U, V in zip(reversed(A.left), reversed(A.right), strict=True):
        Z, W = Z.split([sum(ranks) - U.shape[-1], U.shape[-1]], -1)
        ranks.pop()
        W = W.unflatten(-2, (U.shape[-3], -1))
        joint = torch.linalg.lu_factor_ex(_capacitance(V.mT @ W))[:2]
        Z = Z - _through_joint(W, V, joint, Z)
        factors.W.append(W)
        factors.V.append(V)
        factors.joints.append(joint)
    return factors


@torch.no_grad()
def orthogonalized(A: Any) -> Any:
    """The same matrix; the factors of a block are its singular vectors times their roots."""
    left, right = [], []
    for U, V in zip(A.left, A.right, strict=True):
        (Q1, R1), (Q2, R2) = torch.linalg.qr(U), torch.linalg.qr(siblings(V))
        L, values, Rh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
        roots = values.sqrt()[..., None, :]
        left.append(Q1 @ (L * roots))
        right.append(siblings(Q2 @ (Rh.mT * roots)))
    return type(A)(A.leaves, tuple(left), tuple(right))


def siblings(W: Inexact[Tensor, "... s m r"]) -> Inexact[Tensor, "... s m r"]:
    """What belongs to the sibling of each block."""
    return W.unflatten(-3, (-1, 2)).flip(-3).flatten(-4, -3)


def _capacitance(G: Inexact[Tensor, "... s r r"]) -> Inexact[Tensor, "... h r2 r2"]:
    """`[I G_b; G_a I]` of every two siblings."""
    r = G.shape[-1]
    eye = torch.eye(r, dtype=G.dtype, device=G.device)
    a, b = G.unflatten(-3, (-1, 2)).unbind(-3)
    rows = [torch.cat([eye.expand_as(b), b], -1), torch.cat([a, eye.expand_as(a)], -1)]
    return torch.cat(rows, -2)


def _through_joint(
    W: Tensor, V: Tensor, joint: tuple[Tensor, Tensor], Y: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """`W M^-1 [V_b.T Y_b; V_a.T Y_a]`, what the coupling of two siblings takes away."""
    H = V.mT @ Y.unflatten(-2, V.shape[-3:-1])  # ... s r k
    r = H.shape[-2]
    H = H.unflatten(-3, (-1, 2)).flip(-3).flatten(-3, -2)  # ... h 2r k
    T = _lu_solve(joint, H).unflatten(-2, (2, r)).flatten(-4, -3)
    return (W @ T).flatten(-3, -2)


def _lu_solve(LU: tuple[Tensor, Tensor], B: Tensor) -> Tensor:
    """A solution by factors whose batch axes broadcast with those of the right-hand sides."""
    batch = torch.broadcast_shapes(LU[0].shape[:-2], B.shape[:-2])
    factors, pivots = LU
    return torch.linalg.lu_solve(
        factors.expand(*batch, *factors.shape[-2:]),
        pivots.expand(*batch, pivots.shape[-1]),
        B.expand(*batch, *B.shape[-2:]),
    )


def _is_regular(factors: HODLRFactors) -> bool:
    """Whether no pivot is zero: a regular matrix may have a singular leaf."""
    parts = (factors.leaves, *factors.joints)
    pivots = [torch.diagonal(LU, dim1=-2, dim2=-1) for LU, _ in parts]
    return not is_concrete(*pivots) or all(bool((d != 0).all()) for d in pivots)


def hodlr_solve(A: Any, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    """`A^-1 B`; the derivative comes from the adjoint equation."""
    return implicit_solve(A, B, _by_factors)


def _by_factors(A: Any, B: Tensor) -> Tensor:
    """Factorise, solve, and refine while that makes the residual smaller."""
    if B.numel() == 0:
        return B.clone()
    solver = _solver(A)
    if solver is None:
        return lu_solve(A.dense(), B)
    X = solver(B)
    R = B - A.matmat(X)
    for _ in range(REFINEMENTS):
        Y = X + solver(R)
        S = B - A.matmat(Y)
        better = S.norm(dim=-2, keepdim=True) < R.norm(dim=-2, keepdim=True)
        X, R = torch.where(better, Y, X), torch.where(better, S, R)
    return X


def _solver(A: Any) -> Callable[[Tensor], Tensor] | None:
    """The solution by the symmetric factor if there is one; None if a pivot is zero."""
    W = symmetric_root(A)
    if W is not None:
        return lambda B: solve(W.H, solve(W, B))
    factors = factorized(orthogonalized(A))
    return factors.solve if _is_regular(factors) else None


def determinant(A: Any) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Sign and logarithm of the determinant, from the pivots of all factors."""
    differentiated = is_differentiated(*named_tensors(A).values())
    W = None if differentiated else symmetric_root(A)
    if W is not None:
        sign, log = slogdet(W)
        return sign, 2 * log
    factors = factorized(A if differentiated else orthogonalized(A))
    if not _is_regular(factors):
        return lu_slogdet(A.dense())
    sign = torch.ones((), dtype=A.dtype, device=A.device)
    log = torch.zeros((), dtype=real_type(A.dtype), device=A.device)
    for LU, pivots in (factors.leaves, *factors.joints):
        d = torch.diagonal(LU, dim1=-2, dim2=-1)
        order = torch.arange(1, d.shape[-1] + 1, device=d.device, dtype=pivots.dtype)
        parity = 1 - 2 * ((pivots != order).sum((-2, -1)) % 2)
        sign, log = sign * parity * d.sgn().prod(-1).prod(-1), log + d.abs().log().sum((-2, -1))
    return sign, log
