"""Dense factorisations whose derivatives are right, in every nesting and where values repeat.

Torch's own rules for `linalg.solve`, `inv` and `slogdet` drop a term of the second derivative in
forward mode (the factors carry no tangent); the same answers from an LU factorisation do not.

Shapes: m = rows, n = columns or rows and columns, k = right-hand sides, r = rank.
"""

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

LOST = 1e-2
"""Relative residual of a direct solution above which its matrix counts as singular."""


def is_concrete(*tensors: Tensor) -> bool:
    """Whether numbers can be looked at: not while tracing, under `vmap`, or on the meta device."""
    if torch.compiler.is_compiling():
        return False
    return not any(is_functorch_wrapped_tensor(t) or t.device.type == "meta" for t in tensors)


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether somebody may ask for a derivative: by autograd, forward mode or `torch.func`."""
    if torch.compiler.is_compiling():
        return True
    return any(
        (t.requires_grad and torch.is_grad_enabled())
        or is_functorch_wrapped_tensor(t)
        or torch.autograd.forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )


def lu_solve(
    D: Inexact[Tensor, "*#batch n n"], B: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """`D^-1 B` by LU with partial pivoting.

    Raises:
        torch.linalg.LinAlgError: If `D` is singular.
    """
    batch = torch.broadcast_shapes(D.shape[:-2], B.shape[:-2])
    try:
        LU, pivots = torch.linalg.lu_factor(D)
    except RuntimeError as error:  # torch raises no LinAlgError here
        if "is zero" not in str(error):
            raise
        raise torch.linalg.LinAlgError(str(error)) from error
    n, k = B.shape[-2:]
    X = torch.linalg.lu_solve(
        LU.expand(*batch, n, n), pivots.expand(*batch, n), B.expand(*batch, n, k)
    )
    if is_concrete(LU, X) and X.numel() and _has_small_pivot(LU.detach()):
        refuse_lost(D.detach() @ X.detach(), B.detach())
    return X


def _has_small_pivot(LU: Inexact[Tensor, "*batch n n"]) -> bool:
    """Whether rounding alone may have kept a matrix from being singular."""
    d = torch.diagonal(LU, dim1=-2, dim2=-1).abs()
    rounding = LU.shape[-1] * torch.finfo(LU.dtype).eps
    return bool((d.amin(-1) <= rounding * d.amax(-1)).any())


def refuse_lost(Y: Inexact[Tensor, "... n k"], B: Inexact[Tensor, "... n k"]) -> None:
    """Refuse a solution whose image has no two digits of the right-hand side.

    Raises:
        torch.linalg.LinAlgError: If there is one among the columns.
    """
    rest = torch.linalg.vector_norm(Y - B, dim=-2)
    if bool((rest > LOST * torch.linalg.vector_norm(B, dim=-2)).any()):
        raise torch.linalg.LinAlgError("singular in working precision")


def lu_inverse(D: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """`D^-1` by LU with partial pivoting.

    Raises:
        torch.linalg.LinAlgError: If `D` is singular.
    """
    return lu_solve(D, torch.eye(D.shape[-1], dtype=D.dtype, device=D.device))


def lu_slogdet(
    D: Inexact[Tensor, "*batch n n"],
) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    """Sign (of a complex matrix the phase) and logarithm of the size of the determinant."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(D)
    d = torch.diagonal(LU, dim1=-2, dim2=-1)
    moves = pivots != torch.arange(1, D.shape[-1] + 1, device=D.device, dtype=pivots.dtype)
    parity = 1 - 2 * (moves.sum(-1) % 2)
    return parity * d.sgn().prod(-1), d.abs().log().sum(-1)


def matrix_power(D: Inexact[Tensor, "*batch n n"], p: int) -> Inexact[Tensor, "*batch n n"]:
    """`D^p` for a whole `p`, by repeated squaring."""
    return torch.linalg.matrix_power(lu_inverse(D) if p < 0 else D, abs(p))


SKEW = 1e-2
"""A difference from the adjoint above this share of the largest entry is no rounding error."""


def is_hermitian(D: Inexact[Tensor, "*batch n n"], tolerance: float | None = None) -> bool:
    """Whether a matrix surely equals its adjoint, up to the rounding of a product that made it."""
    if D.shape[-1] != D.shape[-2] or not is_concrete(D):
        return False
    D = D.detach()
    rounding = D.shape[-1] * torch.finfo(D.dtype).eps if tolerance is None else tolerance
    return D.numel() == 0 or bool((D - D.mH).abs().max() <= rounding * D.abs().max())


def root_of_squares(
    squares: Inexact[Tensor, "*batch"], value: Inexact[Tensor, "*batch"] | None = None
) -> Inexact[Tensor, "*batch"]:
    """`sqrt(squares)`, with a zero derivative at zero.

    Args:
        squares: A sum of squares, with the derivative that is wanted.
        value: The same root, computed in a way that loses no digits; its derivative is not used.
    """
    fixed = squares.detach()
    value = fixed.clamp(min=0).sqrt() if value is None else value.detach()  # rounding, below zero
    regular = (value > 0) & (fixed > 0)
    ratio = torch.where(regular, squares / torch.where(regular, fixed, 1), 1)
    return torch.where(regular, value * ratio.sqrt(), value)


def vector_norm(
    X: Inexact[Tensor, "..."], dim: int | tuple[int, ...], order: float = 2
) -> Inexact[Tensor, "..."]:
    """That of torch, whose squares may leave the range, and with derivatives at zero.

    They are zero in every order; torch's second one is NaN, even where it is multiplied by zero.
    """
    size = torch.linalg.vector_norm(X, ord=order, dim=dim)
    if not X.numel() or (is_concrete(size) and bool(((size > 0) & size.isfinite()).all())):
        return size
    peak = X.detach().abs().amax(dim, keepdim=True)
    zero = peak == 0
    peak = torch.where(zero | ~peak.isfinite(), 1, peak)
    unit = torch.where(zero, 1, X / peak)
    size = torch.linalg.vector_norm(unit, ord=order, dim=dim, keepdim=True)
    return torch.where(zero, 0, size * peak).squeeze(dim)


def truncated_svd(
    M: Inexact[Tensor, "*batch m n"], rank: int, *, balanced: bool = True
) -> tuple[Inexact[Tensor, "*batch m r"], Inexact[Tensor, "*batch r n"]]:
    """Factors `L @ R` of the best rank-`r` approximation (Eckart and Young 1936).

    Balanced factors share the singular values; otherwise `L` is orthonormal and `R` carries them.
    Derivatives, first and second, are those of the product; they are right where singular values
    within the rank repeat, for they depend on the gap behind the rank alone.
    """
    half = M.dtype in {torch.float16, torch.bfloat16}
    D = M.float() if half else M
    U, S, Vh = torch.linalg.svd(D.detach(), full_matrices=False)
    L, R = U[..., :rank], Vh[..., :rank, :]
    if is_differentiated(M):
        L, R = moving_spaces(D, U, S, Vh, rank)
    else:
        R = S[..., :rank, None] * R
    if balanced:
        root = S[..., :rank].sqrt()
        L, R = L * root[..., None, :], R / torch.where(root > 0, root, 1)[..., None]
    return (L.to(M.dtype), R.to(M.dtype)) if half else (L, R)


def moving_spaces(D: Any, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`L @ R = P D` with `P` the projector onto the leading left space, to second order in `D`.

    A tensor or a value `D`; `U`, `S` and `Vh` are its singular vectors and values, as they are.

    In the fixed bases, `E = U.H D V`. The leading spaces of a perturbed `E` are spanned by
    `[I; T]` and `[I; Z]`; stationarity of both gives, to first order and then to the next,
    `T S1 - S2 Z = E21 + ...` and `Z S1 - S2 T = E12.H + ...`, two equations for each pair of
    singular values. Outside the thin bases `S2 = 0`.
    """
    U1, U2, V1, V2 = U[..., :rank], U[..., rank:], Vh[..., :rank, :].mH, Vh[..., rank:, :].mH
    s1, s2 = S[..., None, :rank], S[..., rank:, None]
    DV, UD = D @ V1, U1.mH @ D
    A = U1.mH @ DV  # leading block
    left = DV - U1 @ A  # E21 in all of its space, m x r
    right = UD.mH - V1 @ A.mH  # E12.H, n x r
    gap = torch.where(s1 > s2, s1.square() - s2.square(), torch.inf)
    top = torch.where(s1 > 0, s1, torch.inf)

    def solved(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`T, Z` with `T S1 - S2 Z = f`, `Z S1 - S2 T = g`, in and beyond the thin bases."""
        f2, g2 = U2.mH @ f, V2.mH @ g
        inner = U2 @ ((s1 * f2 + s2 * g2) / gap), V2 @ ((s1 * g2 + s2 * f2) / gap)
        return inner[0] + (f - U2 @ f2) / top, inner[1] + (g - V2 @ g2) / top

    T, Z = solved(left, right)
    fixed_s1 = s1
    for _ in range(2):  # the equations in full: E21 + E22 Z = T (E11 + E12 Z), and the adjoint
        K = A + right.mH @ Z
        J = A.mH + left.mH @ T
        beyond = D @ Z - U1 @ (UD @ Z) - U2 @ (S[..., rank:, None] * (V2.mH @ Z))
        back = D.mH @ T - V1 @ (DV.mH @ T) - V2 @ (S[..., rank:, None] * (U2.mH @ T))
        T, Z = solved(left + beyond - (T @ K - T * fixed_s1), right + back - (Z @ J - Z * fixed_s1))
    L = U1 + T
    eye = torch.eye(rank, dtype=D.dtype, device=D.device)
    return L, lu_solve(eye + T.mH @ T, L.mH @ D)
