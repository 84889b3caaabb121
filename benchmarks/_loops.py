"""The published loops of GPTQ and SparseGPT, to be compared with."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from matrigami.compress import Grid


def gptq(W: Tensor, H: Tensor, grid: Grid, damping: float = 0.01) -> Tensor:
    """GPTQ with static groups in the order of activity, as published: three Cholesky factors.

    Groups have the range from their least to their greatest weight.
    """
    value = replace(grid, fitted=False).round(W)
    n = W.shape[1]
    tables: tuple[Any, Any] = (value.scale, value.zero)  # this grid is asymmetric
    steps, zero = (t.repeat_interleave(value.group, 1)[:, :n] for t in tables)
    order = H.diagonal().argsort(descending=True)
    W, steps, zero, H = W[:, order].clone(), steps[:, order], zero[:, order], H[order][:, order]
    U = _factor(H, damping)
    Q = torch.zeros_like(W)
    for start in range(0, n, 128):
        stop = min(start + 128, n)
        block, errors = W[:, start:stop].clone(), W.new_zeros(len(W), stop - start)
        for i in range(stop - start):
            j = start + i
            codes = (block[:, i] / steps[:, j] + zero[:, j]).round()
            codes = codes.clamp(grid.least, -1 - grid.least)
            Q[:, j] = (codes - zero[:, j]) * steps[:, j]
            errors[:, i] = (block[:, i] - Q[:, j]) / U[j, j]
            block[:, i:] -= errors[:, i, None] * U[j, j:stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q[:, order.argsort()]


def sparse_gpt(W: Tensor, H: Tensor, sparsity: float, damping: float = 0.01) -> Tensor:
    """SparseGPT as published: the mask block by block, by `W^2 / U_jj^2`."""
    W, n = W.clone(), W.shape[1]
    U = _factor(H, damping)
    Q = torch.zeros_like(W)
    for start in range(0, n, 128):
        stop = min(start + 128, n)
        block, errors = W[:, start:stop].clone(), W.new_zeros(len(W), stop - start)
        scores = (block / U.diagonal()[start:stop]).square()
        gone = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        for i in range(stop - start):
            j = start + i
            Q[:, j] = torch.where(gone[:, i], 0, block[:, i])
            errors[:, i] = (block[:, i] - Q[:, j]) / U[j, j]
            block[:, i:] -= errors[:, i, None] * U[j, j:stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q


def _factor(H: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped moment."""
    H = H + damping * H.diagonal().mean() * torch.eye(len(H)).to(H)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
