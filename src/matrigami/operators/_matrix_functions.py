"""Functions of Hermitian matrices, with derivatives that are right where eigenvalues repeat.

`f(A) = Q f(D) Q.H` for `A = Q D Q.H`. The first derivative in a direction `E` is `Q (F o E') Q.H`
with `E' = Q.H E Q` and the divided differences `F_ij = f[d_i, d_j]`; the second sums
`f[d_i, d_k, d_j] (E'_ik G'_kj + G'_ik E'_kj)` over `k`. No eigenvector is differentiated.
Source: Higham (2008), Functions of Matrices, theorem 3.11 (Daleckii and Krein 1965).

Shapes: n = rows = columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

CLOSE = (1e-5, 1e-3)
"""Relative distance below which a divided difference of first, second order is a derivative: where
the rounding of the quotient and the remainder of the series are alike in double precision."""


@dataclass(frozen=True)
class ScalarFunction:
    """A function of a real number with its derivatives: `of(x, k)` is the `k`-th one."""

    of: Callable[[Tensor, int], Tensor]


def power_function(p: float) -> ScalarFunction:
    """`x^p`; derivatives at zero are those that are finite, else zero."""

    def of(x: Tensor, k: int) -> Tensor:
        factor = 1.0
        for i in range(k):
            factor *= p - i
        value = factor * x.pow(p - k)
        return torch.where(value.isfinite(), value, 0) if k else value

    return ScalarFunction(of)


def hermitian_function(
    f: ScalarFunction, A: Inexact[Tensor, "*batch n n"]
) -> Inexact[Tensor, "*batch n n"]:
    """`f(A)` of a Hermitian matrix, with its first and second derivative.

    Raises:
        NotImplementedError: If a third derivative is asked for.
    """
    return _Function.apply(f, A)


class _Kept(torch.autograd.Function):
    """A function of matrices that keeps them, and what is done with them: `f`, or the power `p`."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        """Keep all that came."""
        ctx.how, *matrices = inputs
        ctx.save_for_backward(*matrices)
        ctx.save_for_forward(*matrices)


class _Function(_Kept):
    """`f(A)`."""

    @staticmethod
    def forward(f: ScalarFunction, A: Tensor) -> Tensor:
        """By the eigenvalues."""
        d, Q = torch.linalg.eigh(A)
        return (Q * f.of(d, 0)[..., None, :]) @ Q.mH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """The derivative is its own adjoint."""
        return None, _First.apply(ctx.how, *ctx.saved_tensors, grads[0])

    @staticmethod
    def jvp(ctx: Any, _: None, E: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The derivative in the direction of the tangent."""
        return _First.apply(ctx.how, *ctx.saved_tensors, E)


def schatten_sum(D: Inexact[Tensor, "*batch m n"], p: float) -> Float[Tensor, "*batch"]:
    """`sum_i s_i^p` of the singular values, with its first and second derivative.

    The first is `U diag(p s^(p-1)) V.H`, an odd function of the Hermitian matrix
    `[[0, D], [D.H, 0]]`, whose derivative is right where singular values repeat.
    """
    return _SchattenSum.apply(p, D)


class _SchattenSum(_Kept):
    """`sum_i s_i^p`."""

    @staticmethod
    def forward(p: float, D: Tensor) -> Tensor:
        """By the singular values."""
        return torch.linalg.svdvals(D).pow(p).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """A multiple of the first derivative."""
        return None, grads[0][..., None, None] * _SchattenSlope.apply(ctx.how, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, E: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Its inner product with the tangent."""
        return _SchattenStep.apply(ctx.how, *ctx.saved_tensors, E)


class _SchattenSlope(_Kept):
    """`U diag(p s^(p-1)) V.H`, zero where a singular value is."""

    @staticmethod
    def forward(p: float, D: Tensor) -> Tensor:
        """By the singular vectors."""
        U, values, Vh = torch.linalg.svd(D, full_matrices=False)
        return (U * _slope(p).of(values, 0)[..., None, :]) @ Vh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """The derivative is its own adjoint."""
        (D,) = ctx.saved_tensors
        return None, _of_dilation(_slope(ctx.how), D, grads[0])

    @staticmethod
    def jvp(ctx: Any, _: None, E: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The derivative in the direction of the tangent."""
        (D,) = ctx.saved_tensors
        return _of_dilation(_slope(ctx.how), D, E)


class _SchattenStep(_Kept):
    """The derivative in the direction `E`, in one piece: torch nests no forward mode in a rule."""

    @staticmethod
    def forward(p: float, D: Tensor, E: Tensor) -> Tensor:
        """An inner product."""
        return (_SchattenSlope.apply(p, D).conj() * E).real.sum((-2, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        """Of the second derivative, and of the first."""
        (D, E), g = ctx.saved_tensors, grads[0][..., None, None]
        return None, g * _of_dilation(_slope(ctx.how), D, E), g * _SchattenSlope.apply(ctx.how, D)

    @staticmethod
    def jvp(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _: None, dD: Tensor | None, dE: Tensor | None
    ) -> Tensor:
        """Product rule."""
        D, E = ctx.saved_tensors
        moved = torch.zeros_like(E) if dE is None else _SchattenSlope.apply(ctx.how, D).conj() * dE
        if dD is not None:
            moved = moved + _of_dilation(_slope(ctx.how), D, dD).conj() * E
        return moved.real.sum((-2, -1))


def _slope(p: float) -> ScalarFunction:
    """`p |x|^(p-1) sign(x)`, odd, and zero at zero."""

    def of(x: Tensor, k: int) -> Tensor:
        factor = p
        for i in range(1, k + 1):
            factor *= p - i
        value = factor * x.abs().pow(p - 1 - k) * (x.sgn() if k % 2 == 0 else 1)
        return torch.where((x == 0) | ~value.isfinite(), 0, value)

    return ScalarFunction(of)


def _of_dilation(f: ScalarFunction, D: Tensor, E: Tensor) -> Tensor:
    """The corner of the derivative of `f([[0, D], [D.H, 0]])` in the direction of that of `E`.

    Of a tall matrix within the columns of both, beyond which both are zero.
    """
    m, n = D.shape[-2:]
    if m > 2 * n:
        Q = torch.linalg.qr(torch.cat(torch.broadcast_tensors(D, E), -1)).Q
        return Q @ _of_dilation(f, Q.mH @ D, Q.mH @ E)
    if n > 2 * m:
        return _of_dilation(f, D.mH, E.mH).mH
    return _First.apply(f, _dilated(D), _dilated(E))[..., :m, m:]


def _dilated(D: Inexact[Tensor, "*batch m n"]) -> Inexact[Tensor, "*batch s s"]:
    """`[[0, D], [D.H, 0]]`: its eigenvalues are the singular values with both signs."""
    m, n = D.shape[-2:]
    above = torch.cat([D.new_zeros(*D.shape[:-1], m), D], -1)
    return torch.cat([above, torch.cat([D.mH, D.new_zeros(*D.shape[:-2], n, n)], -1)], -2)


class _First(_Kept):
    """The derivative of `f(A)` in the direction `E`: linear in it."""

    @staticmethod
    def forward(f: ScalarFunction, A: Tensor, E: Tensor) -> Tensor:
        """Divided differences in the eigenbasis."""
        d, Q = torch.linalg.eigh(A)
        return Q @ (_first_difference(f, d) * (Q.mH @ E @ Q)) @ Q.mH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        """Of the second derivative, which is symmetric in its directions, and of the first."""
        A, E = ctx.saved_tensors
        return None, _Second.apply(ctx.how, A, E, grads[0]), _First.apply(ctx.how, A, grads[0])

    @staticmethod
    def jvp(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _: None, dA: Tensor | None, dE: Tensor | None
    ) -> Tensor:
        """Product rule."""
        A, E = ctx.saved_tensors
        moved = torch.zeros_like(E) if dE is None else _First.apply(ctx.how, A, dE)
        return moved if dA is None else moved + _Second.apply(ctx.how, A, E, dA)


class _Second(torch.autograd.Function):
    """The second derivative of `f(A)` in the directions `E` and `G`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: ScalarFunction, A: Tensor, E: Tensor, G: Tensor) -> Tensor:
        """One term for each eigenvalue in between, so that no cube is stored."""
        d, Q = torch.linalg.eigh(A)
        E, G = Q.mH @ E @ Q, Q.mH @ G @ Q
        total = torch.zeros_like(E)
        for k in range(d.shape[-1]):
            pair = E[..., :, k, None] * G[..., None, k, :] + G[..., :, k, None] * E[..., None, k, :]
            total = total + _second_difference(f, d, k) * pair
        return Q @ total @ Q.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse: the third derivative."""
        raise NotImplementedError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse: the third derivative."""
        raise NotImplementedError(THIRD)


THIRD = (
    "power(A, p): only the first two derivatives are known.\n"
    "For sqrt and other roots differentiate an equation that they solve instead."
)


def _first_difference(f: ScalarFunction, d: Float[Tensor, "*batch n"]) -> Tensor:
    """`f[d_i, d_j]`, the derivative where they are close."""
    x, y = d[..., :, None], d[..., None, :]
    return _quotient(
        f.of(x, 0) - f.of(y, 0),
        x - y,
        f.of((x + y) / 2, 1),
        CLOSE[0] * torch.maximum(x.abs(), y.abs()),
    )


def _second_difference(f: ScalarFunction, d: Float[Tensor, "*batch n"], k: int) -> Tensor:
    """`f[d_i, d_k, d_j]` for all `i, j`: the outer two of the three are the farthest apart."""
    x, y, z = torch.broadcast_tensors(d[..., :, None], d[..., None, :], d[..., k, None, None])
    low, middle, high = torch.stack([x, y, z]).sort(0).values
    scale = torch.maximum(low.abs(), high.abs())

    def first(a: Tensor, b: Tensor) -> Tensor:
        return _quotient(f.of(b, 0) - f.of(a, 0), b - a, f.of((a + b) / 2, 1), CLOSE[0] * scale)

    near = f.of((low + middle + high) / 3, 2) / 2
    return _quotient(first(middle, high) - first(low, middle), high - low, near, CLOSE[1] * scale)


def _quotient(top: Tensor, bottom: Tensor, limit: Tensor, close: Tensor) -> Tensor:
    """`top / bottom`, its limit where the bottom is close to zero."""
    far = bottom.abs() > close
    return torch.where(far, top / torch.where(far, bottom, 1), limit)
