"""Products of two factors around a permutation, with nothing copied on the way.

`Z[g, r, i] = sum_a R[g, r, i, a] X[g, a]`, then `Y[i, j] = sum_{g, r} L[i, j, g, r] Z[g, r, i]`.
Each factor is one batched product that writes its result where, and in the order in which, the next
one reads it; the gradients are four more. Autograd cannot know that: it makes every result
contiguous and copies it into the next order.

Shapes: g = input blocks, a = their columns, i = output blocks, j = their rows, r = rank of a tile,
k = right-hand sides, n = g a, m = i j.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from matrigami.operators._dispatch import OpenFunction

PLAIN = (Tensor, torch.nn.Parameter)
"""Types that are nothing but an array."""


class TwoFactors(NamedTuple):
    """A matrix as a product of two factors, or a stack of such matrices.

    Args:
        R: First factor.
        L: Second factor.
        interleaved_rows: Output axes `(j, i)` instead of `(i, j)`.
        interleaved_columns: Input axes `(a, g)` instead of `(g, a)`.
    """

    R: Float[Tensor, "*batch g r i a"]
    L: Float[Tensor, "*batch i j g r"]
    interleaved_rows: bool
    interleaved_columns: bool


@OpenFunction
def as_two_factors(A: Any) -> TwoFactors | None:
    """The two factors of a matrix around a permutation, sharing storage; None if it has none."""
    return None


def is_written_in_place(X: Tensor, *factors: Tensor) -> bool:
    """Whether results may be written into given memory: one real matrix, nobody looking on.

    Tracers, dispatch modes, `torch.func`, forward mode and automatic casts see plain operations.
    """
    if is_watched():
        return False
    if X.ndim != 2 or X.is_complex() or X.device.type not in {"cpu", "cuda"}:
        return False
    if torch.is_autocast_enabled(X.device.type):
        return False
    return all(type(t) in PLAIN and t.dtype == X.dtype for t in (X, *factors))


def is_watched() -> bool:
    """Whether somebody traces or transforms what is computed now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def two_factors(
    X: Float[Tensor, "n k"],
    R: Float[Tensor, "g r i a"],
    L: Float[Tensor, "i j g r"],
    *,
    interleaved_rows: bool,
    interleaved_columns: bool,
) -> Float[Tensor, "m k"]:
    """The product, differentiable any number of times.

    Args:
        X: The right-hand sides.
        R: First factor.
        L: Second factor.
        interleaved_rows: Output axes `(j, i)` instead of `(i, j)`.
        interleaved_columns: Input axes `(a, g)` instead of `(g, a)`.
    """
    layout = interleaved_rows, interleaved_columns
    if torch.is_grad_enabled() and (X.requires_grad or R.requires_grad or L.requires_grad):
        return _Product.apply(X, R, L, layout)  # pyright: ignore[reportReturnType]
    return _forward(X, R, L, layout, 1.0)[0]


class _Product(torch.autograd.Function):
    """The product and its gradients."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool]) -> Tensor:
        """Keep what is between the factors."""
        Y, Z = _forward(X, R, L, layout, 0.5)  # half: without Z, the gradients need it again
        ctx.save_for_backward(X, R, L, Z)
        ctx.layout = layout
        return Y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `X`, `R` and `L`."""
        (X, R, L, Z), (dY,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled() or is_batch(dY):
            return (*_derivatives(X, R, L, dY, ctx.layout), None)
        rows, columns = ctx.layout
        (g, r, i, a), j, k = R.shape, L.shape[1], X.shape[-1]
        Gi, Z = _readable(_blocks(dY, i, j, rows)), _between(X, R, columns) if Z is None else Z
        ZT = Z.view(g * r, i, k).permute(1, 2, 0)
        # of one rank, both orders can be read, and a contiguous one is written in a single call
        between = X.new_empty(i, g, k) if r == 1 else X.new_empty(g * r, i, k).transpose(0, 1)
        torch.bmm(L.reshape(i, j, g * r).mT, Gi, out=between)
        dZ = between.transpose(0, 1).reshape(g, r * i, k)
        needs_x, needs_r, needs_l, _ = ctx.needs_input_grad
        dL = torch.bmm(Gi, ZT).view(L.shape) if needs_l else None
        dR = (
            torch.bmm(dZ, _readable(_blocks(X, g, a, columns)).mT).view(R.shape)
            if needs_r
            else None
        )
        dX = None
        if needs_x:
            dX, target = _result(X, g, a, columns)
            torch.bmm(R.reshape(g, r * i, a).mT, dZ, out=target)
        return dX, dR, dL, None


def _forward(
    X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool], share: float
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "g ri k"] | None]:
    """The product, and what is between the factors; None from one kernel.

    Args:
        X: The right-hand sides.
        R: First factor.
        L: Second factor.
        layout: Whether rows and columns are interleaved.
        share: The most that one kernel may take of the time of two.
    """
    if X.device.type == "cuda" and _has_triton():
        from matrigami.operators import _fused  # noqa: PLC0415 - needs Triton

        choice = _fused.chosen(X, R, L, layout, lambda: by_two(X, R, L, layout)[0])
        if choice.tile is not None and choice.ratio <= share:
            return _fused.run(X, R, L, layout, choice.tile), None
    return by_two(X, R, L, layout)


@cache
def _has_triton() -> bool:
    """Whether there is a compiler for the card."""
    return torch.version.cuda is not None and find_spec("triton") is not None


def by_two(
    X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "g ri k"]]:
    """Two batched products."""
    rows, columns = layout
    (g, r, i, _), j, k = R.shape, L.shape[1], X.shape[-1]
    Z = _between(X, R, columns)
    Y, target = _result(X, i, j, rows)
    torch.bmm(L.reshape(i, j, g * r), Z.view(g * r, i, k).transpose(0, 1), out=target)
    return Y, Z


def _between(X: Tensor, R: Tensor, columns: bool) -> Float[Tensor, "g ri k"]:
    """The first product."""
    g, r, i, a = R.shape
    return torch.bmm(R.reshape(g, r * i, a), _readable(_blocks(X, g, a, columns)))


def is_batch(dY: Tensor) -> bool:
    """Whether this stands for many gradients at once, which cannot be written in place."""
    return is_functorch_wrapped_tensor(dY) or is_legacy_batchedtensor(dY)


def _derivatives(
    X: Tensor, R: Tensor, L: Tensor, dY: Tensor, layout: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by operations that have derivatives themselves."""
    rows, columns = layout
    (g, r, i, a), j, k = R.shape, L.shape[1], X.shape[-1]
    Xg, Gi = _blocks(X, g, a, columns), _blocks(dY, i, j, rows)
    first, second = R.reshape(g, r * i, a), L.reshape(i, j, g * r)
    Z = torch.bmm(first, Xg).reshape(g * r, i, k).transpose(0, 1)  # i gr k
    dZ = torch.bmm(second.transpose(1, 2), Gi).transpose(0, 1).reshape(g, r * i, k)
    dX = torch.bmm(first.transpose(1, 2), dZ)
    dX = (dX.transpose(0, 1) if columns else dX).reshape(X.shape)
    dR, dL = torch.bmm(dZ, Xg.transpose(1, 2)), torch.bmm(Gi, Z.transpose(1, 2))
    return dX, dR.reshape(R.shape), dL.reshape(L.shape)


def _blocks(X: Tensor, blocks: int, size: int, interleaved: bool) -> Float[Tensor, "g a k"]:
    """The rows of a matrix, block by block."""
    if interleaved:
        return X.reshape(size, blocks, X.shape[-1]).transpose(0, 1)
    return X.reshape(blocks, size, X.shape[-1])


def _readable(X: Float[Tensor, "g a k"]) -> Float[Tensor, "g a k"]:
    """Copied if no axis of the blocks is contiguous, which each product would do for itself.

    Then the blocks are interleaved and vectors lie one behind the other: each is reordered where it
    is, three to ten times faster than with the right-hand sides as the fastest axis.
    """
    return X if 1 in X.stride()[1:] else X.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _result(
    X: Tensor, blocks: int, size: int, interleaved: bool
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "i j k"]]:
    """Memory for a result, and its rows block by block.

    With right-hand sides as the fastest axis, which every product can write; on a card, row
    by row of a layer's output where the blocks allow it, since what follows a layer reads rows.
    """
    shape, k = (blocks * size, X.shape[-1]), X.shape[-1]
    if interleaved or X.stride(0) != 1 or X.device.type != "cuda":
        Y = X.new_empty(shape)
    else:
        Y = X.new_empty(k, blocks * size).mT
    return Y, _blocks(Y, blocks, size, interleaved)
