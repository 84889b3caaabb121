"""Traces, log-determinants and diagonals from products with random signs, with their errors.

For a vector `z` of independent signs `E[z z.T] = I`, so `E[z.H f(A) z] = trace f(A)` (Hutchinson
1990); `f(A)` enters by Gauss quadrature (Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38,
1075-1099). The quadrature is refined until it has converged, and what is left of its error counts.

Shapes: n = rows = columns, k = probes.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.krylov._pulled import pulled
from matrigami.krylov._quadrature import Function, Quadrature
from matrigami.krylov._symmetry import is_hermitian
from matrigami.krylov._systems import counted
from matrigami.operators import LinearOperator, operator

FIRST_STEPS = 16
"""Steps of the coarsest quadrature; each next one has twice as many."""


class Estimate(NamedTuple):
    """A Monte-Carlo mean, and its error.

    Attributes:
        value: The mean over the probes.
        error: The standard error of the mean, widened for few probes so that twice the error
            covers 95 % (Student), and what is left of the error of the quadrature.
    """

    value: Inexact[Tensor, "*shape"]
    error: Float[Tensor, "*shape"]


@counted(probes=2, max_steps=1)
def stochastic_logdet(
    A: Any,
    *,
    probes: int = 32,
    tol: float = 1e-4,
    max_steps: int = 2048,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate `logdet A = trace(log A)` of a positive definite matrix, with an honest error.

    Args:
        A: A symmetric or complex Hermitian positive definite matrix, or a stack of them.
        probes: Random sign vectors, at least two, all at once; the error falls as
            `probes^(-1/2)`.
        tol: See `stochastic_trace`.
        max_steps: See `stochastic_trace`.
        generator: Source of the signs.

    Returns:
        Value and error, for each matrix of a stack. The value is differentiable once, the gradient
        `A^-1` being estimated with the same probes.

    Raises:
        ValueError: If `A` is not Hermitian, or has an eigenvalue that is not positive.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> found = stochastic_logdet(DenseMatrix(torch.diag(torch.tensor([1.0, 2.0, 3.0]))))
        >>> found.value  # log 6; signs are exact for a diagonal
        tensor(1.7918)
    """
    return stochastic_trace(
        A, _log, probes=probes, tol=tol, max_steps=max_steps, generator=generator
    )


@counted(probes=2, max_steps=1)
def stochastic_trace(
    A: Any,
    function: Function | None = None,
    *,
    probes: int = 32,
    tol: float = 1e-4,
    max_steps: int = 2048,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate `trace(f(A))` of a Hermitian matrix, or the trace of any square one.

    The quadrature doubles its steps until what is left, extrapolated from the last two changes as
    a geometric series, is a tenth of the standard error or `tol` of `trace |f(A)|`, and ends at
    `max_steps` otherwise; what is left is added to the error.

    Args:
        A: A square matrix, or a stack of them.
        function: Applied to Ritz values entry by entry, e.g. `torch.exp`; none for `A` itself, of
            any square `A`.
        probes: Random sign vectors, at least two.
        tol: Relative error of the quadrature that is good enough.
        max_steps: Most Lanczos steps; they need no memory, but time in proportion.
        generator: Source of the signs.

    Returns:
        Value and error, for each matrix of a stack. The value is differentiable once, the gradient
        `f'(A)` being estimated with the same probes and the same quadrature.

    Raises:
        ValueError: If `A` is not square, or not Hermitian where there is a function, or a
            count is no whole number or too small: a mean of one probe has no error.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> stochastic_trace(DenseMatrix(torch.diag(torch.tensor([1.0, 2.0]))), torch.sqrt).value
        tensor(2.4142)
    """
    A = operator(A)
    Z = _signs("stochastic_trace", A, probes, generator)
    if function is None or not Z.numel():
        return _mean((Z * (A @ Z)).sum(-2), 0.0)
    if not is_hermitian(A):
        raise ValueError(
            f"stochastic_trace(A, function): {A!r} does not equal its adjoint.\n"
            "A function of a matrix is estimated for symmetric or Hermitian matrices only.\n"
            "For log|det A| use A.H @ A, and half of the result."
        )
    with torch.no_grad():
        rule = Quadrature(A, Z)
        samples, rest = _converged(rule, function, tol, max_steps)
    derivative = torch.func.grad(lambda theta: function(theta).sum())
    samples = samples.to(A.dtype.to_real())
    return _mean(
        pulled(A, Z, lambda A: _rule(A, Z, rule.steps).times(derivative).to(Z.dtype), samples), rest
    )


@counted(probes=2)
def stochastic_diagonal(
    A: Any, *, probes: int = 32, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate the diagonal of a square matrix from products with random signs.

    Each probe gives `z * (A z)` (Bekas, Kokiopoulou and Saad 2007); exact for a diagonal matrix,
    off by the norm of the rest of each row over `probes^(1/2)` otherwise.

    Args:
        A: A square matrix, or a stack of them.
        probes: Random sign vectors, at least two.
        generator: Source of the signs.

    Returns:
        Value and error of each entry, `(*batch, n)`.

    Raises:
        ValueError: If `A` is not square, or `probes` is no whole number of at least 2.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> stochastic_diagonal(DenseMatrix(torch.diag(torch.tensor([1.0, 2.0])))).value
        tensor([1., 2.])
    """
    A = operator(A)
    Z = _signs("stochastic_diagonal", A, probes, generator)
    return _mean(Z * (A @ Z), 0.0)


def _rule(A: LinearOperator, Z: Tensor, steps: int) -> Quadrature:
    """The rule of so many steps."""
    rule = Quadrature(A, Z)
    rule.grow(steps)
    return rule


def _converged(
    rule: Quadrature, function: Function, tol: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """The value of each probe by a rule that is fine enough, and what is left of its error."""
    steps, means, changes = min(FIRST_STEPS, max_steps), [], []
    while True:
        rule.grow(steps)
        theta, weights = rule.nodes()
        terms = torch.where(weights > 0, weights * function(theta), 0)
        samples = terms.sum(-1)
        means.append(samples.mean(-1))
        rest = torch.zeros_like(means[-1])
        if rule.exhausted:
            return samples, rest
        if len(means) > 1:
            changes.append((means[-1] - means[-2]).abs())
        enough = torch.maximum(_standard_error(samples) / 10, tol * terms.abs().sum(-1).mean(-1))
        if len(changes) > 1:
            rest = _extrapolated(changes)
            if (rest <= enough).all():
                return samples, rest
        if steps == max_steps:
            return samples, rest if len(changes) > 1 else torch.full_like(rest, torch.inf)
        steps = min(2 * steps, max_steps)


def _extrapolated(changes: list[Tensor]) -> Tensor:
    """The sum of all changes to come, as a geometric series with the last ratio (at most 0.95)."""
    last, before = changes[-1], changes[-2]
    ratio = (last / torch.where(before == 0, 1, before)).clamp(max=0.95)
    return torch.where(last == 0, 0, last * torch.maximum(ratio / (1 - ratio), ratio + 0.1))


def _signs(name: str, A: LinearOperator, probes: int, generator: torch.Generator | None) -> Tensor:
    """Random signs `(*batch, n, k)`, after the checks.

    Raises:
        ValueError: If the matrix is not square.
    """
    *batch, m, n = A.shape
    if m != n:
        raise ValueError(f"{name}(A): A is {m}x{n}; it must be square.")
    signs = torch.randint(0, 2, (*batch, n, probes), generator=generator, device=A.device)
    return (2 * signs - 1).to(A.dtype)


def _standard_error(samples: Inexact[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Of the mean over the probes, widened for few of them."""
    from scipy.special import stdtrit  # noqa: PLC0415 - the quantile of Student's t

    k = samples.shape[-1]
    spread = torch.linalg.vector_norm(samples - samples.mean(-1, keepdim=True), dim=-1)
    return spread / (k * (k - 1)) ** 0.5 * float(stdtrit(k - 1, 0.97725)) / 2


def _mean(samples: Inexact[Tensor, "... k"], rest: float | Tensor) -> Estimate:
    """The estimate from its samples, and what is left of the error of each."""
    value, still = samples.mean(-1), samples.detach()
    rounding = 10 * torch.finfo(still.dtype).eps * still.abs().mean(-1)
    return Estimate(value, (_standard_error(still) + rest + rounding).to(rounding.dtype))


def _log(theta: Tensor) -> Tensor:
    """Logarithm of Ritz values that must be positive.

    Raises:
        ValueError: If one is not.
    """
    if bool((theta <= 0).any()):
        raise ValueError(
            f"stochastic_logdet(A): a Ritz value is {float(theta.detach().min()):.3g}; A is not "
            "positive definite.\nThe logarithm of its eigenvalues is not real.\n"
            "Add damping, or use half of the result for A.H @ A."
        )
    return theta.log()
