"""The models of the studies: a table from a name to what builds it.

A model is a `Network`: a module that knows its multiply-adds and its two ends. A new one is a file
here and a line of `MODELS`; `matrigami.testing.check_model` holds it to the protocol. In a study
file a model is a name with literal options, such as `gpt(positions=learned)`, or a function of your
own, `file.py:function`.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any, get_args

import torch

from matrigami._words import nearest
from matrigami.structures._parsing import parse_options
from matrigami.studies._config import OF_MODEL, RunConfig, refuse_settings
from matrigami.studies._own import is_function
from matrigami.studies.models._base import Makers, Network, makers
from matrigami.studies.models._gpt import GPT
from matrigami.studies.models._mlp import MLP
from matrigami.studies.models._own import OwnModel, counted_macs
from matrigami.studies.models._vit import ViT
from matrigami.studies.tasks import DTYPE, Shape

MODELS: dict[str, Callable[..., Network]] = {"mlp": MLP, "vit": ViT, "gpt": GPT}
"""Called with a `RunConfig`, a `Shape`, the `Makers` of its layers, and its options."""

FIXED = ("config", "shape", "make")
"""Arguments of every model; the others are options."""


def build_model(
    config: RunConfig,
    shape: Shape,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Network:
    """The network of a run.

    Args:
        config: The run.
        shape: Sizes of the task.
        generator: Source of the initial weights; a model of your own takes the seed of the run.
        device: `cpu`, or `meta` for the sizes without the numbers.

    Raises:
        ValueError: If the model is unknown, the structure does not fit its sizes, or a setting
            means nothing for the model.

    Examples:
        >>> config = RunConfig(
        ...     "cifar100", "mlp", "btt(rank=1)", 512, seed=0, lr=3e-3, epochs=1, batch_size=1024
        ... )
        >>> build_model(config, Shape(channels=3, side=32, outputs=100)).macs()
        591872
    """
    if is_function(config.model):
        _refuse_mixture(config)
        if config.score:
            raise _no_score(config)
        return OwnModel(config, shape)
    if config.targets:
        raise ValueError(
            f"Model {config.model!r}, targets = {config.targets!r}: "
            "this model puts the structure in place itself.\n"
            "Use structured_layers, or a model of your own."
        )
    name, options = parse_model(config.model)
    if config.score and name != "gpt":
        raise _no_score(config)
    make = makers(config, generator, device)
    with torch.device(device):
        model = MODELS[name](config, shape, make, **options).to(DTYPE)
    refuse_settings(config, OF_MODEL, model.settings, f"model {name}")
    model.recordable = config.experts == 1  # the numbers of vectors of an expert vary
    return model


def _refuse_mixture(config: RunConfig) -> None:
    """Refuse experts in a model that builds its layers itself."""
    if config.experts > 1:
        raise ValueError(
            f"Model {config.model!r}, experts = {config.experts}: "
            "surgery puts no mixtures into it.\n"
            "Leave experts out, and use nn.StructuredMoE in your function."
        )


def _no_score(config: RunConfig) -> ValueError:
    """What to raise for a score that nothing would read."""
    return ValueError(
        f"Model {config.model!r}, score = {config.score!r}: "
        "only the attention of a GPT takes one.\nLeave score out, or use model gpt."
    )


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a model.

    Raises:
        ValueError: If the text is no call with literals, or the name or an option is unknown.

    Examples:
        >>> parse_model("gpt(positions=learned)")
        ('gpt', {'positions': 'learned'})
    """
    refusal = (
        f"Model {text[:200]!r}: it is not a name with literal options.\n"
        "Write for example: mlp, gpt(positions=learned), my_file.py:function."
    )
    name, options = parse_options(text, refusal)
    if name not in MODELS:
        near = nearest(name, MODELS)
        raise ValueError(
            f"Model {name!r}: known are {', '.join(MODELS)}, or a function "
            f"file.py:function.\nDid you mean {near!r}?"
        )
    known = options_of(name)
    for key, value in options.items():
        if not any(
            type(value) is type(choice) and value == choice for choice in known.get(key, ())
        ):
            raise ValueError(
                f"Model {text!r}: {name} has no option {key!r} of this value.\n"
                f"It takes {_told(known) or 'no options'}; width, depth, heads and patch are keys "
                "of their own."
            )
    return name, options


def _told(options: dict[str, tuple[Any, ...]]) -> str:
    """Options with what each may be.

    Examples:
        >>> _told({"positions": ("rope", "learned"), "qk_norm": (True, False)})
        'positions=rope|learned, qk_norm=True|False'
    """
    return ", ".join(f"{key}={'|'.join(map(str, choices))}" for key, choices in options.items())


def options_of(name: str) -> dict[str, tuple[Any, ...]]:
    """The options of a model and what each may be: names, or yes and no."""
    parameters = inspect.signature(MODELS[name]).parameters
    return {
        key: get_args(p.annotation) or (True, False)
        for key, p in parameters.items()
        if key not in FIXED
    }


def canonical_model(text: str) -> str:
    """One spelling of a model.

    Examples:
        >>> canonical_model(" gpt( positions = learned )"), canonical_model("mlp()")
        ('gpt(positions=learned)', 'mlp')
    """
    if is_function(text):
        return text.strip()
    parse_model(text)
    return ast.unparse(ast.parse(text.strip(), mode="eval")).removesuffix("()")


__all__ = [
    "GPT",
    "MLP",
    "MODELS",
    "Makers",
    "Network",
    "OwnModel",
    "ViT",
    "build_model",
    "canonical_model",
    "counted_macs",
    "parse_model",
]
