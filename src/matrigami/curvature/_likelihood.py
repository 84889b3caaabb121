"""Losses that are negative log-likelihoods: curvature of their outputs, and drawn labels.

A loss is `sum_t w_t l(f_t, y_t) / n` over its terms: positions that count, with weights of classes
and smoothed labels. Its expected Hessian in the outputs is `w_t / n` times that of one term.

Shapes: N = examples, C = classes (axis 1, as in torch) or outputs.
"""

import inspect
from collections.abc import Iterator
from functools import partial, singledispatch
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional

ROOTS = 256
"""Columns of a root made together."""

MODULES = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.mse_loss: nn.MSELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.nll_loss: nn.NLLLoss,
}
"""The module of each loss that is a function."""


class Terms(NamedTuple):
    """What a loss sums, and divides by.

    Args:
        divisor: The number by which the sum is divided: 1 if it is not.
        weights: The weight of each term, of a shape that broadcasts with the outputs; None: all
            count alike.
    """

    divisor: float
    weights: Tensor | None = None

    @property
    def root(self) -> float:
        """The root of one share of the mean."""
        return self.divisor**-0.5

    def weighted(self, t: Tensor) -> Tensor:
        """Each term times the root of its weight."""
        return t if self.weights is None else t * self.weights.to(t).sqrt()


def as_module(loss: Any) -> Any:
    """The module that a function of torch stands for; anything else as it is.

    Examples:
        >>> as_module(partial(functional.cross_entropy, label_smoothing=0.1)).label_smoothing
        0.1
    """
    if isinstance(loss, partial) and not loss.args and loss.func in MODULES:
        known = inspect.signature(MODULES[loss.func]).parameters
        return MODULES[loss.func](**loss.keywords) if known.keys() >= loss.keywords.keys() else loss
    if isinstance(loss, type(functional.cross_entropy)) and loss in MODULES:
        return MODULES[loss]()
    return loss


@singledispatch
def terms(loss: Any, targets: Tensor) -> Terms:  # noqa: ARG001
    """The terms of a loss at some targets.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def term_count(loss: Any, outputs: Tensor) -> int:  # noqa: ARG001
    """How many terms outputs have, if all of them count.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def output_curvature(loss: Any, outputs: Tensor, tangent: Tensor) -> Tensor:  # noqa: ARG001
    """The expected Hessian of one term in its outputs, applied to a tangent, for all of them.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def sampled_gradient(loss: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """The gradient of each term at a label drawn from the model, not averaged.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def sampled_labels(loss: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Labels drawn from the model, as the loss takes them.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


@singledispatch
def output_root(loss: Any, outputs: Tensor, found: Terms) -> Iterator[Tensor]:  # noqa: ARG001
    """Columns `S_k` with `sum_k S_k S_k.T` the expected Hessian of the loss, some at a time.

    Each is a cotangent of the outputs of all examples, `(k, N, ...)`.

    Raises:
        ValueError: If the loss is no known likelihood.
    """
    raise ValueError(unknown(loss))


def drawn_gradients(
    loss: Any, outputs: Tensor, found: Terms, samples: int, generator: torch.Generator
) -> Tensor:
    """Gradients at drawn labels, `(samples, N, ...)`, scaled by the root of their share."""
    drawn = [sampled_gradient(loss, outputs, generator) * found.root for _ in range(samples)]
    return found.weighted(torch.stack(drawn))


def empirical_gradient(loss: Any, outputs: Tensor, targets: Tensor, found: Terms) -> Tensor:
    """Gradients at the labels of the data, of each term, scaled by the root of their share."""
    g = grad(lambda f: loss(f, targets))(outputs) * found.divisor**0.5
    if found.weights is None:
        return g
    roots = found.weights.to(g).sqrt()
    return torch.where(roots > 0, g / roots.clamp_min(torch.finfo(g.dtype).tiny), 0.0)


def term_axis(loss: Any, axes: int) -> int:
    """The axis of the outputs of one term: classes, or the last, which may be the first, too."""
    return 1 if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else axes - 1


def unknown(loss: Any) -> str:
    """What to say of a loss without a likelihood."""
    name = getattr(loss, "__name__", type(loss).__name__)
    return (
        f"Fisher matrix of the loss {name}: its likelihood is not known.\n"
        "Use nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss or nn.BCEWithLogitsLoss, averaged or "
        "summed, or ggn(...)."
    )


Categorical = nn.CrossEntropyLoss | nn.NLLLoss
Pointwise = nn.MSELoss | nn.BCEWithLogitsLoss


def _known(loss: nn.Module) -> bool:
    """Whether a loss averages; one that is not reduced, or computes something else, is refused."""
    runs = type(loss).forward
    own = all(runs is not kind.forward for kind in MODULES.values())
    if own or loss.reduction not in ("mean", "sum"):
        raise ValueError(unknown(loss))
    return loss.reduction == "mean"


@term_count.register(nn.CrossEntropyLoss)
@term_count.register(nn.NLLLoss)
def _(loss: Categorical, outputs: Tensor) -> int:
    return outputs.numel() // outputs.shape[1] if _known(loss) else 1


@term_count.register(nn.MSELoss)
@term_count.register(nn.BCEWithLogitsLoss)
def _(loss: Pointwise, outputs: Tensor) -> int:
    return outputs.numel() if _known(loss) else 1


@terms.register(nn.CrossEntropyLoss)
@terms.register(nn.NLLLoss)
def _(loss: Categorical, targets: Tensor) -> Terms:
    """Ignored positions have no weight; the others that of their class, smoothed as they are."""
    averages = _known(loss)
    if targets.is_floating_point():
        return _of_probabilities(loss, targets, averages)
    kept = targets != loss.ignore_index
    if loss.weight is None and bool(kept.all()):
        return Terms(targets.numel() if averages else 1)
    weights = kept.to(torch.float64)
    if loss.weight is None:
        return Terms(float(weights.sum()) if averages else 1, weights.unsqueeze(1))
    own = loss.weight.to(weights)[targets.where(kept, 0)]
    count = float((own * weights).sum()) if averages else 1
    smooth = getattr(loss, "label_smoothing", 0.0)
    mixed = (1 - smooth) * own + smooth * float(loss.weight.double().mean())
    return Terms(count, (mixed * weights).unsqueeze(1))


def _of_probabilities(loss: Categorical, targets: Tensor, averages: bool) -> Terms:
    """Targets that are distributions over classes: the weight of a term is that of its classes."""
    if targets.ndim < 2:
        raise ValueError(
            f"{type(loss).__name__}: the targets {tuple(targets.shape)} are {targets.dtype}.\n"
            "Classes are integers (targets.long()); probabilities have an axis of classes, (N, C)."
        )
    classes = targets.shape[1]
    smooth = getattr(loss, "label_smoothing", 0.0)
    mixed = targets.double() * (1 - smooth) + smooth / classes
    if loss.weight is not None:
        mixed = mixed * loss.weight.double().view(1, -1, *[1] * (targets.ndim - 2))
    return Terms(targets.numel() // classes if averages else 1, mixed.sum(1, keepdim=True))


@terms.register
def _(loss: nn.MSELoss, targets: Tensor) -> Terms:
    return Terms(targets.numel() if _known(loss) else 1)


@terms.register
def _(loss: nn.BCEWithLogitsLoss, targets: Tensor) -> Terms:
    """Weights of outputs, and of positive labels."""
    count = targets.numel() if _known(loss) else 1
    if loss.weight is None and loss.pos_weight is None:
        return Terms(count)
    y = targets.double()
    own = 1.0 if loss.weight is None else loss.weight.double()
    more = 1.0 if loss.pos_weight is None else loss.pos_weight.double() * y + 1 - y
    return Terms(count, own * more * torch.ones_like(y))


@output_curvature.register
def _(loss: nn.CrossEntropyLoss, outputs: Float[Tensor, "N C *S"], tangent: Tensor) -> Tensor:  # noqa: ARG001
    p = outputs.softmax(1)
    return p * tangent - p * (p * tangent).sum(1, keepdim=True)


@output_curvature.register
def _(loss: nn.NLLLoss, outputs: Float[Tensor, "N C *S"], tangent: Tensor) -> Tensor:  # noqa: ARG001
    return outputs.exp() * tangent


@output_curvature.register
def _(loss: nn.MSELoss, outputs: Tensor, tangent: Tensor) -> Tensor:  # noqa: ARG001
    return 2 * tangent


@output_curvature.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, tangent: Tensor) -> Tensor:  # noqa: ARG001
    p = outputs.sigmoid()
    return p * (1 - p) * tangent


@output_root.register
def _(
    loss: nn.CrossEntropyLoss,  # noqa: ARG001
    outputs: Float[Tensor, "N C *S"],
    found: Terms,
) -> Iterator[Tensor]:
    """`S[:, k] = sqrt(p_k) (e_k - p)` at one position after the other."""
    eye = _classes(outputs)

    def columns(p: Float[Tensor, "N C"]) -> Float[Tensor, "C N C"]:
        """Of one position."""
        return p.mT[..., None].sqrt() * (eye - p)

    yield from _by_positions(outputs.softmax(1), columns, found)


@output_root.register
def _(loss: nn.NLLLoss, outputs: Float[Tensor, "N C *S"], found: Terms) -> Iterator[Tensor]:
    """`S[:, k] = sqrt(p_k) e_k`: the outputs are logarithms of probabilities."""
    _refuse_scores(loss, outputs)
    eye = _classes(outputs)
    yield from _by_positions(outputs.exp(), lambda p: p.mT[..., None].sqrt() * eye, found)


def _classes(outputs: Float[Tensor, "N C *S"]) -> Float[Tensor, "C 1 C"]:
    """The unit vector of each class."""
    return torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)[:, None]


def _by_positions(p: Float[Tensor, "N C *S"], columns: Any, found: Terms) -> Iterator[Tensor]:
    """The columns of one position after the other, zero at all others."""
    flat = p.flatten(2) if p.ndim > 2 else p[..., None]
    for s in range(flat.shape[2]):
        made = flat.new_zeros(flat.shape[1], *flat.shape)
        made[..., s] = columns(flat[..., s]) / found.divisor**0.5
        yield found.weighted(made.view(-1, *p.shape))


def _refuse_scores(loss: nn.NLLLoss, outputs: Tensor) -> None:
    """The likelihood of NLLLoss is known where its outputs are logarithms of probabilities."""
    mass = outputs.detach().exp().sum(1)
    if not bool(((mass - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"Fisher matrix of the loss {type(loss).__name__}: the outputs are no "
            "log-probabilities.\nTheir exponentials do not sum to one.\n"
            "End the model with nn.LogSoftmax(1), or use nn.CrossEntropyLoss."
        )


@output_root.register
def _(loss: nn.MSELoss, outputs: Tensor, found: Terms) -> Iterator[Tensor]:  # noqa: ARG001
    yield from _one_by_one(torch.full_like(outputs, (2 / found.divisor) ** 0.5))


@output_root.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, found: Terms) -> Iterator[Tensor]:  # noqa: ARG001
    p = outputs.sigmoid()
    yield from _one_by_one(found.weighted((p * (1 - p) / found.divisor).sqrt()))


def _one_by_one(roots: Tensor) -> Iterator[Tensor]:
    """Columns of a diagonal root: one output at a time, of all examples together."""
    flat = roots.reshape(len(roots), -1)
    for first in range(0, flat.shape[1], ROOTS):
        chosen = torch.arange(first, min(first + ROOTS, flat.shape[1]), device=roots.device)
        columns = roots.new_zeros(len(chosen), *flat.shape)
        columns[torch.arange(len(chosen)), :, chosen] = flat[:, chosen].mT
        yield columns.view(-1, *roots.shape)


@sampled_labels.register
def _(
    loss: nn.CrossEntropyLoss,  # noqa: ARG001
    outputs: Float[Tensor, "N C *S"],
    generator: torch.Generator,
) -> Tensor:
    return _drawn_classes(outputs.softmax(1), generator)


@sampled_labels.register
def _(
    loss: nn.NLLLoss,
    outputs: Float[Tensor, "N C *S"],
    generator: torch.Generator,
) -> Tensor:
    _refuse_scores(loss, outputs)
    return _drawn_classes(outputs.exp(), generator)


@sampled_labels.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return torch.bernoulli(outputs.sigmoid(), generator=generator)


@sampled_labels.register
def _(loss: nn.MSELoss, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """With the variance 1/2, of which the square is the likelihood."""
    noise = torch.randn(
        outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
    )
    return outputs - 2**-0.5 * noise


def _drawn_classes(p: Float[Tensor, "N C *S"], generator: torch.Generator) -> Tensor:
    """A class of each position."""
    flat = p.movedim(1, -1).reshape(-1, p.shape[1])
    return torch.multinomial(flat, 1, generator=generator).view(p.movedim(1, -1).shape[:-1])


def _one_hot(p: Float[Tensor, "N C *S"], labels: Tensor) -> Float[Tensor, "N C *S"]:
    """One at the label of each position."""
    return torch.zeros_like(p).scatter_(1, labels.unsqueeze(1), 1.0)


@sampled_gradient.register
def _(
    loss: nn.CrossEntropyLoss, outputs: Float[Tensor, "N C *S"], generator: torch.Generator
) -> Tensor:
    p = outputs.softmax(1)
    return p - _one_hot(p, sampled_labels(loss, outputs, generator))


@sampled_gradient.register
def _(loss: nn.NLLLoss, outputs: Float[Tensor, "N C *S"], generator: torch.Generator) -> Tensor:
    return -_one_hot(outputs, sampled_labels(loss, outputs, generator))


@sampled_gradient.register
def _(loss: nn.MSELoss, outputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    noise = torch.randn(
        outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
    )
    return 2**0.5 * noise  # the square has the Hessian 2 of (f - y)^2 as its mean


@sampled_gradient.register
def _(loss: nn.BCEWithLogitsLoss, outputs: Tensor, generator: torch.Generator) -> Tensor:
    return outputs.sigmoid() - sampled_labels(loss, outputs, generator)
