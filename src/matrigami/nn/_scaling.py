"""Learning rates that transfer across widths and structures, and the test that they do.

Each factor of a structured weight is a batch of matrices with its own fan-in `f`, so its Adam step
size is that of the dense layer times `(n / f) / factors`, and shrinks with the width as the dense
one does, by `base_width / width` (maximal update parametrisation). Sources: Yang et al. (2022),
arXiv:2203.03466; per factor, Qiu et al. (2024), arXiv:2406.06248.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.nn._linear import StructuredLinear
from matrigami.operators import Fan

LAYERS = (StructuredLinear, nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weight is scaled."""

Rule = Callable[[Fan, int, int, int], float]
"""Multiplier of a factor: its fan, the layer's inputs and outputs, the number of factors."""


def adam_rule(fan: Fan, inputs: int, outputs: int, factors: int) -> float:  # noqa: ARG001 - one signature for all rules
    """`(n / f_in) / factors`: for optimisers whose step ignores the gradient's scale."""
    return inputs / fan.inputs / factors


def sgd_rule(fan: Fan, inputs: int, outputs: int, factors: int) -> float:
    """`(f_out / f_in) / (m / n) / factors`: for plain gradient steps."""
    return (fan.outputs / fan.inputs) / (outputs / inputs) / factors


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    base_width: int | None = None,
    width: int | None = None,
    fixed: Collection[str] = (),
    rule: Rule = adam_rule,
) -> list[dict[str, Any]]:
    """Torch parameter groups with a learning rate for each factor.

    `lr_factor = lr * rule(factor) * base_width / width`; biases, norms, gains and other parameters
    keep `lr`.

    Args:
        model: Any module; `StructuredLinear`, `nn.Linear` and convolutions are scaled.
        lr: The learning rate tuned for the dense model at `base_width`.
        base_width: The width at which `lr` was tuned. None: do not scale with the width, only by
            factor.
        width: The width of this model; `model.width` if it has one.
        fixed: Names of layers whose inputs do not grow with the width (those that read the data).
        rule: `adam_rule` or `sgd_rule`.

    Returns:
        Groups `{"params", "lr", "lr_scale"}`, one for each multiplier, in ascending order of it.

    Raises:
        ValueError: If `base_width` is given and the width is unknown, or a name in `fixed` is no
            layer.

    Examples:
        >>> from matrigami import Monarch
        >>> layer = StructuredLinear(64, 64, Monarch(blocks=8))
        >>> [(g["lr_scale"], len(g["params"])) for g in param_groups(layer, lr=1e-3)]
        [(1.0, 1), (4.0, 2)]
    """
    shrink = _shrink(model, base_width, width)
    unknown = set(fixed) - {
        name for name, layer in model.named_modules() if isinstance(layer, LAYERS)
    }
    if unknown:
        raise ValueError(
            f"param_groups(fixed=...) names {sorted(unknown)}.\n"
            "The model has no such layers.\n"
            "Names are those of linear layers and convolutions in model.named_modules()."
        )
    groups: dict[float, list[Tensor]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for p, multiplier, weight in _multipliers(module, rule):
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            groups.setdefault(
                multiplier * (shrink if weight and name not in fixed else 1.0), []
            ).append(p)
    return [
        {"params": groups[scale], "lr": lr * scale, "lr_scale": scale} for scale in sorted(groups)
    ]


def _shrink(model: nn.Module, base_width: int | None, width: int | None) -> float:
    """`base_width / width`."""
    if base_width is None:
        return 1.0
    width = getattr(model, "width", None) if width is None else width
    if not isinstance(width, int):
        raise ValueError(
            f"param_groups(base_width={base_width}) was asked for a {type(model).__name__}.\n"
            "Its width is not known.\nPass width=, or give the model an attribute `width`."
        )
    return base_width / width


def _multipliers(module: nn.Module, rule: Rule) -> Iterator[tuple[nn.Parameter, float, bool]]:
    """Own parameters of a module: multiplier, and whether the fan-in grows with the width."""
    fans: dict[str, float] = {}
    if isinstance(module, StructuredLinear):
        names, n, m = module.factor_names, module.in_features, module.out_features
        fans = {
            name: rule(fan, n, m, len(names)) for name, fan in zip(names, module.fans, strict=True)
        }
    elif isinstance(module, LAYERS):
        fans = {"weight": 1.0}
    for name, p in module.named_parameters(recurse=False):
        yield p, fans.get(name, 1.0), name in fans


def coordinate_check(
    model_fn: Callable[[int], nn.Module],
    widths: Sequence[int],
    groups: Callable[[nn.Module], list[dict[str, Any]]],
    inputs: Tensor,
    targets: Tensor,
    *,
    features: str,
    steps: int = 3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> dict[int, float]:
    """Size of the change of a hidden feature in the first steps of training, for each width.

    With learning rates that transfer, the root mean square of the change does not depend on the
    width.

    Args:
        model_fn: Builds the model of one width.
        widths: The widths.
        groups: Parameter groups of a model, e.g. `lambda model: param_groups(model, 1e-3,
            base_width=64)`.
        inputs: One batch, used for every step.
        targets: Its targets.
        features: Name of the module whose output is watched.
        steps: Optimiser steps.
        optimizer: Called with the groups.
        loss: Called with outputs and targets.

    Returns:
        Root mean square change of the feature entries, by width. `coordinate_slope` fits its
        log-log slope.
    """
    return {
        width: _feature_change(
            model, groups(model), inputs, targets, features, steps, optimizer, loss
        )
        for width, model in ((w, model_fn(w)) for w in widths)
    }


def coordinate_slope(changes: dict[int, float]) -> float:
    """Slope of `log(change)` against `log(width)`: near 0 where learning rates transfer.

    Examples:
        >>> round(coordinate_slope({64: 0.1, 256: 0.05}), 3)
        -0.5
    """
    x = torch.tensor([float(w) for w in changes], dtype=torch.float64).log()
    y = torch.tensor(list(changes.values()), dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def _feature_change(
    model: nn.Module,
    groups: list[dict[str, Any]],
    inputs: Tensor,
    targets: Tensor,
    features: str,
    steps: int,
    optimizer: Callable[..., torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Train a few steps and compare the watched output before and after."""
    seen: list[Tensor] = []
    hook = model.get_submodule(features).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach())
    )
    opt = optimizer(groups)
    for _ in range(steps):
        opt.zero_grad()
        loss(model(inputs), targets).backward()
        opt.step()
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return float((seen[-1] - seen[0]).square().mean().sqrt())
