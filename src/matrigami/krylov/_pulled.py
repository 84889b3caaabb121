"""Numbers whose first derivative is a product: `d value_j = Re w_j.H (dA) z_j`.

Traces of functions of a matrix and eigenvalues are of this kind. The second derivative would need
that of `w`, which is not known; asking for it is an error and not a zero.

Shapes: n = rows = columns, k = numbers, each with a pair of vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matrigami.krylov._implicit import Rebuild, outer_tangents, primal, pullback, pushforward
from matrigami.operators import LinearOperator, named_tensors, with_tensors

Weigh = Callable[[LinearOperator], Tensor]
"""The vectors `w`, `(..., n, k)`, computed only where a derivative is asked for."""


def pulled(A: LinearOperator, Z: Tensor, weigh: Weigh, values: Tensor) -> Tensor:
    """The values `(..., k)`, with the derivative `Re w_j.H (dA) z_j` in the tensors of `A`."""
    tensors = tuple(named_tensors(A).values())
    return _Pulled.apply(
        lambda parts: with_tensors(A, iter(parts)), weigh, values.detach(), Z.detach(), *tensors
    )


def unmapped(info: Any, in_dims: Any, *args: Any) -> Any:  # noqa: ARG001
    """The rule of `vmap` for what is found by products and cannot be mapped over matrices.

    Raises:
        RuntimeError: Always; torch asks for it only where a tensor is really mapped.
    """
    raise RuntimeError(
        "torch.func.vmap: eigenvalues and stochastic estimates have no batching rule.\n"
        "How many steps they take depends on the entries.\n"
        "Loop over the matrices, or give them as one stack with leading axes."
    )


class _Pulled(torch.autograd.Function):
    """Values with a given first derivative."""

    vmap = staticmethod(unmapped)

    @staticmethod
    def forward(
        _rebuild: Rebuild, _weigh: Weigh, values: Tensor, _Z: Tensor, *_tensors: Tensor
    ) -> Tensor:
        """The values."""
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep the vectors and the matrix."""
        ctx.rebuild, ctx.weigh, _, Z, *tensors = inputs
        ctx.save_for_backward(Z, *tensors)
        ctx.save_for_forward(Z, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pull the weights back through the product."""
        Z, *tensors = ctx.saved_tensors
        W = _Weights.apply(ctx.rebuild, ctx.weigh, *tensors) * grads[0][..., None, :]
        return (
            None,
            None,
            None,
            None,
            *pullback(ctx.rebuild, tensors, Z, W, ctx.needs_input_grad[4:]),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The weights against the tangent of the product."""
        with outer_tangents():
            Z, *tensors = (primal(t) for t in ctx.saved_tensors)
            W = _Weights.apply(ctx.rebuild, ctx.weigh, *tensors)
            dY = pushforward(ctx.rebuild, tensors, Z, tangents[4:])
            return (W.conj() * dY).sum(-2).real


class _Weights(torch.autograd.Function):
    """The vectors `w`, which refuse to be differentiated."""

    vmap = staticmethod(unmapped)

    @staticmethod
    def forward(rebuild: Rebuild, weigh: Weigh, *tensors: Tensor) -> Tensor:
        """The vectors."""
        return weigh(rebuild(tensors)).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        """Refuse."""
        raise _second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ARG004
        """Refuse."""
        raise _second_derivative()


def _second_derivative() -> RuntimeError:
    """What is said where a second derivative is asked for."""
    return RuntimeError(
        "a second derivative of an eigenvalue or a stochastic estimate: only the first is known.\n"
        "It was found by products alone, with vectors that are not differentiated.\n"
        "Differentiate a function of A.dense() instead."
    )
