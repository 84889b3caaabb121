"""Second moments of the gradients of layer outputs, with labels that the model draws itself.

One forward pass for each batch, and one backward pass for each draw of labels; no gradient of a
weight is computed.

Shapes: m = outputs, N = vectors.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.compress._generation import examples
from matrigami.compress._layers import gradient_rows, with_structured
from matrigami.compress._running import (
    at_rest,
    called,
    expect,
    frozen,
    hooked,
    input_of,
    logits,
)
from matrigami.nn import Patterns
from matrigami.operators import gram

Gradients = Mapping[str, Tensor]
"""Second moments of the output gradients of layers, by name."""


def gradient_moments(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    samples: int = 4,
    bound: tuple[float, float] | None = (0.5, 2.0),
    seed: int = 0,
) -> dict[str, Tensor]:
    """What `two_sided=True` computes of a model, to be given as `two_sided=` as often as wanted.

    Args:
        model: Its outputs are logits, or have them as `.logits`.
        calibration: Batches: tensors, tuples of arguments, or mappings of keywords; for a language
            model "self": what `self_calibration` has it write.
        targets: Patterns of layer names such as `*.mlp.*`.
        ignore: Patterns of layers to leave out.
        samples: Draws of labels for each batch; of many tokens one is enough.
        bound: Gradients are scaled to norms within these multiples of the mean norm of their batch,
            so that a few do not outweigh all others; None leaves them.
        seed: Of the draws.

    Returns:
        For each layer that a gradient reaches `E[g g.T]`, `(m, m)`.

    Raises:
        ValueError: If a pattern matches nothing, there are no batches, or logits are not finite.

    Examples:
        >>> from matrigami.compress import Grid, quantize_
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> data = [torch.randn(8, 3)]
        >>> moments = gradient_moments(model, data, samples=1)
        >>> moments["0"].shape
        torch.Size([4, 4])
        >>> report = quantize_(model, data, Grid(4), two_sided=moments)
    """
    layers, data = with_structured(model, targets, ignore), examples(model, calibration)
    return output_moments(model, layers, data, samples=samples, bound=bound, seed=seed)


def gradients_of(
    two_sided: bool | Gradients, model: nn.Module, layers: Mapping[str, nn.Module], data: list[Any]
) -> Gradients:
    """The moments that were given, or asked for; none where neither.

    Raises:
        ValueError: If moments were given of none of the layers.
    """
    if isinstance(two_sided, bool):
        return output_moments(model, layers, data) if two_sided else {}
    expect("two_sided=", two_sided, Mapping, "True, False, or what gradient_moments returns")
    if not layers.keys() & two_sided.keys():
        raise ValueError(
            f"two_sided: moments of {len(two_sided)} layers were given, of none that is "
            f"compressed.\nThese are {', '.join(list(layers)[:3])}, ...\n"
            "Take them by gradient_moments(model, calibration) with the same targets."
        )
    return two_sided


def summed(two_sided: bool | Gradients) -> object:
    """What tells moments from others, in few words."""
    if isinstance(two_sided, bool):
        return two_sided
    return {name: float(B.sum()) for name, B in two_sided.items()}


def output_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: list[Any],
    *,
    samples: int = 4,
    bound: tuple[float, float] | None = (0.5, 2.0),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Second moments of the output gradients, with labels drawn from the model's own logits.

    Args:
        model: Its outputs are logits, or have them as `.logits`.
        layers: Those to observe.
        data: Batches.
        samples: Draws for each batch.
        bound: Gradients are scaled to norms within these multiples of the mean norm of their batch,
            so that a few do not outweigh all others; the trace of the moment is that of the
            gradients themselves. None leaves them.
        seed: Of the draws.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    sums: dict[str, Tensor] = {}
    whole: dict[str, float] = {}
    counts = dict.fromkeys(layers, 0)
    leaves: list[Tensor] = []

    def hook(name: str) -> Any:
        """The forward hook of a layer."""

        def note(g: Tensor, x: Tensor) -> None:
            """Count the gradients of one call."""
            part = gradient_rows(layers[name], x, g.detach())
            part = part[part.isfinite().all(-1)].to(torch.promote_types(part.dtype, torch.float32))
            whole[name] = whole.get(name, 0.0) + float(part.square().sum())
            part = part if bound is None else _bounded(part, *bound)
            sums[name] = sums.get(name, 0) + gram(part[None])[0].double()
            counts[name] += len(part)

        def attach(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            """Ask for the gradient of the output; of what depends on no other one, by a leaf."""
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:
                leaves.append(output.detach().requires_grad_())
                output = leaves[-1].clone()  # what comes behind may write into it
            output.register_hook(partial(note, x=input_of(args, kwargs).detach()))
            return output

        return attach

    hooks = {name: (layer, hook(name)) for name, layer in layers.items()}
    with at_rest(model), hooked(hooks), frozen(model):
        for batch in data:
            leaves.clear()
            _pull_drawn_labels(logits(called(model, batch)), leaves, samples, generator)
    sizes = {name: whole[name] / max(float(total.trace()), 1e-300) for name, total in sums.items()}
    return {name: sizes[name] * total / counts[name] for name, total in sums.items()}


def _bounded(g: Float[Tensor, "N m"], low: float, high: float) -> Float[Tensor, "N m"]:
    """Rows with norms between multiples of their mean norm; rows of zeros stay."""
    norms = g.norm(dim=-1, keepdim=True)
    mean = norms.mean()
    return g * torch.where(norms > 0, norms.clamp(low * mean, high * mean) / norms, 0)


def _pull_drawn_labels(
    found: Tensor, leaves: list[Tensor], samples: int, generator: torch.Generator
) -> None:
    """Backward passes of `-log p(y | x)` to the leaves, with labels `y` drawn from the model.

    Raises:
        ValueError: If all logits are NaN or infinite.
    """
    found = found.float().flatten(0, -2)
    found = found[found.detach().isfinite().all(-1)]
    if not len(found):
        raise ValueError(
            "gradient_moments(model, calibration): all logits of a batch are NaN or infinite.\n"
            "No curvature can be taken from it.\n"
            "Look for NaN in the batches, or for a layer that overflows."
        )
    p = found.detach().softmax(-1)
    if not found.requires_grad:
        return
    for left in range(samples, 0, -1):
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(found, drawn, reduction="sum")
        torch.autograd.grad(loss, leaves, retain_graph=left > 1, allow_unused=True)
