"""Laws of derivatives where formulas divide by zero: identities, zeros, repeated values.

A function of a value along a line in the space of its tensors is differentiated in every way that
PyTorch has, and by differences of its values, which know of no rule.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from matrigami.operators import (
    DenseMatrix,
    LinearOperator,
    direct_sum,
    inverse,
    logdet,
    named_tensors,
    norm,
    power,
    shift,
    solve,
    sqrt,
    trace,
    with_tensors,
)
from matrigami.testing._expectations import expect, expect_close, like, random

Line = Callable[[Tensor], Tensor]
"""A number as a function of a number."""

STEP = 1e-3
"""Of the differences: their error is its square, and the rounding over its square."""


def along_a_line(A: LinearOperator, question: Callable[[LinearOperator], Tensor]) -> Line:
    """`s -> question(A + s E)` for a fixed change `E` of all tensors."""
    start = list(named_tensors(A).values())
    change = [0.7 * random(*t.shape, seed=i, dtype=t.dtype) for i, t in enumerate(start)]

    def line(s: Tensor) -> Tensor:
        """The answer at one point of the line."""
        moved = [t + s * d for t, d in zip(start, change, strict=True)]
        return question(with_tensors(A, iter(moved)))

    return line


def expect_derivatives(line: Line, what: str) -> None:
    """Raise unless all ways to the first and second derivative at zero agree with differences."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    low, middle, high = (float(line(zero + s)) for s in (-STEP, 0.0, STEP))
    first, second = (high - low) / (2 * STEP), (high - 2 * middle + low) / STEP**2
    scale = max(1.0, abs(middle), abs(first), abs(second))

    def forward(f: Line) -> Line:
        """The derivative by forward mode."""
        return lambda s: torch.func.jvp(f, (s,), (one,))[1]  # pyright: ignore[reportReturnType]

    reverse = torch.func.grad
    found = {"reverse": reverse(line)(zero), "forward": forward(line)(zero)}
    for way, got in found.items():
        expect(abs(float(got) - first) <= 1e-4 * scale, f"{way} of {what} is {got}, not {first}")
    found = {
        "reverse over reverse": reverse(reverse(line))(zero),
        "forward over forward": forward(forward(line))(zero),
        "reverse over forward": reverse(forward(line))(zero),
        "forward over reverse": forward(reverse(line))(zero),
    }
    for way, got in found.items():
        expect(abs(float(got) - second) <= 1e-3 * scale, f"{way} of {what} is {got}, not {second}")


def squares(Y: Tensor) -> Tensor:
    """The sum of squares, smooth at zero as `abs` is not."""
    return (Y * Y.conj()).real.sum()


def special_points(A: LinearOperator) -> list[LinearOperator]:
    """`A` itself, with its first tensor at zero, and with all tensors constant."""
    tensors = list(named_tensors(A).values())
    first_zero = [t * float(i > 0) for i, t in enumerate(tensors)]
    constant = [torch.full_like(t, 0.5) for t in tensors]
    points = [A, *[with_tensors(A, iter(ts)) for ts in (first_zero, constant)]]
    return [B for B in points if exists(B)]


def exists(A: LinearOperator) -> bool:
    """Whether a value is a matrix: the inverse of a singular one is none."""
    try:
        return bool((A @ torch.ones(A.shape[-1], dtype=A.dtype)).isfinite().all())
    except torch.linalg.LinAlgError:
        return False


def derivatives_of_products(A: LinearOperator) -> None:
    """Of `A X` and of squared norms."""
    X = like(A, A.shape[-1], 2)
    for B in special_points(A):
        expect_derivatives(along_a_line(B, lambda M: squares(M @ X)), "|A X|^2")
    expect_derivatives(along_a_line(A, lambda M: norm(M).square()), "norm(A)^2")
    expect_derivatives(along_a_line(A, lambda M: norm(M, 3)), "norm(A, 3)")


def derivatives_at_zero(A: LinearOperator) -> None:
    """With all tensors zero: norms have zeros in every order, the square has its own."""
    zero = with_tensors(A, iter([torch.zeros_like(t) for t in named_tensors(A).values()]))
    if not exists(zero):
        return
    expect_derivatives(along_a_line(zero, lambda M: trace(M.H @ M).real), "trace(A.H A) at zero")
    one = torch.ones((), dtype=torch.float64)
    size = max(1.0, float(along_a_line(zero, norm)(one)))  # differences see powers of less than it
    eye = DenseMatrix(size * torch.eye(2, dtype=A.dtype))
    for order in (None, 4):  # smooth, for the whole is not zero
        line = along_a_line(zero, lambda M, p=order: norm(direct_sum(M, eye), p))
        expect_derivatives(line, f"norm of a direct sum with zero, order {order}")
    if float(norm(zero)) > 0:  # the inverse of a stored zero is none, a contraction may be fixed
        return
    line, at = along_a_line(zero, norm), torch.zeros((), dtype=torch.float64)
    expect_close(torch.func.grad(line)(at), at, "the derivative of a norm at zero", 0.0)
    expect_close(torch.func.grad(torch.func.grad(line))(at), at, "the second one", 0.0)


def derivatives_of_solutions(A: LinearOperator) -> None:
    """Of `solve`, `inverse`, `logdet` of `A + c I`, damped or not."""
    if A.shape[-1] != A.shape[-2]:
        return
    n = A.shape[-1]
    b, w, amount = like(A, n), like(A, n, seed=1), 2 * float(norm(A, 2)) + 1
    for B in special_points(A):
        lines = {
            "solve": lambda M: (w * solve(M, b, amount)).sum().real,
            "inverse": lambda M: (w * (inverse(shift(M, amount)) @ b)).sum().real,
            "logdet": lambda M: logdet(shift(M, amount)).real,
        }
        for what, question in lines.items():
            expect_derivatives(along_a_line(B, question), f"{what}(A + c I)")


def derivatives_of_hermitian_functions(A: LinearOperator) -> None:
    """Of roots, powers and damped solutions of `A A.H + I`, which is the identity at zero."""
    b = like(A, A.shape[-2])
    for B in special_points(A):
        lines = {
            "sqrt": lambda M: trace(sqrt(shift(M @ M.H, 1.0))).real,
            "power": lambda M: squares(power(shift(M @ M.H, 1.0), -0.25) @ b),
            "solve": lambda M: (b.conj() * solve(M @ M.H, b, 1.0)).sum().real,
        }
        for what, question in lines.items():
            expect_derivatives(along_a_line(B, question), f"{what} of A A.H + I")


DERIVATIVE_LAWS = (
    derivatives_of_products,
    derivatives_at_zero,
    derivatives_of_solutions,
    derivatives_of_hermitian_functions,
)
"""A new law is one function, and its name here."""
