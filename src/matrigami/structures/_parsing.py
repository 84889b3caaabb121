"""Recipes as text, for the command line and study files: `btt(rank=2)`, `monarch(blocks=4)`."""

import ast
from collections.abc import Callable
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin

from matrigami._words import nearest
from matrigami.operators import EXAMPLES, Structure

__all__ = ["parse"]

LONGEST = 2000
"""Characters of a text; longer ones are no names with arguments."""


VARIADIC = {"einsum": "theta", "mlr": "ranks"}
"""The field that takes all positional arguments of a recipe as one tuple."""


def parse(text: str) -> Structure:
    """The recipe that a text such as `lowrank(rank=0.25)` or `einsum(0.5,0,0.5,0,0.5,0.5,0)` names.

    Args:
        text: A name of `EXAMPLES`, or a call of one with literal arguments.

    Raises:
        ValueError: If the text is not such a call, the name is unknown (the nearest is suggested),
            or the recipe refuses the arguments.

    Examples:
        >>> parse("btt(rank=2)"), parse("lowrank(rank=0.25)")
        (BlockTensorTrain(rank=2, cores=2, interleaved=False), LowRank(rank=0.25))
    """
    recipes = {name: type(recipe) for name, recipe in EXAMPLES.items()}
    refusal = (
        f"structure {text[:200]!r}: it is not a name with literal arguments.\n"
        "Write for example: btt(rank=2), monarch(blocks=16), lowrank(rank=0.25)."
    )
    name, args, options = parse_call(text, refusal)
    if name not in recipes:
        near = nearest(name, recipes)
        raise ValueError(
            f"structure {name!r}: there is no such structure.\n"
            f"Known structures: {', '.join(sorted(recipes))}.\n"
            f"Did you mean {near!r}?"
        )
    if name in VARIADIC and args:
        args, options = [], {VARIADIC[name]: tuple(args)} | options
    try:
        recipe = recipes[name](*args, **options)
        _check_types(recipe)
    except TypeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"structure {text!r}: {recipes[name].__name__} does not take these arguments: "
            f"{reason}.\n"
            f"It is defined as: {_signature(recipes[name])}."
        ) from error
    return recipe


def _check_types(recipe: Structure) -> None:
    """Compare the fields of a recipe with their annotations: text may hold anything.

    Raises:
        TypeError: If one does not fit.
    """
    for field in fields(recipe):  # pyright: ignore[reportArgumentType] - recipes are dataclasses
        value = getattr(recipe, field.name)
        if not _fits(value, field.type):
            raise TypeError(f"{field.name}={value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a literal is of a type; an int will do for a float, a bool for neither."""
    parts = get_args(annotation)
    if get_origin(annotation) in {Union, UnionType}:
        return any(_fits(value, part) for part in parts)
    if parts:
        return isinstance(value, list | tuple) and all(_fits(v, parts[0]) for v in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def parse_call(
    text: str,
    refusal: str,
    value: Callable[[ast.expr], Any] = ast.literal_eval,
) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional and named arguments of a call such as `soap(frequency=5)`; a bare name too.

    Args:
        text: The call; nothing in it is evaluated.
        refusal: What to say of a text that is none.
        value: What an argument means; literals by default.

    Raises:
        ValueError: If the text is no such call, or gives an argument twice.
    """
    try:
        node = ast.parse(text.strip()[: LONGEST + 1], mode="eval").body
        if len(text.strip()) <= LONGEST and isinstance(node, ast.Name):
            return node.id, [], {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            options = {str(k.arg): value(k.value) for k in node.keywords}
            if len(options) == len(node.keywords):
                return node.func.id, [value(a) for a in node.args], options
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ValueError(refusal)


def word_or_literal(node: ast.expr) -> Any:
    """A literal, or a bare word as text."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def parse_options(
    text: str, refusal: str, value: Callable[[ast.expr], Any] = word_or_literal
) -> tuple[str, dict[str, Any]]:
    """Name and options of a call whose arguments are all named; see `parse_call`."""
    name, args, options = parse_call(text, refusal, value)
    if args:
        raise ValueError(refusal)
    return name, options


def _signature(recipe: type[Structure]) -> str:
    """The recipe's fields, with defaults."""
    import inspect  # noqa: PLC0415 - only for this message

    return f"{recipe.__name__}{inspect.signature(recipe)}"
