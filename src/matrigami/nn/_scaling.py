"""Learning rates that transfer across widths and structures, and the test that they do.

Each factor of a structured weight is a batch of matrices with its own fan-in `f` and fan-out `g`.
Features move alike at every width if an update has a spectral norm of order `sqrt(g / f)`; the rule
of an optimiser follows from the norm that its updates have. Adam's is `sqrt(f g)`, so its step size
is that of the dense layer times `(n / f) / factors`, and shrinks with the width as `base_width /
width` (maximal update parametrisation). Sources: Yang et al. (2022), arXiv:2203.03466, and (2023),
arXiv:2310.17813; per factor, Qiu et al. (2024), arXiv:2406.06248.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.nn._anatomy import Entry, Part, Whole, anatomy, parts
from matrigami.operators import Fan

Rule = Callable[[Fan, float, float, int], float]
"""`rule(fan, n, m, factors)`: the multiplier of a factor's rate, in a layer of `n` inputs and `m`
outputs at the base width."""

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
    elementwise: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Torch parameter groups with a learning rate for each factor.

    A factor takes `lr * rule(factor)`; biases, norms, gains and embeddings keep `lr` (see `parts`).

    Args:
        model: Any module whose matrices belong to layers that are known.
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
        elementwise: Names of parameters that keep `lr` whatever they are.

    Returns:
        Groups `{"params", "lr", "lr_scale"}` (and `weight_decay`), by ascending rate.

    Raises:
        ValueError: If the width, a name, or the module of a matrix is unknown.

    Examples:
        >>> from matrigami import Monarch
        >>> from matrigami.nn import StructuredLinear
        >>> layer = StructuredLinear(64, 64, Monarch(blocks=8))
        >>> [(g["lr_scale"], len(g["params"])) for g in param_groups(layer, lr=1e-3)]
        [(1.0, 1), (4.0, 2)]
    """
    shrink = _shrink(model, base_width, width)
    rules, scales, decay = rules or {}, scales or {}, (weight_decay or 0.0) * shrink
    _check_names(model, {*fixed, *fixed_outputs}, {*rules, *scales, *elementwise})
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for entry in _first_places(anatomy(model, "param_groups", elementwise=elementwise)):
        base = tuple(1.0 if entry.layer in names else shrink for names in (fixed, fixed_outputs))
        scale = _scale(entry.part, base, rules.get(entry.name, rule)) * scales.get(entry.name, 1.0)
        share = decay if entry.part.fan else 0.0
        groups.setdefault((scale, share / scale), []).append(entry.parameter)
    return [
        {"params": groups[scale, decay], "lr": lr * scale, "lr_scale": scale}
        | ({} if weight_decay is None else {"weight_decay": decay})
        for scale, decay in sorted(groups)
    ]


def _first_places(entries: list[Entry]) -> list[Entry]:
    """Each trainable parameter where it comes first."""
    found: dict[Tensor, Entry] = {}
    for entry in entries:
        found.setdefault(entry.parameter, entry)
    return [entry for p, entry in found.items() if p.requires_grad]


def _check_names(model: nn.Module, layers: set[str], parameters: set[str]) -> None:
    """Refuse names that the model does not have."""
    known = {
        name
        for name, layer in model.named_modules()
        if any(part.fan for part in parts(layer).values())
    }
    all_parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for what, unknown in (
        ("layers", layers - known),
        ("parameters", parameters - all_parameters),
    ):
        if unknown:
            raise ValueError(
                f"param_groups names {sorted(unknown)}.\nThe model has no such {what}.\n"
                "fixed takes names of layers with matrices in model.named_modules(), "
                "rules, scales and elementwise those of model.named_parameters()."
            )


def _shrink(model: nn.Module, base_width: int | None, width: int | None) -> float:
    """`base_width / width`."""
    if base_width is None:
        return 1.0
    width = getattr(model, "width", None) if width is None else width
    if not isinstance(width, int):
        raise ValueError(
            f"param_groups({type(model).__name__}, base_width={base_width}): "
            "the width of the model is not known.\n"
            "Pass width=, or give the model an attribute `width`."
        )
    return base_width / width


def _scale(part: Part, base: tuple[float, ...], rule: Rule) -> float:
    """The multiplier of a rate; `base` is what inputs and outputs of the layer shrink by."""
    fan = part.fan
    if fan is None:
        return 1.0
    whole = part.whole or Whole(fan.inputs, fan.outputs)
    n, m = (
        size * shrink**power
        for size, shrink, power in zip(whole[:2], base, whole.growth, strict=True)
    )
    return rule(fan, n, m, whole.factors)


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
