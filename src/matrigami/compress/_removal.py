"""Removal: which weights go, and how the others make up for them.

With the moments `A = E[x x.T]` of the inputs and `B = E[g g.T]` of the output gradients, removal
that turns `W` into `W'` raises the loss by `tr(B E A E.T) / 2`, `E = W - W'`. The support of a
sparse `W'` is found by ADMM, as ALPS does (Meng et al. 2024, arXiv 2406.07831) with `A` alone; with
both moments the same step is one division in their two eigenbases. Swaps then improve a support of
few weights. On a support the weights are found by conjugate gradients; where it is whole rows r and
columns c, they are `W'_rc = B_rr^-1 B_r: W A_:c A_cc^-1` (optimal brain surgeon on a Kronecker
product).

Shapes: m = rows, n = columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matrigami.compress._moments import checked_dampings, checked_moments, damped, row_losses
from matrigami.compress._supports import Support
from matrigami.compress._swaps import swapped
from matrigami.operators import LinearOperator

STEPS = 300
"""Most steps of ADMM."""

PENALTY = 0.1
"""First penalty of ADMM, for moments of unit diagonal."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Growth of the penalty where more than a share of the support has changed."""

SETTLED = 3e-4
"""Share of the support whose change ends ADMM, after its first 30 steps."""

PASSES = 3
"""Most searches by swaps where the rows depend on each other."""

CG_STEPS = 20
"""Conjugate-gradient steps for the weights on a support."""


@dataclass(frozen=True)
class Removal:
    """A sparse matrix, and how well it was done.

    Attributes:
        W: The weights, zero where `mask` is false.
        mask: Which weights stay.
        loss: `tr(B E A E.T) / tr(B W A W.T)`, on the held-out moment where there is one.
        damping: The damping that was used, relative to the mean of the diagonals.
    """

    W: Float[Tensor, "m n"]
    mask: Bool[Tensor, "m n"]
    loss: float
    damping: float


@torch.no_grad()
def remove(
    W: Float[Tensor, "m n"],
    support: Support,
    A: LinearOperator | Tensor | None = None,
    B: LinearOperator | Tensor | None = None,
    *,
    damping: float | tuple[float, ...] = 0.01,
    holdout: LinearOperator | Tensor | None = None,
) -> Removal:
    """Set weights to zero and fit the others so that the loss of the model rises least.

    Args:
        W: The weights, outputs by inputs.
        support: What may stay: `unstructured(0.5)`, `n_of_m(2, 4)`, `whole_columns(0.5)`, or any
            function of importances.
        A: Second moment of the inputs, `(n, n)`; None removes the smallest weights.
        B: Second moment of the output gradients, `(m, m)`; None treats all rows alike.
        damping: Added to the diagonals, relative to their mean. Of several the best is taken, by
            the held-out moment or else by `A`.
        holdout: Second moment of inputs that `A` has not seen.

    Raises:
        ValueError: If a moment does not fit or is none, or a damping is below zero.

    Examples:
        >>> from matrigami.compress import unstructured
        >>> W = torch.tensor([[1.0, 1.1]])
        >>> A = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # the inputs nearly agree
        >>> remove(W, unstructured(0.5), A, damping=0.0).W
        tensor([[0., 2.]])
    """
    work, inputs, B, judge = checked_moments("remove", W, A, B, holdout)
    if A is None or not W.numel():
        mask = support(work)
        kept = work * mask
        return Removal(kept.to(W.dtype), mask, _share(work - kept, work, judge, B), 0.0)
    kind = torch.promote_types(W.dtype, torch.float32)
    tried = []
    for d in checked_dampings("remove", damping):
        kept, mask = _removed(work, inputs, B, support, d, kind)
        told = mask, _share(work - kept, work, judge, B), d
        tried.append(Removal(kept.to(W.dtype), *told))
    return min(tried, key=lambda made: made.loss)


def _removed(
    W: Tensor, A: Tensor, B: Tensor | None, support: Support, damping: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """New weights and their support, in moments scaled to a unit diagonal."""
    A, B = damped(A, damping), None if B is None else damped(B, damping)
    a, b = _unit(A), None if B is None else _unit(B)
    scale = a if b is None else b[:, None] * a
    A, B = A / a / a[:, None], None if B is None or b is None else B / b / b[:, None]
    target = (W * scale).to(kind)
    mask = _support(target, A, B, support)
    A, B = A.to(kind), None if B is None else B.to(kind)
    fit, mask = _improved(target, fitted(target, mask, A, B), mask, A, B, support)
    return fit.double() / scale, mask


def fitted(W: Tensor, mask: Tensor, A: Tensor, B: Tensor | None = None) -> Tensor:
    """The weights on a support that are nearest in the metric; of whole rows and columns exact."""
    rows, columns = mask.any(1), mask.any(0)
    if not bool(mask.all()) and bool((mask == rows[:, None] & columns).all()):
        return _whole(W, rows, columns, A, B)

    def gradient(X: Tensor) -> Tensor:
        """`B X A` on the support."""
        return ((X if B is None else B @ X) @ A) * mask

    X = W * mask
    r = gradient(W - X)
    p, rho = r, r.square().sum()
    for _ in range(CG_STEPS):
        q = gradient(p)
        curvature = (p * q).sum()
        if not curvature > 0:
            break
        step = rho / curvature
        X, r = X + step * p, r - step * q
        rho, last = r.square().sum(), rho
        p = r + rho / last * p
    return X


def _whole(
    W: Tensor, rows: Bool[Tensor, " m"], columns: Bool[Tensor, " n"], A: Tensor, B: Tensor | None
) -> Tensor:
    """Those of some rows and columns: what the others are is left to them on both sides."""
    V = W @ A[:, columns] @ torch.linalg.pinv(A[columns][:, columns], hermitian=True)
    V = V[rows] if B is None else torch.linalg.pinv(B[rows][:, rows], hermitian=True) @ B[rows] @ V
    found = torch.zeros_like(W)
    found[rows[:, None] & columns] = V.flatten()
    return found


def _support(W: Tensor, A: Tensor, B: Tensor | None, support: Support) -> Tensor:
    """The support that ADMM settles on: `X` is free and near `W`, `D` is sparse, `X = D`.

    `X = argmin tr(B (W - X) A (W - X).T) / 2 + rho / 2 ||X - D + V / rho||^2` is a division in the
    eigenbases of `A` and `B`.
    """
    a, Q = (t.to(W.dtype) for t in torch.linalg.eigh(A))
    b, P = (None, None) if B is None else (t.to(W.dtype) for t in torch.linalg.eigh(B))
    curvature = a if b is None else b[:, None] * a
    there = lambda X: (X if P is None else P.mT @ X) @ Q  # noqa: E731
    back = lambda X: (X if P is None else P @ X) @ Q.mT  # noqa: E731
    pulled, rho = curvature * there(W), PENALTY
    V, mask = torch.zeros_like(W), support(W)
    D, compared = W * mask, mask
    for step in range(STEPS):
        X = back((pulled + there(rho * D - V)) / (curvature + rho))
        mask = support(X + V / rho)
        D = (X + V / rho) * mask
        V = V + rho * (X - D)
        if step % 3 == 2:
            change = float((mask ^ compared).sum() / mask.sum().clamp_min(1))
            if change == 0 or (step >= 30 and change < SETTLED):
                break
            rho *= next(factor for least, factor in GROWTH if change > least)
            compared = mask
    return mask


def _improved(
    W: Tensor, X: Tensor, mask: Tensor, A: Tensor, B: Tensor | None, support: Support
) -> tuple[Tensor, Tensor]:
    """Fit and support after local swaps, as long as the loss falls.

    With `B`, a row whose others stay as they are is nearest to `X + B (W - X)` in the metric `A`.
    """
    loss = _share(W - X, W, A, B)
    for _ in range(1 if B is None else PASSES):
        found = swapped(W if B is None else X + B @ (W - X), mask, A, support)
        if bool((found == mask).all()):
            break
        new = fitted(W, found, A, B)
        if not (now := _share(W - new, W, A, B)) < loss:
            break
        X, mask, loss = new, found, now
    return X, mask


def _unit(M: Tensor) -> Tensor:
    """Root of the diagonal, by which a moment is scaled to a unit diagonal."""
    return M.diagonal().clamp_min(torch.finfo(M.dtype).tiny).sqrt()


def _share(E: Tensor, W: Tensor, A: Tensor, B: Tensor | None) -> float:
    """The loss relative to that of removing everything."""
    whole = float(row_losses(W, A, B).sum())
    return float(row_losses(E, A, B).sum()) / whole if whole > 0 else 0.0
