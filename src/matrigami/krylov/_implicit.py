"""The derivative of a solution, from the equation that it solves and not from how it was found.

For `A X = B`, in torch's convention for complex gradients:

    forward   dX = A^-1 (dB - dA X)
    reverse   dB = A^-H G,   dA = the pullback of -dB through A -> A X

Both are solutions of the same kind, so they call `implicit_solve` again: every order and every
nesting of forward and reverse mode follows from these two lines. The derivative of a value in its
tensors enters through its product alone.

Shapes: n = rows = columns, k = right-hand sides.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.autograd import forward_ad

from matrigami.operators import LinearOperator, named_tensors, with_tensors

Solver = Callable[[Any, Tensor], Tensor]
"""Computes the value of `A^-1 B` for this kind of `A`, and for its adjoint; not differentiated."""

Rebuild = Callable[[tuple[Tensor, ...]], LinearOperator]
"""A value from its tensors."""


def implicit_solve(
    A: LinearOperator, B: Inexact[Tensor, "... n k"], solver: Solver
) -> Inexact[Tensor, "... n k"]:
    """`A^-1 B` by any solver, differentiable in `B` and the tensors of `A` to every order.

    Reverse and forward mode, `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`,
    `vmap`) and every nesting of them; the derivatives are solutions by the same solver, with `A`
    or `A.H`. A mapped axis of `B` becomes columns, one of the tensors a stack of matrices.

    Args:
        A: A nonsingular matrix, or a stack.
        B: Right-hand sides; batch axes broadcast, types promote.
        solver: `(A, B) -> X`. It sees plain tensors and may do what cannot be differentiated.

    Returns:
        The solution.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> lu = lambda A, B: torch.linalg.solve(A.dense(), B)
        >>> x = lambda a: implicit_solve(DenseMatrix(a[None, None]), torch.ones(1, 1), lu)[0, 0]
        >>> torch.func.grad(torch.func.grad(x))(torch.tensor(2.0))  # of 1 / a
        tensor(0.2500)
    """
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    B = B.to(torch.promote_types(A.dtype, B.dtype)).expand(*batch, *B.shape[-2:])
    tensors = tuple(named_tensors(A).values())
    return _Solution.apply(lambda parts: with_tensors(A, iter(parts)), solver, B, *tensors)


class _Solution(torch.autograd.Function):
    """`X = A^-1 B`."""

    @staticmethod
    def forward(rebuild: Rebuild, solver: Solver, B: Tensor, *tensors: Tensor) -> Tensor:
        """The value, by the solver; on the meta device there are no numbers to solve for."""
        if B.device.type == "meta":
            return torch.empty_like(B)
        return solver(rebuild(tensors), B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the solution and the matrix."""
        ctx.rebuild, ctx.solver, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint solve."""
        X, *tensors = ctx.saved_tensors
        G = implicit_solve(ctx.rebuild(tuple(tensors)).H, grads[0], ctx.solver)
        pulled = pullback(ctx.rebuild, tensors, X, -G, ctx.needs_input_grad[3:])
        return None, None, G if ctx.needs_input_grad[2] else None, *pulled

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The solve with the tangent of the equation."""
        with outer_tangents():
            X, *tensors = (primal(t) for t in ctx.saved_tensors)
            dY = pushforward(ctx.rebuild, tensors, X, tangents[3:])
            dB = torch.zeros_like(X) if tangents[2] is None else tangents[2]
            return implicit_solve(ctx.rebuild(tuple(tensors)), dB - dY, ctx.solver)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any,
        in_dims: tuple[Any, ...],
        rebuild: Rebuild,
        solver: Solver,
        B: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        """Columns where only `B` is mapped, a stack of matrices or a loop where they are too."""
        axes = in_dims[3:]
        if all(axis is None for axis in axes):
            return _columns(rebuild, solver, B.movedim(in_dims[2], -2), tensors), 0
        size = info.batch_size
        lead = [_leading(t, a, size) for t, a in zip((B, *tensors), in_dims[2:], strict=True)]
        single = rebuild(tuple(t[0] for t in lead[1:]))
        if B.ndim - (in_dims[2] is not None) == 2 and len(single.shape) == 2:
            stack = rebuild(tuple(lead[1:]))
            if stack.shape == (size, *single.shape):
                return implicit_solve(stack, lead[0], solver), 0
        parts = zip(*lead, strict=True)  # a stack already, or a value that cannot be stacked
        return torch.stack([implicit_solve(rebuild(tuple(t)), b, solver) for b, *t in parts]), 0


def _columns(rebuild: Rebuild, solver: Solver, B: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Solve with the mapped axis `(..., n, mapped, k)` among the columns, and put it first."""
    X = implicit_solve(rebuild(tensors), B.flatten(-2), solver)
    return X.unflatten(-1, B.shape[-2:]).movedim(-2, 0)


def _leading(t: Tensor, axis: int | None, size: int) -> Tensor:
    """A tensor with the mapped axis first, repeated where it is not mapped."""
    return t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)


def _product(
    rebuild: Rebuild, tensors: list[Tensor], X: Tensor, chosen: list[int]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """`A X` as a function of the chosen tensors, and these."""

    def product(*parts: Tensor) -> Tensor:
        """The product with the chosen tensors exchanged."""
        every = list(tensors)
        for i, part in zip(chosen, parts, strict=True):
            every[i] = part
        return rebuild(tuple(every)) @ X

    return product, tuple(tensors[i] for i in chosen)


def pullback(
    rebuild: Rebuild, tensors: list[Tensor], X: Tensor, G: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of `Re <G, A X>` in the wanted tensors, `X` held fixed."""
    chosen = [i for i, asked in enumerate(wanted) if asked]
    grads: list[Tensor | None] = [None] * len(tensors)
    if chosen:
        function, primals = _product(rebuild, tensors, X, chosen)
        _, pull = torch.func.vjp(function, *primals)  # pyright: ignore[reportAssignmentType]
        for i, grad in zip(chosen, pull(G), strict=True):
            grads[i] = grad
    return grads


def pushforward(
    rebuild: Rebuild, tensors: list[Tensor], X: Tensor, tangents: tuple[Any, ...]
) -> Tensor:
    """`dA X` for the tangents of the tensors, `X` held fixed.

    The transpose of the pullback, which is linear: torch does not nest its own forward mode in a
    rule of forward mode.
    """
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    function, primals = _product(rebuild, tensors, X, chosen)
    Y, pull = torch.func.vjp(function, *primals)  # pyright: ignore[reportAssignmentType]
    if not chosen:
        return torch.zeros_like(Y)
    _, push = torch.func.vjp(pull, torch.zeros_like(Y))  # pyright: ignore[reportAssignmentType]
    return push(tuple(tangents[i] for i in chosen))[0]


def outer_tangents() -> AbstractContextManager[None]:
    """Torch stops forward mode in a rule for it, and with it the transforms around this one."""
    return forward_ad._set_fwd_grad_enabled(True)


def primal(t: Tensor) -> Tensor:
    """A saved tensor without the tangent of this level, whose rule is being computed."""
    return forward_ad.unpack_dual(t).primal
