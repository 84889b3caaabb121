"""A training loss as a function of a model's parameters, from which curvature derives.

Shapes: N = examples of a batch, C = classes or outputs, p = parameters in all.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase  # the base of all batch and instance norms
from torch.nn.modules.dropout import _DropoutNd

from matrigami.curvature._likelihood import MODULES, as_module, terms
from matrigami.curvature._tape import unobserved
from matrigami.nn import called_with

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of outputs and targets, such as `nn.CrossEntropyLoss()`."""

Batch = tuple[Any, Tensor]
"""Inputs and targets."""


class Weighted(NamedTuple):
    """A batch, and its weight in the loss of all data."""

    inputs: Any
    targets: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Objective:
    """`sum_b weight_b loss(model(x_b), y_b)`, as a function of the trainable parameters.

    A loss with `reduction="sum"` is summed over the batches, any other is averaged: over what
    counts in the targets where that is known, else over the examples. So it does not matter how
    the data are cut into batches, which are read one at a time, and again for each pass.

    Args:
        model: The model.
        loss: The loss, as a module where it is one of torch's.
        data: What gives the batches, as often as it is asked.
        total: What the weights are divided by.
    """

    model: nn.Module
    loss: Loss
    data: Iterable[Batch]
    total: float

    def __iter__(self) -> Iterator[Weighted]:
        """The batches, one at a time, without those in which nothing counts."""
        for inputs, targets in self.data:
            share = _mass(self.loss, targets)
            if share > 0:
                weight = 1.0 if sums(self.loss) else share / self.total
                yield Weighted(inputs, targets, weight)

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """What the model gives with these parameters; its own are not touched.

        Raises:
            ValueError: If the model does what `torch.func` cannot differentiate.
        """
        try:
            with unobserved(), differentiable(self.model):
                return called_with(self.model, parameters, inputs)
        except RuntimeError as error:
            raise _explained(error) from error


def _explained(error: RuntimeError) -> Exception:
    """What to do where `torch.func`, which the exact matrices are made by, gives up."""
    if "saved tensor hooks" in str(error):
        fault = "the model has checkpoints, or other hooks on what autograd saves"
        remedy = "Turn them off for this (model.gradient_checkpointing_disable())"
    elif "inside of a function being transformed" in str(error):
        fault = "the model calls requires_grad_() or autograd in its forward pass"
        remedy = "Take such gradients by torch.func.grad"
    else:
        return error
    return ValueError(
        f"curvature: {fault}.\nThe exact matrices are made by torch.func, which does not know it."
        f"\n{remedy}."
    )


def objective(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch) -> Objective:
    """Check a model, a loss and data, and hold them together.

    Args:
        model: Its parameters with `requires_grad` count.
        loss: Of outputs and targets.
        data: One batch `(inputs, targets)`, or an iterable of batches such as a loader. It is read
            once to count them, and then again for each pass; of an iterator, which can be read
            only once, the batches are kept.

    Raises:
        ValueError: If nothing is trainable, there are no data, or a batch holds NaN.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"curvature: the {type(model).__name__} has no trainable parameters.\n"
            "A frozen model has none.\nCall model.requires_grad_() on what should count."
        )
    _refuse_complex(model)
    _refuse_noise(model)
    loss = as_module(loss)
    every = readable_again(data)
    return Objective(model, loss, every, _counted(loss, every))


def readable_again(data: Iterable[Batch] | Batch) -> Iterable[Batch]:
    """The data as an iterable of batches that can be read again."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return (data,)  # pyright: ignore[reportReturnType]
    return tuple(data) if isinstance(data, Iterator) else data  # pyright: ignore[reportReturnType]


def _counted(loss: Loss, batches: Iterable[Batch]) -> float:
    """How much there is in all batches, which are looked at one at a time."""
    found = [_mass_of(loss, i, batch) for i, batch in enumerate(batches)]
    if not found or not sum(found):
        raise ValueError(
            "curvature: there are no data.\n"
            "The loader is empty, one of its batches is, or nothing in the targets counts.\n"
            "Give at least one batch (inputs, targets)."
        )
    return sum(found)


def _mass_of(loss: Loss, i: int, batch: Any) -> float:
    """How much a batch counts, if it is one."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair or not isinstance(batch[1], Tensor):
        what = (
            f"has a {type(batch[1]).__name__} as"
            if pair
            else f"is a {type(batch).__name__} without"
        )
        raise TypeError(
            f"curvature: batch {i} of the data {what} targets.\n"
            "A batch is a pair (inputs, targets), whose targets are a tensor.\n"
            "Give ((inputs, targets) for ... in loader), or one such pair."
        )
    inputs, targets = batch
    if targets.ndim == 0 or len(targets) == 0:
        raise ValueError(
            f"curvature: there are no data: the targets of batch {i} have the shape "
            f"{tuple(targets.shape)}.\nTheir first axis should be of examples, at least one.\n"
            "Give targets (N, ...), also for one example."
        )
    given = (inputs, targets)
    if any(t.is_floating_point() and not t.isfinite().all() for t in given if torch.is_tensor(t)):
        raise ValueError(
            f"curvature: batch {i} holds NaN or infinite entries.\n"
            "No curvature can be computed from it.\nRemove the batch."
        )
    return _mass(loss, targets)


def _mass(loss: Loss, targets: Tensor) -> float:
    """How much some targets count in a mean: their terms where they are known, or examples."""
    likely = type(loss) in MODULES.values() and getattr(loss, "reduction", "") == "mean"
    return terms(loss, targets).divisor if likely else float(len(targets))


def sums(loss: Any) -> bool:
    """Whether a loss sums over its terms, instead of averaging."""
    return isinstance(loss, nn.Module) and getattr(loss, "reduction", "mean") == "sum"


def differentiable(model: nn.Module) -> ExitStack:
    """A context in which fused kernels without second or forward derivatives stand aside."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of its other flags
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    return stack


def _refuse_complex(model: nn.Module) -> None:
    """The moments of real gradients are not the curvature of complex parameters."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(
                f"curvature: {name} is complex.\nThe approximations are for real parameters.\n"
                "Freeze it with requires_grad_(False), or hold its real and imaginary parts."
            )


def _refuse_noise(model: nn.Module) -> None:
    """Batch statistics and dropout make another loss of every pass, and change the model."""
    for name, m in model.named_modules():
        statistics = isinstance(m, _NormBase) and m.track_running_stats
        if m.training and (statistics or (isinstance(m, _DropoutNd) and m.p > 0)):
            raise ValueError(
                f"curvature: the model is in training mode, with a {type(m).__name__}, "
                f"{name}.\nEvery pass would be of another loss, and would change the model.\n"
                "Call model.eval() first."
            )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that count, by name; a tied parameter once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def split(v: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector of length `p` as tensors of the shapes of the parameters."""
    parts = v.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def join(parts: Mapping[str, Tensor]) -> Tensor:
    """Tensors as one vector of length `p`."""
    return torch.cat([t.reshape(-1) for t in parts.values()])
