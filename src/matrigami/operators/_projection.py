"""Projection: the member of a structure nearest to a matrix.

Shapes: m = rows, n = columns, r = rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch, update_wrapper

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, Structure, named_tensors, with_tensors

SWEEPS = 30
"""Most alternating sweeps: the objective of a quasi-best projection has settled well before, on every example of the tests."""


@dataclass(frozen=True)
class Metric:
    """`<X, Y> = trace(left X right Y.T)` with positive definite `left` (m x m) and `right` (n x n)."""

    left: LinearOperator | None = None
    right: LinearOperator | None = None

    def apply(self, X: Inexact[Tensor, "m n"]) -> Inexact[Tensor, "m n"]:
        """`left @ X @ right`."""
        X = X if self.left is None else self.left @ X
        return X if self.right is None else (self.right @ X.mT).mT


class Project:
    """`project`, a `singledispatch` function over recipes that also takes a metric."""

    def __init__(self, default: Callable[[Structure, Tensor], LinearOperator]) -> None:
        self.rules = singledispatch(default)
        self.register = self.rules.register
        self.dispatch = self.rules.dispatch
        update_wrapper(self, default)

    def __call__(
        self,
        recipe: Structure,
        W: Tensor | LinearOperator,
        *,
        left: LinearOperator | None = None,
        right: LinearOperator | None = None,
    ) -> LinearOperator:
        """Project in the Frobenius norm, then refine in the metric if there is one."""
        W = W.dense() if isinstance(W, LinearOperator) else W
        if W.ndim < 2:
            raise ValueError(f"project was asked for a tensor of shape {tuple(W.shape)}.\nIt takes a matrix of shape (*batch, m, n).")
        if not torch.isfinite(W).all():
            raise ValueError(f"project was asked for a matrix with NaN or infinite entries.\nNo {type(recipe).__name__} member is nearest to it.")
        start = self.rules(recipe, W)
        if left is None and right is None:
            return start
        return metric_project(recipe, W, start, Metric(left, right))


@Project
def project(recipe: Structure, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    """The member of a structure nearest to `W`.

    Without a metric: nearest in the Frobenius norm; best for Dense, Diagonal, BlockDiagonal, LowRank, two-factor
    Kronecker, Monarch, BlockTensorTrain(cores=2), TensorTrain(cores=2) and Einsum on sizes that are not padded,
    quasi-best for the others (see the docstring of each). With `left` and `right`: nearest in
    `||left^(1/2) (W - A) right^(1/2)||_F`; best for Dense and LowRank, else alternating least squares from the
    Frobenius projection (quasi-best, never worse than its start).

    Args:
        recipe: The structure.
        W: The matrix, a tensor `(*batch, m, n)` or an operator.
        left: Positive definite operator `m x m`, e.g. the output-gradient moment of a layer.
        right: Positive definite operator `n x n`, e.g. the input moment of a layer.

    Returns:
        A value of the structure.

    Raises:
        ValueError: If the size does not fit the recipe, or `W` is not finite.
    """
    raise TypeError(
        f"project was asked for a {type(recipe).__name__}.\n"
        "No projection onto it is known.\n"
        "Register one with @project.register in the file that defines it."
    )


@singledispatch
def metric_project(recipe: Structure, W: Tensor, start: LinearOperator, metric: Metric) -> LinearOperator:
    """Nearest member in a metric, by alternating least squares from `start` (quasi-best)."""
    if W.ndim > 2:
        raise ValueError(f"project(..., left=, right=) was asked for a stack of shape {tuple(W.shape)}.\nGive one matrix at a time.")
    return alternating_least_squares(start, W, metric)


def truncated_svd(
    M: Inexact[Tensor, "*batch m n"], rank: int, *, balanced: bool = True
) -> tuple[Inexact[Tensor, "*batch m r"], Inexact[Tensor, "*batch r n"]]:
    """Factors `L @ R` of the best rank-`r` approximation (Eckart and Young 1936).

    Balanced factors share the singular values; otherwise `L` is orthonormal and `R` carries them.
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    U, S, Vh = U[..., :rank], S[..., :rank].to(M.dtype), Vh[..., :rank, :]
    if not balanced:
        return U, S[..., None] * Vh
    root = S.sqrt()
    return U * root[..., None, :], root[..., None] * Vh


def alternating_least_squares(A: LinearOperator, W: Float[Tensor, "m n"], metric: Metric, sweeps: int = SWEEPS) -> LinearOperator:
    """Minimise `||W - A||^2` in a metric, one stored tensor at a time.

    Every structure here is linear in each of its tensors, so each step is a linear least-squares problem; it is
    solved by conjugate gradients from the current value, hence the error never grows.
    """
    tensors = [t.detach().clone() for t in named_tensors(A).values()]
    size = float(torch.sum(W * metric.apply(W)))
    before = _misfit(with_tensors(A, iter(tensors)), W, metric)
    for _ in range(sweeps):
        for i in range(len(tensors)):
            tensors[i] = _least_squares(A, tensors, i, W, metric)
        after = _misfit(with_tensors(A, iter(tensors)), W, metric)
        if before - after <= 1e-12 * size:
            break
        before = after
    return with_tensors(A, iter(tensors))


def _misfit(A: LinearOperator, W: Tensor, metric: Metric) -> float:
    """The squared error in the metric."""
    E = W - A.dense()
    return float(torch.sum(E * metric.apply(E)))


def _least_squares(A: LinearOperator, tensors: list[Tensor], i: int, W: Tensor, metric: Metric) -> Tensor:
    """The best `i`-th tensor, the others fixed: conjugate gradients on the normal equations."""

    def member(x: Tensor) -> Tensor:
        """The matrix as a linear function of the `i`-th tensor."""
        return with_tensors(A, iter([*tensors[:i], x, *tensors[i + 1 :]])).dense()

    x = tensors[i]
    value, pull = torch.func.vjp(member, x)
    r = pull(metric.apply(W - value))[0]  # descent direction
    p, rho = r, float(r.square().sum())
    for _ in range(min(x.numel(), 50)):
        if rho <= 1e-30:
            break
        q = member(p)
        q = pull(metric.apply(q))[0]
        step = rho / max(float((p * q).sum()), 1e-300)
        x, r = x + step * p, r - step * q
        rho, last = float(r.square().sum()), rho
        p = r + (rho / last) * p
    return x

