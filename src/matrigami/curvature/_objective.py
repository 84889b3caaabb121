"""A training loss as a function of a model's parameters, from which curvature derives.

Shapes: N = examples of a batch, C = classes or outputs, p = parameters in all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase  # the base of all batch and instance norms
from torch.nn.modules.dropout import _DropoutNd

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of outputs and targets, such as `nn.CrossEntropyLoss()`."""

Batch = tuple[Any, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True, eq=False)
class Objective:
    """`sum_b weight_b loss(model(x_b), y_b)`, as a function of the trainable parameters.

    A loss with `reduction="sum"` is summed over the batches, any other is averaged over the
    examples.
    """

    model: nn.Module
    loss: Loss
    batches: tuple[Batch, ...]
    weights: tuple[float, ...]

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """What the model gives with these parameters; its own are not touched."""
        return functional_call(self.model, dict(parameters), (inputs,))


def objective(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch) -> Objective:
    """Check a model, a loss and data, and hold them together.

    Args:
        model: Its parameters with `requires_grad` count.
        loss: Of outputs and targets.
        data: One batch `(inputs, targets)`, or an iterable of batches such as a loader.

    Raises:
        ValueError: If nothing is trainable, there are no data, or a batch holds NaN.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"curvature was asked of a {type(model).__name__} without trainable parameters.\n"
            "A frozen model has none.\nCall model.requires_grad_() on what should count."
        )
    _refuse_noise(model)
    single = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
    every: Iterable[Batch] = (data,) if single else data  # pyright: ignore[reportAssignmentType]
    batches = tuple((inputs, targets) for inputs, targets in every)
    if not batches or any(len(targets) == 0 for _, targets in batches):
        raise ValueError(
            "curvature was asked for no data.\nThe loader is empty, or one of its batches is.\n"
            "Give at least one batch (inputs, targets)."
        )
    for i, parts in enumerate(batches):
        if any(
            t.is_floating_point() and not t.isfinite().all() for t in parts if isinstance(t, Tensor)
        ):
            raise ValueError(
                f"curvature was asked for data whose batch {i} holds NaN or infinite entries.\n"
                "No curvature can be computed from it.\nRemove the batch."
            )
    sizes = [len(targets) for _, targets in batches]
    total = sum(sizes)
    weights = tuple(1.0 if sums(loss) else size / total for size in sizes)
    return Objective(model, loss, batches, weights)


def sums(loss: Any) -> bool:
    """Whether a loss sums over its terms, instead of averaging."""
    return isinstance(loss, nn.Module) and getattr(loss, "reduction", "mean") == "sum"


def _refuse_noise(model: nn.Module) -> None:
    """Batch statistics and dropout make another loss of every pass, and change the model."""
    for name, m in model.named_modules():
        statistics = isinstance(m, _NormBase) and m.track_running_stats
        if m.training and (statistics or (isinstance(m, _DropoutNd) and m.p > 0)):
            raise ValueError(
                f"curvature was asked of a model in training mode with a {type(m).__name__}, "
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
