"""Positions that do not count: padding, prompts, whatever the targets of a loss leave out.

No gradient comes back to what nothing depends on that counts. Such rows add nothing to the second
moment of the gradients, and should not be in the mean over inputs either.

Shapes: b = blocks, N = examples, K = columns, S = shared positions.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from matrigami.curvature._likelihood import Terms
from matrigami.curvature._uses import OneHot, Use


def is_masked(found: Terms) -> bool:
    """Whether a loss leaves out some of its terms."""
    return found.weights is not None and not bool(found.weights.all())


def noise(outputs: Tensor, found: Terms) -> Tensor:
    """One column `(1, N, ...)` that is zero where nothing counts, and not elsewhere."""
    generator = torch.Generator(outputs.device).manual_seed(2)
    drawn = torch.randn(outputs.shape, generator=generator, device=outputs.device)
    return (drawn if found.weights is None else drawn * (found.weights != 0))[None].to(
        outputs.dtype
    )


def counted(use: Use) -> Tensor | None:
    """The rows of a use that have a gradient."""
    if use.gradients is None:
        return None
    active = use.gradients.ne(0).any(-1).any(2).any(0)  # N S
    return active[:, 0] if isinstance(use.inputs, OneHot) else active


def of_mask(mask: Bool[Tensor, "..."], use: Use) -> Tensor | None:
    """A mask of positions as rows of a use, if it has such positions; None: all count."""
    if isinstance(use.inputs, OneHot) or use.inputs.shape[1:3].numel() != mask.numel():
        return None
    return mask.reshape(use.inputs.shape[1:3]).to(use.inputs.device)


def only(use: Use, rows: Tensor | None) -> Use:
    """A use without the inputs that do not count."""
    if rows is None or bool(rows.all()):
        return use
    inputs, number = use.inputs, int(rows.sum())
    if not isinstance(inputs, OneHot):
        return use._replace(inputs=inputs * rows[:, :, None], rows=number)
    kept = OneHot(inputs.indices[rows], inputs.size, inputs.examples[rows], inputs.number)
    gradients = None if use.gradients is None else use.gradients[:, rows]
    return use._replace(inputs=kept, gradients=gradients)


def reduced(use: Use) -> Use:
    """One position: the mean of the inputs that count, the sum of the gradients."""
    if isinstance(use.inputs, OneHot) or use.gradients is None:
        return use
    gradients = use.gradients.sum(3, keepdim=True)
    if use.rows is None:
        return use._replace(inputs=use.inputs.mean(2, keepdim=True), gradients=gradients)
    there = use.inputs.ne(0).any(-1).any(0)  # N S
    number = there.sum(1).clamp_min(1)[:, None, None]
    inputs = use.inputs.sum(2, keepdim=True) / number
    return use._replace(inputs=inputs, gradients=gradients, rows=int(there.any(1).sum()))
