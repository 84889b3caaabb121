"""Losses that are negative log-likelihoods: curvature of their outputs, and drawn labels.

Shapes: N = examples, C = classes (axis 1, as in torch) or outputs.
"""

from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
