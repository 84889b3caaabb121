"""Losses that are negative log-likelihoods: curvature of their outputs, and drawn labels.

Shapes: N = examples, C = classes (axis 1, as in torch) or outputs.
"""

from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad

ROOTS = 256
"""Columns of a root made together."""


@singledispatch
def output_curvature(loss: Any, outputs: Tensor, tangent: Tensor) -> Tensor:  # noqa: ARG001
    """The expected Hessian of the loss in its outputs, applied to a tangent.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def sampled_gradient(loss: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The gradient of the loss of each term at a label drawn from the model, not averaged.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def terms(loss: Any, outputs: Tensor) -> int:  # noqa: ARG001
    """Number of terms over which the loss averages: 1 if it sums.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def output_root(loss: Any, outputs: Tensor) -> Iterator[Tensor]:  # noqa: ARG001
    """Columns `S_k` with `sum_k S_k S_k.T` the expected Hessian of the loss, some at a time.

    Each is a cotangent of the outputs of all examples, `(k, N, ...)`.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


def output_columns(
    loss: Any,
    outputs: Tensor,
    targets: Tensor,
    labels: int | str,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Output gradients `(k, N, ...)` whose outer products sum to a curvature of the loss.

    Args:
        loss: A loss with a known likelihood.
        outputs: What the model gave.
        targets: The labels of the data.
        labels: `"exact"`, a number of drawn labels, or `"empirical"`.
        generator: Source of drawn labels.
    """
    if labels == "exact":
        return output_root(loss, outputs)
    if labels == "empirical":
        return iter([empirical_gradient(loss, outputs, targets)[None]])
    return iter([drawn_gradients(loss, outputs, int(labels), generator) * int(labels) ** -0.5])


def drawn_gradients(loss: Any, outputs: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Gradients at drawn labels, `(samples, N, ...)`, scaled by the root of the terms."""
    scale = terms(loss, outputs) ** -0.5
    return torch.stack([sampled_gradient(loss, outputs, generator) * scale for _ in range(samples)])


def empirical_gradient(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Gradients at the labels of the data, one term at a time, scaled by the root of the terms."""
    n = terms(loss, outputs)
    return grad(lambda f: loss(f, targets))(outputs) * n**0.5


def unknown(loss: Any) -> str:
    """What to say of a loss without a likelihood."""
    return (
        f"a Fisher matrix was asked for the loss {type(loss).__name__}.\n"
        "Its likelihood is not known.\n"
        "Use nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss (unweighted), or ggn(...)."
    )


def _plain(loss: nn.Module) -> None:
    """Refuse options that change the likelihood."""
    weighted = (
        getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None
    )
    if weighted or getattr(loss, "label_smoothing", 0.0) or loss.reduction == "none":
        raise ValueError(unknown(loss))


@terms.register
def _(loss: nn.CrossEntropyLoss, outputs: Tensor) -> int:
    _plain(loss)
    return outputs.numel() // outputs.shape[1] if loss.reduction == "mean" else 1


@terms.register(nn.MSELoss)
@terms.register(nn.BCEWithLogitsLoss)
def _(loss: nn.MSELoss | nn.BCEWithLogitsLoss, outputs: Tensor) -> int:
    _plain(loss)
    return outputs.numel() if loss.reduction == "mean" else 1


@output_curvature.register
def _(loss: nn.CrossEntropyLoss, outputs: Float[Tensor, "N C *S"], tangent: Tensor) -> Tensor:
    p = outputs.softmax(1)
    return (p * tangent - p * (p * tangent).sum(1, keepdim=True)) / terms(loss, outputs)


@output_curvature.register
def _(loss: nn.MSELoss, outputs: Tensor, tangent: Tensor) -> Tensor:
    return 2 * tangent / terms(loss, outputs)


@output_curvature.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, tangent: Tensor) -> Tensor:
    p = outputs.sigmoid()
    return p * (1 - p) * tangent / terms(loss, outputs)


@output_root.register
def _(loss: nn.CrossEntropyLoss, outputs: Float[Tensor, "N C *S"]) -> Iterator[Tensor]:
    """`S[:, k] = sqrt(p_k) (e_k - p)` at one position after the other."""
    p = outputs.softmax(1).flatten(2) if outputs.ndim > 2 else outputs.softmax(1)[..., None]
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:, None]  # k 1 C
    for s in range(p.shape[2]):
        q = p[..., s]
        columns = p.new_zeros(p.shape[1], *p.shape)
        columns[..., s] = q.mT[..., None].sqrt() * (eye - q) / terms(loss, outputs) ** 0.5
        yield columns.view(-1, *outputs.shape)


@output_root.register
def _(loss: nn.MSELoss, outputs: Tensor) -> Iterator[Tensor]:
    yield from _one_by_one(torch.full_like(outputs, (2 / terms(loss, outputs)) ** 0.5))


@output_root.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor) -> Iterator[Tensor]:
    p = outputs.sigmoid()
    yield from _one_by_one((p * (1 - p) / terms(loss, outputs)).sqrt())


def _one_by_one(roots: Tensor) -> Iterator[Tensor]:
    """Columns of a diagonal root: one output at a time, of all examples together."""
    flat = roots.flatten(1)
    for first in range(0, flat.shape[1], ROOTS):
        chosen = torch.arange(first, min(first + ROOTS, flat.shape[1]), device=roots.device)
        columns = roots.new_zeros(len(chosen), *flat.shape)
        columns[torch.arange(len(chosen)), :, chosen] = flat[:, chosen].mT
        yield columns.view(-1, *roots.shape)


@sampled_gradient.register
def _(
    loss: nn.CrossEntropyLoss,  # noqa: ARG001
    outputs: Float[Tensor, "N C *S"],
    generator: torch.Generator,
) -> Tensor:
    p = outputs.softmax(1)
    flat = p.movedim(1, -1).reshape(-1, p.shape[1])
    drawn = torch.multinomial(flat, 1, generator=generator)
    one_hot = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
    return p - one_hot.view(p.movedim(1, -1).shape).movedim(-1, 1)


@sampled_gradient.register
def _(loss: nn.MSELoss, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    noise = torch.randn(
        outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
    )
    return 2**0.5 * noise  # the square has the Hessian 2 of (f - y)^2 as its mean


@sampled_gradient.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    p = outputs.sigmoid()
    return p - torch.bernoulli(p, generator=generator)
