"""The optimiser of a run: text such as `adamw`, `soap(frequency=5)` or `muon(scale=spectral)`.

The names are `adamw` and `sgd`, torch's own, and those of `matrigami.optim.OPTIMIZERS`; options are
those of the class. The learning rate and the weight decay are settings of the run.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matrigami import optim
from matrigami._words import columns, nearest
from matrigami.nn import adam_rule, param_groups, sgd_rule, unread
from matrigami.optim import KFAC, OPTIMIZERS, MatrixOptimizer, Muon, Plan
from matrigami.structures._parsing import parse_options
from matrigami.studies._config import RunConfig
from matrigami.studies.models import Network

Make = Callable[..., torch.optim.Optimizer]

TORCH: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
"""Torch's own optimisers, with the defaults of a study."""

RULES = {"adamw": adam_rule, "sgd": sgd_rule}
"""How their learning rates follow the sizes of a factor."""

NAMES = (*TORCH, *sorted(OPTIMIZERS))
"""All optimisers of a run."""

ELSEWHERE = frozenset({"self", "params", "source", "loss", "lr", "weight_decay"})
"""Arguments that are settings of the run."""


def parse_optimizer(text: str) -> partial[torch.optim.Optimizer]:
    """The constructor that a text names, with its options filled in.

    Raises:
        ValueError: If the text is no call with literals, the name or an option is unknown, or a
            value is out of range.

    Examples:
        >>> parse_optimizer("soap(frequency=5)").keywords
        {'frequency': 5}
    """
    name, options = _call(text)
    if name not in NAMES:
        raise ValueError(
            f"optimizer {name!r}: known are {', '.join(NAMES)}.\n"
            f"Did you mean {nearest(name, NAMES)!r}?"
        )
    make: Make = TORCH.get(name) or OPTIMIZERS[name]
    known = [key for key in inspect.signature(make).parameters if key not in ELSEWHERE]
    for key in options:
        if key not in known:
            raise ValueError(
                f"optimizer {text!r}: {name} has no option {key!r} here; it has "
                f"{', '.join(known)}.\nDid you mean {nearest(key, known)!r}? The learning rate is "
                "the key lr."
            )
    made = partial(make, **options)
    try:
        _try(made)
    except (TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"optimizer {text!r}: a value is of the wrong type: "
            f"{str(error).splitlines()[0]}.\n"
            f"See the documentation of {name}."
        ) from error
    return made


def _try(made: partial[torch.optim.Optimizer]) -> None:
    """A step of one small matrix, so that a wrong option is found before training."""
    W = nn.Parameter(torch.zeros(2, 2))
    optimizer = made([W], lr=1e-3)
    W.grad = torch.eye(2)
    optimizer.step()


def canonical_optimizer(text: str) -> str:
    """One spelling of an optimiser.

    Examples:
        >>> canonical_optimizer(" soap( frequency = 5 )"), canonical_optimizer("adamw()")
        ('soap(frequency=5)', 'adamw')
    """
    parse_optimizer(text)
    return ast.unparse(ast.parse(text.strip(), mode="eval")).removesuffix("()")


def build_optimizer(
    model: Network,
    config: RunConfig,
    loss: nn.Module | None = None,
    together: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of a run, with a learning rate and a weight decay for each factor.

    K-FAC watches the model if it is given the loss; `together` is the model wrapped for several
    processes, over which it averages what it sees.
    """
    make, matrices = parse_optimizer(config.optimizer), matrix_method(config.optimizer)
    begins = tuple(f"{name}." for name in model.reads)
    reading = [n for n, _ in model.named_parameters() if n.startswith(begins)]
    unknown = unread(model)
    scaling: dict[str, Any] = {
        "base_width": None if model.width is None else config.base_width,
        "fixed": model.reads,
        "fixed_outputs": model.answers,
        "scales": dict.fromkeys(reading, config.input_lr_scale),
        "weight_decay": config.weight_decay,
        "elementwise": unknown,
    }
    if matrices is None:
        rule = RULES[_call(config.optimizer)[0]]
        groups = param_groups(model, config.lr, rule=rule, **scaling)
    else:
        plan = optim.plan(model, matrices, elementwise=unknown)
        for name, scale in _adam_scales(plan, matrices, config).items():
            scaling["scales"][name] = scale * scaling["scales"].get(name, 1.0)
        groups = plan.groups(param_groups(model, config.lr, rules=plan.rules, **scaling))
    optimizer = make(groups, lr=config.lr)
    if loss is not None and isinstance(optimizer, KFAC):
        optimizer.attach(together or model, loss)
    if loss is not None and isinstance(optimizer, Muon) and optimizer.defaults["inputs"]:
        optimizer.attach(together or model)
    return optimizer


def _adam_scales(plan: Plan, make: partial[MatrixOptimizer], config: RunConfig) -> dict[str, float]:
    """For an optimiser with a rate `adam_lr` of its own for what it leaves to Adam."""
    parameters = inspect.signature(make).parameters
    if "adam_lr" not in parameters:
        return {}
    scale = parameters["adam_lr"].default / config.lr
    return {row.name: scale for row in plan.rows if row.view is None}


def matrix_method(text: str) -> partial[MatrixOptimizer] | None:
    """The constructor of an optimiser of this package, with its options; None for torch's own."""
    name, options = _call(text)
    return partial(OPTIMIZERS[name], **options) if name in OPTIMIZERS else None


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Name of each parameter, in the order in which the optimiser's `state_dict` counts them."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def plan_table(model: Network, config: RunConfig) -> str:
    """What each parameter of a run takes: method, blocks and state, or only its rate.

    Examples:
        >>> from matrigami.studies.models import build_model
        >>> from matrigami.studies.tasks import Shape
        >>> config = RunConfig(
        ...     "digits", "mlp", "dense", 16, seed=0, lr=0.01, epochs=1, batch_size=64, depth=1
        ... )
        >>> print(plan_table(build_model(config, Shape(1, 8, 10)), config).splitlines()[1])
        embed.weight            16x64  0.001
    """
    rates = _rates(model, build_optimizer(model, config))
    matrices = matrix_method(config.optimizer)
    if matrices is not None:
        return _with_rates(str(optim.plan(model, matrices, elementwise=unread(model))), rates)
    rows = [
        [name, "x".join(map(str, p.shape)), f"{rates[name]:.3g}"]
        for name, p in model.named_parameters()
    ]
    return "\n".join(
        columns([["parameter", "shape", "learning rate"], *rows], [False, True, False])
    )


def _rates(model: Network, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each parameter."""
    rates = [(g["lr"], p) for g in optimizer.param_groups for p in g["params"]]
    by_parameter = {p: rate for rate, p in rates}
    return {name: by_parameter[p] for name, p in model.named_parameters()}


def _with_rates(plan: str, rates: Mapping[str, float]) -> str:
    """A plan with one more column."""
    head, *lines = plan.splitlines()
    known = [rates.get(line.split()[0]) for line in lines]
    cells = ["learning rate", *["" if rate is None else f"{rate:.3g}" for rate in known]]
    rows = zip([head, *lines], cells, strict=True)
    return "\n".join(columns(list(rows), [False, False]))


def _call(text: str) -> tuple[str, Mapping[str, Any]]:
    """Name and options; a bare name as a value is looked up in `matrigami.optim`."""
    refusal = (
        f"optimizer {text[:200]!r}: it is not a name with literal options.\n"
        "Write for example: adamw, soap(frequency=5), muon(scale=spectral)."
    )
    return parse_options(text, refusal, _value)


def _value(node: ast.expr) -> Any:
    """A literal, or a name of `matrigami.optim` such as `spectral`."""
    if isinstance(node, ast.Name) and node.id in optim.__all__:
        return getattr(optim, node.id)
    return ast.literal_eval(node)
