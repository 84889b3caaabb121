"""Projection: the member of a structure nearest to a matrix.

Shapes: m = rows, n = columns, r = rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._algebra import cropped
from matrigami.operators._base import LinearOperator, Value, question
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._kernels import is_concrete
from matrigami.operators._memory import dense
from matrigami.operators._recipe import Structure
from matrigami.operators._tree import named_tensors, with_tensors

STEPS = 200
"""Most Levenberg-Marquardt steps; members are found again in far fewer."""

DIRECT = 2**22
"""Entries of the Jacobian up to which a step is solved directly: a few milliseconds, 32 MiB."""

STALLED = 1e-5
"""Relative decrease of the squared error in one step below which the fit ends."""

CG_STEPS = 300
"""Most conjugate-gradient steps in one of them: exact for a few hundred parameters."""


@dataclass(frozen=True)
class Metric:
    """`<X, Y> = trace(left X right Y.T)`, positive definite `left` (m x m), `right` (n x n)."""

    left: LinearOperator | None = None
    right: LinearOperator | None = None

    def apply(self, X: Inexact[Tensor, "*batch m n"]) -> Inexact[Tensor, "*batch m n"]:
        """`left @ X @ right`."""
        X = X if self.left is None else self.left @ X
        return X if self.right is None else (self.right @ X.mT).mT


def _target(
    function: OpenFunction,
    recipe: Structure,
    W: Any,
    *,
    left: LinearOperator | None = None,
    right: LinearOperator | None = None,
) -> LinearOperator:
    """Project in the Frobenius norm, then refine in the metric if there is one."""
    if isinstance(W, LinearOperator):
        rounded = None if left is not None or right is not None else round_to(W, recipe)
        if rounded is not None:
            return rounded
        W = dense(W, "project")
    if W.ndim < 2:
        raise ValueError(
            f"project(recipe, W): W has shape {tuple(W.shape)}; a matrix has two axes.\n"
            "Give a tensor of shape (*batch, m, n)."
        )
    if is_concrete(W) and not torch.isfinite(W).all():
        raise ValueError(
            "project(recipe, W): W has NaN or infinite entries.\n"
            f"No {type(recipe).__name__} member is nearest to it."
        )
    start = function.answer(recipe, W)
    if left is None and right is None:
        return start
    return metric_project(recipe, W, start, Metric(left, right))


@lambda default: OpenFunction(default, around=_target)
def project(recipe: Structure, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    """The member of a structure nearest to `W`.

    Without a metric: nearest in the Frobenius norm; best for Dense, Diagonal, BlockDiagonal,
    LowRank, two-factor Kronecker, Monarch, BlockTensorTrain(cores=2), TensorTrain(cores=2) and
    Einsum on sizes that are not padded, quasi-best for the others (see the docstring of each).
    With `left` and `right`: nearest in `||left^(1/2) (W - A) right^(1/2)||_F`; best for Dense and
    LowRank, else nonlinear least squares from the Frobenius projection (quasi-best, never worse
    than its start).

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


@question
def round_to(A: LinearOperator, recipe: Structure) -> LinearOperator | None:
    """The member nearest to a value that need not be made dense for it; None where it must be."""
    return None


@OpenFunction
def metric_project(
    recipe: Structure, W: Tensor, start: LinearOperator, metric: Metric
) -> LinearOperator:
    """Nearest member in a metric, by least squares from `start` (quasi-best)."""
    if W.ndim > 2:
        raise ValueError(
            f"project(..., left=, right=) was asked for a stack of shape {tuple(W.shape)}.\n"
            "Give one matrix at a time."
        )
    return least_squares_fit(start, W, metric)


def fitted_corner(A: LinearOperator, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    """The corner of the size of `W`, refitted if that cuts something: entries outside are free."""
    corner = cropped(A, *W.shape[-2:])
    if corner is A:
        return corner
    double = torch.promote_types(W.dtype, torch.float64)  # steps stall early in single precision
    return least_squares_fit(corner.to(double), W.to(double)).to(W.dtype)


def least_squares_fit(
    A: Value,
    W: Float[Tensor, "*batch m n"],
    metric: Metric | None = None,
    steps: int = STEPS,
) -> Value:
    """Minimise `||W - A||` in a metric over the tensors of `A`; the error never grows.

    Every structure is polynomial in its tensors. Each step solves the damped normal equations by
    conjugate gradients, so no Jacobian is formed. Source: More (1978), "The Levenberg-Marquardt
    algorithm".
    """
    metric = Metric() if metric is None else metric
    x = [t.detach().clone() for t in named_tensors(A).values()]
    damping, error = 1e-2, _misfit(A, W, metric)
    floor = 1e-24 * float(torch.sum(W * metric.apply(W)))
    for _ in range(steps):
        if error <= floor or damping > 1e12:
            break
        trial = [a + b for a, b in zip(x, _step(A, x, W, metric, damping), strict=True)]
        new = _misfit(with_tensors(A, iter(trial)), W, metric)
        if not new < error:
            damping *= 4
            continue
        stalled = error - new <= STALLED * error
        x, error, damping = trial, new, damping / 3
        if stalled:
            break
    return with_tensors(A, iter(x))


def _misfit(A: LinearOperator, W: Tensor, metric: Metric) -> float:
    """The squared error in the metric."""
    E = W - A.dense()
    return float(torch.sum(E * metric.apply(E)))


def _step(
    A: LinearOperator, x: list[Tensor], W: Tensor, metric: Metric, damping: float
) -> list[Tensor]:
    """Solve `(J.T M J + damping * scale) d = J.T M (W - A)`, directly or by conjugate gradients."""

    def member(tensors: list[Tensor]) -> Tensor:
        """The matrix as a function of its tensors."""
        return with_tensors(A, iter(tensors)).dense()

    value, pull = torch.func.vjp(member, x)  # pyright: ignore[reportAssignmentType]
    r = pull(metric.apply(W - value))[0]
    damping = damping * float(value.square().mean().sqrt() + 1e-30)
    if sum(t.numel() for t in x) * W.numel() <= DIRECT:
        return _direct(member, x, r, metric, damping)
    d, p, rho = [torch.zeros_like(t) for t in x], r, _dot(r, r)
    target = 1e-6 * rho  # each step gains three digits of the gradient; more would be redone
    for _ in range(min(sum(t.numel() for t in x), CG_STEPS)):
        if rho <= target:
            break
        push = torch.func.jvp(member, (x,), (p,))[1]
        q = [a + damping * b for a, b in zip(pull(metric.apply(push))[0], p, strict=True)]
        step = rho / _dot(p, q)
        d = [a + step * b for a, b in zip(d, p, strict=True)]
        r = [a - step * b for a, b in zip(r, q, strict=True)]
        rho, last = _dot(r, r), rho
        p = [a + (rho / last) * b for a, b in zip(r, p, strict=True)]
    return d


def _direct(
    member: Callable[[list[Tensor]], Tensor],
    x: list[Tensor],
    r: list[Tensor],
    metric: Metric,
    damping: float,
) -> list[Tensor]:
    """The step from the Jacobian itself: for few parameters far quicker than the iteration."""
    sizes = [t.numel() for t in x]
    eye = torch.eye(sum(sizes), dtype=x[0].dtype, device=x[0].device)
    basis = [e.reshape(-1, *t.shape) for e, t in zip(eye.split(sizes, 1), x, strict=True)]
    J = torch.vmap(lambda *v: torch.func.jvp(member, (x,), (list(v),))[1])(*basis)
    G = J.flatten(1) @ metric.apply(J).flatten(1).mT
    d = torch.linalg.solve_ex(G + damping * eye, torch.cat([t.flatten() for t in r])).result
    return [part.reshape(t.shape) for part, t in zip(d.split(sizes), x, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product of two lists of tensors."""
    return sum(float(torch.sum(s * t)) for s, t in zip(a, b, strict=True))
