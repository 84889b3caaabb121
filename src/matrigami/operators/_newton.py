"""Projection in all tensors at once by Newton's method, where least squares crawls.

A sum of overlapping low-rank blocks has flat, curved valleys: steps of Gauss and Newton, which
leave out the curvature times the error, gain a few thousandths each. The Hessian itself is formed,
so this is for a few hundred numbers. Each of its eigenvalues counts by its size, so that saddle
points repel (Dauphin et al. 2014, arXiv:1406.2572).

Shapes: m = rows, n = columns, x = all stored numbers, real and imaginary parts apart.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator
from matrigami.operators._tree import named_tensors, with_tensors

STEPS = 100
"""Most steps."""

STALLED = 1e-9
"""Relative decrease of the squared error in one step below which it ends."""

LONGEST = 1e12
"""The damping at which a step is too short to gain anything."""


def newton_fit(A: LinearOperator, W: Inexact[Tensor, "m n"], steps: int = STEPS) -> LinearOperator:
    """Minimise `||W - A||_F` over the tensors of a single value; the error never grows."""
    tensors = list(named_tensors(A).values())

    def member(x: Float[Tensor, " x"]) -> LinearOperator:
        """The value of these numbers."""
        return with_tensors(A, iter(_as_tensors(x, tensors)))

    def misfit(x: Float[Tensor, " x"]) -> Float[Tensor, ""]:
        """Half the squared error."""
        E = member(x).dense() - W
        return (E * E.conj()).real.sum() / 2

    x = torch.cat([_parts(t).flatten() for t in tensors])
    error, damping = misfit(x), 1.0
    for _ in range(steps):
        x, last, damping = _step(misfit, x, damping)
        error, last = last, error
        if not last - error > STALLED * last:
            break
    return member(x)


def _step(
    misfit: Callable[[Tensor], Tensor], x: Float[Tensor, " x"], damping: float
) -> tuple[Float[Tensor, " x"], Float[Tensor, ""], float]:
    """The first damped step that is better; the point itself where none is."""
    error = misfit(x)
    values, Q = torch.linalg.eigh(torch.func.hessian(misfit)(x))
    slope = Q.mT @ torch.func.grad(misfit)(x)
    while damping < LONGEST:
        moved = x - Q @ (slope / (values.abs() + damping))
        found = misfit(moved)
        if found < error:
            return moved, found, damping / 5
        damping *= 4
    return x, error, damping


def _parts(t: Inexact[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Real and imaginary parts apart."""
    return torch.view_as_real(t) if t.is_complex() else t


def _as_tensors(x: Float[Tensor, " x"], like: list[Tensor]) -> list[Tensor]:
    """The numbers in the shapes of tensors."""
    shapes = [_parts(t).shape for t in like]
    found = x.split([shape.numel() for shape in shapes])
    pairs = zip(found, shapes, like, strict=True)
    return [
        torch.view_as_complex(part.reshape(shape)) if t.is_complex() else part.reshape(shape)
        for part, shape, t in pairs
    ]
