"""What a law says when it is broken: plain `AssertionError`s, for they must survive `python -O`."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import LinearOperator, named_tensors, with_tensors

TOLERANCE = 1e-9
"""Largest error relative to the largest entry (or 1), in double precision."""


def expect(holds: bool, message: str) -> None:
    """Raise unless a condition holds."""
    if not holds:
        raise AssertionError(message)


def expect_equal(got: object, wanted: object, what: str) -> None:
    """Raise unless two plain values are equal."""
    expect(got == wanted, f"{what} is {got}, not {wanted}")


def expect_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise unless two tensors agree in shape, dtype and, up to rounding, value."""
    expect_equal(tuple(got.shape), tuple(wanted.shape), f"the shape of {what}")
    expect_equal(got.dtype, wanted.dtype, f"the dtype of {what}")
    if not wanted.numel():
        return
    scale = max(1.0, float(wanted.abs().max()))
    error = float((got - wanted).detach().abs().max()) / scale
    expect(error <= tolerance, f"{what} is off by {error:.2g}, more than {tolerance:.2g}")


def expect_matrix(got: object, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise unless an operator is a matrix, in shape, in itself, as a product and transposed."""
    if not isinstance(got, LinearOperator):
        raise AssertionError(f"{what} is a {type(got).__name__}, not an operator")
    expect_equal(tuple(got.shape), tuple(wanted.shape), f"the shape of {what}")
    expect_close(got.dense(), wanted, what, tolerance)
    X = random(got.shape[-1], 2, dtype=got.dtype)
    expect_close(got @ X, wanted @ X, f"{what} @ X", tolerance)
    expect_close(got.T.dense(), wanted.mT, f"the transpose of {what}", tolerance)
    expect_close(got.H.dense(), wanted.mH, f"the adjoint of {what}", tolerance)


def expect_refusal(call: Callable[[], Any], what: str) -> None:
    """Raise unless a call raises a `ValueError` of two or three lines: asked, got, to do."""
    try:
        call()
    except ValueError as error:
        lines = str(error).splitlines()
        expect(2 <= len(lines) <= 3, f"the message for {what} has {len(lines)} lines, not 2 or 3")
    else:
        raise AssertionError(f"{what} is accepted; a ValueError is due")


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Inexact[Tensor, "..."]:
    """A Gaussian tensor, real or complex, that depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


def like(A: LinearOperator, *shape: int, seed: int = 0) -> Inexact[Tensor, "..."]:
    """A Gaussian tensor of the type of a value."""
    return random(*shape, seed=seed, dtype=A.dtype)


def complexified(A: LinearOperator) -> LinearOperator:
    """A complex value near `A`: Gaussian imaginary parts in its tensors."""
    tensors = named_tensors(A).values()
    moved = [t + 0.5j * random(*t.shape, seed=i) for i, t in enumerate(tensors)]
    return with_tensors(A, iter(moved))


def stacked(A: LinearOperator) -> tuple[LinearOperator, tuple[LinearOperator, LinearOperator]]:
    """`A` and another member of its size as one value with a leading batch axis, and the two."""
    tensors = list(named_tensors(A).values())
    moved = [t + 0.3 * random(*t.shape, seed=i, dtype=t.dtype) for i, t in enumerate(tensors)]
    pairs = [torch.stack(pair) for pair in zip(tensors, moved, strict=True)]
    return with_tensors(A, iter(pairs)), (A, with_tensors(A, iter(moved)))


def well_posed(D: Tensor) -> bool:
    """Whether every matrix of a stack is square and far from singular."""
    if D.shape[-2] != D.shape[-1]:
        return False
    return bool((torch.linalg.cond(D.detach()) < 1e4).all())
