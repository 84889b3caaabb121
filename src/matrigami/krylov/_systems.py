"""Linear systems made safe to iterate on: one type, unit scale, a residual that is computed.

Every solver runs cycles on a system whose right-hand side has columns of norm one and whose matrix
has been scaled by a power of two, so that no square under- or overflows. Each cycle starts from the
true residual `B - A X` (iterative refinement), so that what is reported is what was reached.

Shapes: n = rows = columns, k = right-hand sides, solved independently.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.krylov._solution import (
    Preconditioner,
    Product,
    Solution,
    norms,
    safe,
    tolerance,
)
from matrigami.operators import LinearOperator, as_array, as_tensor, is_concrete, is_count, operator

PROGRESS = 0.999
"""A cycle that leaves more of every residual than this has stalled."""

CHECKED = 100
"""Steps between two computed residuals within a cycle."""

BELIEVED = 2.0
"""A recurrence is no more followed where the computed residual is larger by this factor."""

PACE = 10
"""Cycles whose pace tells whether the steps that are left can be enough, and how often over."""


class Cycle(NamedTuple):
    """What a cycle of a solver is given: find `D` with `A D = R` up to `goal`.

    Attributes:
        product: `X -> A X`.
        inverse: The preconditioner, or None.
        R: Right-hand sides, each of norm one (or zero: nothing to do).
        goal: Norm of the residual at which a column stops, `(..., 1, k)`.
        steps: Most steps to take.
    """

    product: Product
    inverse: Preconditioner | None
    R: Tensor
    goal: Tensor
    steps: int

    def is_lost(self, X: Tensor, residual: Tensor, step: int) -> bool:
        """Whether what a recurrence says after a step is no more true: of a singular matrix.

        Rounding errors along its null space grow, and are taken for progress.
        """
        if step % CHECKED:
            return False
        true = norms(self.R - self.product(X))
        return not ((residual > self.goal) & (true <= BELIEVED * residual)).any()


Method = Callable[[Cycle], tuple[Tensor, list[Tensor]]]
"""One cycle: the correction, and the norms of the residual after each step."""


Solver = TypeVar("Solver", bound=Callable[..., Any])


def counted(**least: int) -> Callable[[Solver], Solver]:
    """Let a function refuse counts that are no whole numbers, or below the least of each name."""

    def around(function: Solver) -> Solver:
        defaults = {name: p.default for name, p in signature(function).parameters.items()}

        @wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            given = dict(zip(defaults, args, strict=False)) | options
            for name in least.keys() & given.keys():
                if given[name] is not defaults[name]:
                    _check_count(function.__name__, name, given[name], least[name])
            return function(*args, **options)

        return cast(Solver, checked)

    return around


def _check_count(function: str, name: str, value: Any, least: int) -> None:
    """Refuse what cannot be counted to.

    Raises:
        ValueError: If it is no whole number, or below the least.
    """
    if is_count(value, least):
        return
    raise ValueError(
        f"{function}(..., {name}={value!r}): {name} cannot be {value!r}.\n"
        f"It is a count: a whole number, at least {least}.\n"
        f"Give for example {name}={least + 1}."
    )


def of_columns(solver: Solver) -> Solver:
    """Let a solver of blocks take a vector and arrays too, and answer in kind.

    A preconditioner may be an operator, as in `solve`.
    """

    @wraps(solver)
    def around(A: Any, B: Any, **how: Any) -> Any:
        A = operator(A)
        M = how.get("preconditioner")
        if isinstance(M, LinearOperator):
            how["preconditioner"] = M.matmat
        X = as_tensor(B, A)
        vector, array = X.ndim == 1, isinstance(B, np.ndarray)
        found = solver(A, X[:, None] if vector else X, **how)
        parts = found if isinstance(found, tuple) else (found,)
        parts = [part[..., 0] if vector else part for part in parts]
        parts = [as_array(part) for part in parts] if array else parts
        return Solution(*parts) if isinstance(found, Solution) else parts[0]

    return cast(Solver, around)


def working_type(*dtypes: torch.dtype) -> torch.dtype:
    """The type to compute in: that of all promoted, at least single precision."""
    found = torch.float32
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found


def with_precision(A: LinearOperator, dtype: torch.dtype) -> LinearOperator:
    """`A` with the precision of `dtype`; what is real stays real."""
    real = dtype.to_real()
    return A.to(real.to_complex() if A.dtype.is_complex else real)


def exponents(X: Inexact[Tensor, "... n k"], dim: int | tuple[int, ...]) -> Int[Tensor, "..."]:
    """The powers of two that bring the largest entries to [1/2, 1); 0 for zeros."""
    parts = torch.view_as_real(X).abs().amax(-1) if X.is_complex() else X.abs()
    peak = parts.amax(dim, keepdim=True)
    return torch.frexp(torch.where(torch.isfinite(peak), peak, 0))[1].to(torch.int64)


def ldexp(X: Tensor, power: Tensor) -> Tensor:
    """`X 2^power` in two halves, since the power alone may be out of range."""
    real = X.dtype.to_real()
    first = torch.div(power, 2, rounding_mode="floor")
    return X * torch.exp2(first.to(real)) * torch.exp2((power - first).to(real))


def check_system(name: str, A: LinearOperator, B: Tensor, *, square: bool = True) -> None:
    """Refuse what a solver of this name cannot take.

    Raises:
        ValueError: If the matrix is not square, the right-hand side does not fit, or is not finite.
    """
    m, n = A.shape[-2:]
    if square and m != n:
        raise ValueError(
            f"{name}(A, B): A is {m}x{n}; it must be square.\n"
            "For a least-squares problem use matrigami.krylov.lsmr."
        )
    if B.ndim < 2 or B.shape[-2] != m:
        raise ValueError(
            f"{name}(A, B): B is of shape {tuple(B.shape)}; for a {m}x{n} matrix it must be of "
            f"shape ({m},) or (..., {m}, k).\n"
            "A stack of right-hand sides has its vectors as columns."
        )
    if is_concrete(B) and not torch.isfinite(B).all():
        raise ValueError(
            f"{name}(A, B): B has NaN or infinite entries; no solution exists.\n"
            "Check where it comes from."
        )


@torch.no_grad()
def refined(
    name: str,
    method: Method,
    A: LinearOperator,
    B: Tensor,
    tol: float | None,
    max_steps: int | None,
    preconditioner: Preconditioner | None = None,
) -> Solution:
    """Run cycles of a method on the true residual until it is small, or a cycle gains nothing."""
    check_system(name, A, B)
    dtype = working_type(A.dtype, B.dtype)
    tol = tolerance(dtype) if tol is None else tol
    left = 10 * A.shape[-1] if max_steps is None else max_steps
    asked = torch.promote_types(A.dtype, B.dtype)
    A = with_precision(A, dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    B = B.to(dtype).expand(*batch, *B.shape[-2:])
    if B.numel() == 0:
        empty = norms(B)[..., 0, :]
        return Solution(B.clone().to(asked), empty[None], empty <= tol)
    power = exponents(B, -2)
    B = ldexp(B, -power)
    size = norms(B)
    B = B / safe(size)
    product, spread = unit_product(lambda X: A @ X, B)
    inverse = preconditioner and unit_product(preconditioner, B)[0]
    X, history = _cycles(method, product, inverse, B, tol, left)
    Y, residual = ldexp(X * size, power - spread), history[-1]
    if _rounded(Y, X):
        residual = norms(B - product(ldexp(Y, spread - power) / safe(size)))
    X = Y.to(asked)
    residual = torch.where(torch.isfinite(X).all(-2, keepdim=True), residual, torch.inf)
    residuals = torch.stack([*history[:-1], residual]).squeeze(-2)
    return Solution(X, residuals, residuals[-1] <= tol)


def unit_product(product: Product, probe: Tensor) -> tuple[Product, Tensor]:
    """A map scaled by a power of two, for each matrix, to entries of order one; and the power."""
    power = exponents(product(probe), (-2, -1))
    return (lambda X: ldexp(product(X), -power)) if power.any() else product, power


def _rounded(Y: Tensor, X: Tensor) -> bool:
    """Whether scaling the solution of the unit system back has lost digits below the range."""
    tiny = torch.finfo(Y.dtype.to_real()).tiny
    return bool(((Y.abs() < tiny) & (X != 0)).any())


def _cycles(
    method: Method,
    product: Product,
    inverse: Preconditioner | None,
    B: Tensor,
    tol: float,
    left: int,
) -> tuple[Tensor, list[Tensor]]:
    """Correct the solution of a unit system by what each cycle finds for its residual."""

    def correct(R: Tensor, residual: Tensor, left: int) -> tuple[Tensor, list[Tensor]]:
        """One cycle from the residual of the columns that are not done."""
        scale = torch.where(residual > tol, residual, 0)
        unit = torch.where(residual > tol, R / safe(scale), 0)
        D, steps = method(Cycle(product, inverse, unit, tol / safe(residual), left))
        return scale * D, [scale * s for s in steps]

    def measure(X: Tensor) -> tuple[Tensor, Tensor]:
        """The true residual, and its norm."""
        R = B - product(X)
        return R, norms(R)

    return corrected(torch.zeros_like(B), B, norms(B), tol, left, correct, measure)


Correct = Callable[[Tensor, Tensor, int], tuple[Tensor, list[Tensor]]]
"""From what is left, its size and the steps left: a correction, and the size after each step."""

Measure = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What a solution leaves of the right-hand side, and its size as it is judged."""


def corrected(
    X: Tensor,
    R: Tensor,
    residual: Tensor,
    tol: float,
    left: int,
    correct: Correct,
    measure: Measure,
) -> tuple[Tensor, list[Tensor]]:
    """Iterative refinement: correct column by column while that helps; never for the worse.

    Args:
        X: The solution to start from.
        R: What it leaves.
        residual: The size of that, `(..., 1, k)`.
        tol: The size at which a column is done.
        left: Most steps of all cycles.
        correct: One cycle.
        measure: What is computed, and not believed of a recurrence, after each cycle.

    Returns:
        The solution, and the sizes after each step, the computed one last.
    """
    history, ends = [residual], [residual]
    while left > 0 and (residual > tol).any():
        D, steps = correct(R, residual, left)
        if not steps:
            break
        trial = X + D
        rest, reached = measure(trial)
        better = reached < residual
        history += [torch.where(residual > tol, s, residual) for s in steps[:-1]]
        X, R = torch.where(better, trial, X), torch.where(better, rest, R)
        stalled = not (reached < PROGRESS * residual).any()
        residual = torch.where(better, reached, residual)
        history.append(residual)
        left -= len(steps)
        ends.append(residual)
        if stalled or _is_hopeless(ends, tol, left, len(steps)):
            break
    return X, history


def _is_hopeless(ends: list[Tensor], tol: float, left: int, cycle: int) -> bool:
    """Whether the pace of the last cycles would take many times the steps that are left."""
    if len(ends) <= PACE:
        return False
    last, before = ends[-1], ends[-1 - PACE]
    gained = (before / safe(last)).log().clamp_min(torch.finfo(last.dtype).eps)
    wanted = (last / tol).log() / gained * PACE * cycle
    return bool((wanted > PACE * left).all())
