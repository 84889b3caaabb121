"""Which layers of a model are meant: patterns of names, and what is one matrix.

Everything that changes layers in place (surgery, compression) reads this, and it the anatomy.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from matrigami._words import nearest_few
from matrigami.nn._anatomy import Role, parts
from matrigami.operators import BlockView, block_view

KINDS = (Role.MATRIX, Role.CONVOLUTION)
"""Roles of a weight that is a matrix by itself."""

Patterns = str | Iterable[str]
"""One pattern of names, or several."""

NAMED = 5
"""Names that are told of many."""

T = TypeVar("T")


def matrix_view(layer: nn.Module) -> BlockView | None:
    """How the `weight` of a layer is one matrix, outputs by inputs; None if it is not.

    The weights of a convolution are a matrix of taps.

    Examples:
        >>> matrix_view(nn.Conv2d(3, 8, 5)).stack, matrix_view(nn.Embedding(3, 8))
        ((1, 8, 75), None)
    """
    part = parts(layer).get("weight")
    if part is None or part.tap is None or part.fan is None or part.role not in KINDS:
        return None
    if part.blocks is not None:
        return part.blocks if part.blocks.blocks == 1 else None
    shape, (n, m, *_) = tuple(layer.weight.shape), part.fan  # pyright: ignore[reportArgumentType, reportCallIssue]
    return block_view(shape, (1, m, n), (0, 1, 2), (1, 1)) if m * n == math.prod(shape) else None


def _nothing_chosen(model: nn.Module, layers: Collection[str]) -> ValueError:
    """What to raise where no layer is left by default."""
    only = f"only {list(layers)[-1] or 'itself'}" if layers else "none of its layers"
    return ValueError(
        f"a {type(model).__name__} was given: {only} is one matrix that is not ignored.\n"
        "The last stays by default; known are Linear, convolutions of one group, Conv1D.\n"
        "Name layers by targets=, on the command line --targets: '*' for all."
    )


def _no_matrices(
    model: nn.Module, targets: Patterns | None, matched: Iterable[str], left: Collection[str]
) -> ValueError:
    """What to raise where patterns match nothing that is a matrix."""
    named = dict(model.named_modules())
    kinds = sorted({type(named[name]).__name__ for name in matched if name not in left})
    return ValueError(
        f"targets={targets!r}: no layer of one matrix is among what it matches in the "
        f"{type(model).__name__}: {', '.join(kinds[:5]) or 'all is ignored'}.\n"
        "Known are Linear, convolutions of one group, and Conv1D."
    )


def chosen(
    model: nn.Module,
    targets: Patterns | None = None,
    ignore: Patterns = (),
    *,
    beside: Collection[nn.Module] = (),
) -> dict[str, nn.Module]:
    """The layers of a model that are one matrix, by patterns of names, in the order of the model.

    By default all but the last, which gives the answer. Of layers that share a weight the first
    counts.

    Args:
        model: The model.
        targets: Patterns such as `*.mlp.*`, or regular expressions such as `re:.*mlp.*`, which
            match from the start; None for the default.
        ignore: Patterns of names to leave out.
        beside: Other layers that count, too.

    Raises:
        ValueError: If a pattern matches nothing, or there is no layer that is one matrix.
        TypeError: If the model is none.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
        >>> list(chosen(model)), list(chosen(model, "re:[12]"))
        (['0'], ['2'])
    """
    _expect_model(model)
    named = dict(model.named_modules())
    layers = {n: m for n, m in named.items() if m in beside or matrix_view(m) is not None}
    left = matching(ignore, layers, model, "ignore")
    default = targets is None
    matched = list(layers)[:-1] if default else matching(targets, named, model, "targets")
    found = [name for name in layers if name in matched and name not in left]
    if not found:
        raise (
            _nothing_chosen(model, layers)
            if default
            else _no_matrices(model, targets, matched, left)
        )
    seen: dict[int, str] = {}
    for name in found:
        seen.setdefault(id(layers[name]._parameters.get("weight", layers[name])), name)
    return {name: layers[name] for name in seen.values()}


def _expect_model(model: nn.Module) -> None:
    """Raise for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r}: it is a {type(model).__name__}, and no torch.nn.Module.\n"
            "Give the model itself, not its class, its name or a function that makes it."
        )
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError(
            f"a {type(model).__name__} was given whose lazy layers have no sizes yet.\n"
            "Call it on a batch first."
        )


@contextmanager
def about(name: str) -> Iterator[None]:
    """Say of which layer an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def for_each(layers: Mapping[str, nn.Module], fit: Callable[[str, nn.Module], T]) -> dict[str, T]:
    """What a function of name and layer makes of each layer.

    Raises:
        ValueError: If it refuses some: all are named, with what is said of the first.
    """
    found: dict[str, T] = {}
    refused: dict[str, ValueError] = {}
    for name, layer in layers.items():
        try:
            found[name] = fit(name, layer)
        except ValueError as error:
            refused[name] = error
    if refused:
        first, *others = refused
        several = f"{', '.join(others[:NAMED])}{', ...' if len(others) > NAMED else ''}"
        more = f"\nRefused, too, {len(others)}: {several}." if others else ""
        raise ValueError(f"{first}: {refused[first]}{more}") from refused[first]
    return found


def patterns_in(given: object, targets: Patterns | None, call: str, what: str) -> Patterns | None:
    """The patterns of a mapping of them to something; else the targets.

    Raises:
        ValueError: If there are both.
    """
    if not isinstance(given, Mapping):
        return targets
    if targets is not None:
        raise ValueError(
            f"{call}: targets= were given beside a mapping of patterns to {what}.\n"
            "The patterns of the mapping are the targets."
        )
    return list(given)


def matching(
    patterns: Patterns, named: Iterable[str], model: nn.Module, label: str
) -> dict[str, str]:
    """The names that a pattern matches, each with the first pattern that does.

    Raises:
        ValueError: If a pattern matches nothing; it names the nearest names.
    """
    names, every = list(named), {}
    for pattern in _listed(patterns):
        matches = _matcher(pattern, label)
        found = [name for name in names if matches(name)]
        if not found:
            known = [name for name in names if name]
            raise ValueError(
                f"{label}={pattern!r} matches no layer of the {type(model).__name__}.\n"
                f"Nearest: {nearest_few(pattern.removeprefix('re:'), known)}.\n"
                "Patterns are of names in the model, not of classes; '*' is all."
            )
        every |= {name: every.get(name, pattern) for name in found}
    return every


def _listed(patterns: Patterns) -> tuple[str, ...]:
    """The patterns one by one; what is none is left to be refused."""
    single = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    return (patterns,) if single else tuple(patterns)  # pyright: ignore[reportReturnType]


def _matcher(pattern: str, label: str) -> Callable[[str], bool]:
    """Whether a name matches: by wildcards, or by a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"{label}={pattern!r}: a pattern is a text, of names in the model.\n"
            "Write for example *.mlp.*, or re:.*mlp.*; '*' is all."
        )
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(
            f"{label}={pattern!r} is no regular expression: {error}.\n"
            "Write for example re:.*mlp.*, or a pattern of wildcards such as *.mlp.*."
        ) from error
    return lambda name: expression.match(name) is not None
