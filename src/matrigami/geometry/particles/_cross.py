"""Cross approximation: a block from a few of its rows and columns, many blocks in lockstep.

`A = C M^-1 R` with columns `C = A[:, J]`, rows `R = A[I, :]` and their crossing `M = A[I, J]`. The
pivots come from adaptive cross approximation with partial pivoting; every step makes one row and
one column of every block. Which pivots are chosen is not differentiated; the factors are, through
the entries of the kernel. Source: Bebendorf (2000), Numer. Math. 86(4).

Shapes: h = blocks, m = rows, n = columns, r = rank, d = dimension.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST = 96
"""Most steps. A block of a smooth kernel takes far fewer."""

Entries = Callable[[Tensor, Tensor], Tensor]
"""Points of targets and sources, `(h, m, d)` and `(h, n, d)`, to entries `(h, m, n)`."""


def cross_factors(
    entries: Entries, X: Float[Tensor, "h m d"], Y: Float[Tensor, "h n d"], tol: float
) -> tuple[Float[Tensor, "h m r"], Float[Tensor, "h n r"]]:
    """Factors of the blocks between points, `left @ right.T`.

    Raises:
        ValueError: If a block does not compress.
    """
    rows, columns, used = cross_pivots(entries, X.detach(), Y.detach(), tol)
    C = entries(X, _taken(Y, columns)) * used[:, None, :]
    R = entries(_taken(X, rows), Y) * used[:, :, None]
    M = entries(_taken(X, rows), _taken(Y, columns))
    both = used[:, :, None] & used[:, None, :]
    M = torch.where(both, M, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
    V = torch.linalg.solve(M, R).mT
    S, T = _balance(C.detach(), V.detach(), used)
    return C @ S, V @ T


@torch.no_grad()
def _balance(
    C: Float[Tensor, "h m r"], V: Float[Tensor, "h n r"], used: Bool[Tensor, "h r"]
) -> tuple[Float[Tensor, "h r r"], Float[Tensor, "h r r"]]:
    """`S, T` with `S T.T = I` for which `C S` and `V T` share orthogonal columns of one size."""
    unused = torch.diag_embed((~used).to(C.dtype))
    R1, R2 = (torch.linalg.qr(F, mode="r").R + unused for F in (C, V))
    L, values, Rh = torch.linalg.svd(R1 @ R2.mT)
    roots = values.sqrt()[:, None, :]
    return (
        torch.linalg.solve_triangular(R1, L * roots, upper=True),
        torch.linalg.solve_triangular(R2, Rh.mT * roots, upper=True),
    )


@torch.no_grad()
def cross_pivots(
    entries: Entries, X: Float[Tensor, "h m d"], Y: Float[Tensor, "h n d"], tol: float
) -> tuple[Int[Tensor, "h r"], Int[Tensor, "h r"], Bool[Tensor, "h r"]]:
    """Rows, columns, and for which steps each block needs them.

    Raises:
        ValueError: If a block does not compress.
    """
    h, m, n = len(X), X.shape[1], Y.shape[1]
    blocks = torch.arange(h, device=X.device)
    U, V = X.new_zeros(h, 0, m), X.new_zeros(h, 0, n)
    free, unused = (torch.ones(h, k, dtype=torch.bool, device=X.device) for k in (m, n))
    row = (X - Y.mean(1, keepdim=True)).square().sum(-1).argmin(1)  # the nearest to the sources
    live, size = torch.ones(h, dtype=torch.bool, device=X.device), X.new_zeros(h)
    rows, columns, used = [], [], []
    while live.any():
        if len(rows) == min(m, n, MOST):
            if len(rows) == min(m, n):
                break
            _refuse(m, n)
        v = entries(X[blocks, row][:, None], Y)[:, 0] - (U[blocks, :, row][..., None] * V).sum(1)
        column = (v.abs() * unused).argmax(1)
        pivot = v[blocks, column]
        fresh = free[blocks, row] & unused[blocks, column]  # in what was taken are roundings
        live = live & fresh & (pivot != 0)
        free[blocks, row], unused[blocks, column] = False, False
        u = entries(X, Y[blocks, column][:, None])[..., 0]
        u = (u - (V[blocks, :, column][..., None] * U).sum(1)) / torch.where(live, pivot, 1)[
            :, None
        ]
        u = u * live[:, None]
        rows.append(row)
        columns.append(column)
        step = u.norm(dim=1) * v.norm(dim=1)
        size = torch.hypot(size, step)
        used.append(live & (step > torch.finfo(v.dtype).eps * size))  # no cross of roundings
        live = live & (step > tol * size)
        U, V = torch.cat([U, u[:, None]], 1), torch.cat([V, v[:, None]], 1)
        row = (u.abs() * free).argmax(1)
    return torch.stack(rows, 1), torch.stack(columns, 1), torch.stack(used, 1)


def _taken(X: Float[Tensor, "h m d"], index: Int[Tensor, "h r"]) -> Float[Tensor, "h r d"]:
    """The points of the pivots."""
    return X.gather(1, index[..., None].expand(-1, -1, X.shape[-1]))


def _refuse(m: int, n: int) -> None:
    """Say that a block has no low rank."""
    raise ValueError(
        f"kernel_matrix: a block of {m}x{n} is not of rank {MOST} at this tolerance.\n"
        "The kernel oscillates, or is not smooth, within the points.\n"
        "Use a larger tol or scale, or a dense matrix: fewer points."
    )
