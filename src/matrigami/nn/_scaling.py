"""Learning rates that transfer across widths and structures, and the test that they do.

Each factor of a structured weight is a batch of matrices with its own fan-in `f` and fan-out `g`.
Features move alike at every width if an update has a spectral norm of order `sqrt(g / f)`; the rule
of an optimiser follows from the norm that its updates have. Adam's is `sqrt(f g)`, so its step size
is that of the dense layer times `(n / f) / factors`, and shrinks with the width as `base_width /
width` (maximal update parametrisation). Sources: Yang et al. (2022), arXiv:2203.03466, and (2023),
arXiv:2310.17813; per factor, Qiu et al. (2024), arXiv:2406.06248.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matrigami.nn._linear import StructuredLinear
from matrigami.operators import Fan

LAYERS = (StructuredLinear, nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weight is scaled."""

Rule = Callable[[Fan, float, float, int], float]
"""Multiplier of a factor: its fan, the inputs and outputs that the layer has at the base width, the
number of factors."""

Norm = Callable[[float, float], float]
"""Spectral norm of an update, up to a constant, by rows and columns."""


def spectral_rule(norm: Norm) -> Rule:
    """The rule of an optimiser whose updates have a spectral norm of `norm(f_out, f_in)`.

    `h(f_out, f_in) / h(m, n) / factors` with `h(m, n) = sqrt(m / n) / norm(m, n)`.

    Args:
        norm: Up to a constant.

    Examples:
        >>> adam = spectral_rule(lambda m, n: (m * n) ** 0.5)
        >>> adam(Fan(8, 32), 64, 128, 2), adam_rule(Fan(8, 32), 64, 128, 2)
        (4.0, 4.0)
    """

    def rule(fan: Fan, inputs: float, outputs: float, factors: int) -> float:
        steps = [(m / n) ** 0.5 / norm(m, n) for m, n in (fan[1::-1], (outputs, inputs))]
        return steps[0] / steps[1] / factors

    return rule


def adam_rule(fan: Fan, inputs: float, outputs: float, factors: int) -> float:  # noqa: ARG001 - one signature for all rules
    """`(n / f_in) / factors`: for optimisers whose step ignores the gradient's scale."""
    return inputs / fan.inputs / factors


def sgd_rule(fan: Fan, inputs: float, outputs: float, factors: int) -> float:
    """`(f_out / f_in) / (m / n) / factors`: for plain gradient steps."""
    return (fan.outputs / fan.inputs) / (outputs / inputs) / factors


class _Entry(NamedTuple):
    """A parameter, what its rate is multiplied by, and whether it is (a factor of) a weight."""

    parameter: Tensor
    scale: float
    is_weight: bool


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    base_width: int | None = None,
    width: int | None = None,
    fixed: Collection[str] = (),
    fixed_outputs: Collection[str] = (),
    rule: Rule = adam_rule,
    rules: Mapping[str, Rule] | None = None,
    scales: Mapping[str, float] | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Torch parameter groups with a learning rate for each factor.

    A factor takes `lr * rule(factor)`; biases, norms, gains and other parameters keep `lr`.

    Args:
        model: Any module; `StructuredLinear`, `nn.Linear` and convolutions are scaled.
        lr: The learning rate tuned for the dense model at `base_width`.
        base_width: The width at which `lr` was tuned. None: scale by factor only.
        width: The width of this model; by default `model.width`.
        fixed: Names of layers whose inputs do not grow with the width (those that read the data).
        fixed_outputs: Names of layers whose outputs do not (the head).
        rule: `adam_rule`, `sgd_rule` or a `spectral_rule`.
        rules: Other rules for some parameters, by name.
        scales: Further factors on the rates of some parameters, by name.
        weight_decay: That of the dense model at `base_width`. A step then takes
            `lr * weight_decay * base_width / width` of each weight, whatever its own rate, and
            nothing of other parameters (Qiu et al. 2025, arXiv:2512.05620).

    Returns:
        Groups `{"params", "lr", "lr_scale"}` (and `weight_decay`), by ascending rate.

    Raises:
        ValueError: If the width is unknown though `base_width` is given, or a name is unknown.

    Examples:
        >>> from matrigami import Monarch
        >>> layer = StructuredLinear(64, 64, Monarch(blocks=8))
        >>> [(g["lr_scale"], len(g["params"])) for g in param_groups(layer, lr=1e-3)]
        [(1.0, 1), (4.0, 2)]
    """
    shrink = _shrink(model, base_width, width)
    _check_names(model, {*fixed, *fixed_outputs}, {*(rules or ()), *(scales or ())})
    found: dict[Tensor, _Entry] = {}
    for name, module in model.named_modules():
        base = (1.0 if name in fixed else shrink, 1.0 if name in fixed_outputs else shrink)
        for entry in _entries(name, module, base, rule, rules or {}, scales or {}):
            found.setdefault(entry.parameter, entry)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for p, (_, scale, is_weight) in found.items():
        share = (weight_decay or 0.0) * shrink if is_weight else 0.0
        if p.requires_grad:
            groups.setdefault((scale, share / scale), []).append(p)
    return [
        {"params": groups[scale, decay], "lr": lr * scale, "lr_scale": scale}
        | ({} if weight_decay is None else {"weight_decay": decay})
        for scale, decay in sorted(groups)
    ]


def _check_names(model: nn.Module, layers: set[str], parameters: set[str]) -> None:
    """Refuse names that the model does not have."""
    known = {name for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    all_parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for what, unknown in (
        ("layers", layers - known),
        ("parameters", parameters - all_parameters),
    ):
        if unknown:
            raise ValueError(
                f"param_groups names {sorted(unknown)}.\nThe model has no such {what}.\n"
                "fixed takes names of linear layers and convolutions in model.named_modules(), "
                "rules and scales those of model.named_parameters()."
            )


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


def _entries(
    prefix: str,
    module: nn.Module,
    base: tuple[float, float],
    rule: Rule,
    rules: Mapping[str, Rule],
    scales: Mapping[str, float],
) -> Iterator[_Entry]:
    """Own parameters of a module; `base` is what its inputs and outputs shrink by."""
    fans: dict[str, Fan] = {}
    n, m = 0, 0
    if isinstance(module, StructuredLinear):
        n, m = module.in_features, module.out_features
        fans = dict(zip(module.factor_names, module.fans, strict=True))
    elif isinstance(module, LAYERS):
        weight = module.get_parameter("weight")
        m, n = len(weight), weight[0].numel()
        fans = {"weight": Fan(n, m)}
    for name, p in module.named_parameters(recurse=False):
        path = f"{prefix}.{name}" if prefix else name
        scale = scales.get(path, 1.0)
        if name in fans:
            chosen = rules.get(path, rule)
            scale *= chosen(fans[name], n * base[0], m * base[1], len(fans))
        yield _Entry(p, scale, name in fans)


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
