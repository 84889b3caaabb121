"""Open functions: one default, and rules for types and conditions, in the files that know better.

`functools.singledispatch` with three additions: a rule may have a condition (`where=`), it may
name the type of later operands too, and `torch.compile` can trace the choice.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial, update_wrapper
from importlib import import_module
from types import UnionType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

from jaxtyping import AbstractArray

P = ParamSpec("P")
R = TypeVar("R")
Answer = Callable[..., Any]


PLAIN = (Any, bool, int, float, str)
"""Types of options, which do not choose a rule."""

RULES = "matrigami.structures"
"""What loads the rules of all structures: a default alone is half of a function."""


class Rule(NamedTuple):
    """One way to answer: a function, the types of its later operands, and its condition."""

    function: Answer
    operands: tuple[tuple[int, tuple[type, ...]], ...]
    where: Callable[..., bool] | None

    def holds(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether the rule is for these arguments."""
        for position, types in self.operands:
            if position >= len(args) or not isinstance(args[position], types):
                return False
        return self.where is None or self.where(*args, **options)


class OpenFunction(Generic[P, R]):
    """A function whose rules are found by the type of its first argument.

    The most derived type that has a rule wins, and among its rules the first whose operands and
    condition hold, the latest registered in front; the default answers for the rest.

    Args:
        default: The rule for every other type; its name, signature and docstring are the
            function's.
        around: Called as `around(function, *args)` in place of the rules: it checks the arguments,
            and calls `function.answer`.

    Examples:
        >>> @OpenFunction
        ... def sides(shape: object) -> int:
        ...     return 0
        >>> @sides.register(where=lambda shape: len(shape) == 2)
        ... def _(shape: tuple) -> int:
        ...     return 2
        >>> sides((3, 4)), sides((3,)), sides("a line")
        (2, 0, 0)
    """

    def __init__(
        self, default: Callable[P, R], *, around: Callable[..., Any] | None = None
    ) -> None:
        self.default, self.name = default, default.__name__
        names = inspect.signature(default).parameters
        self.names, kinds = frozenset(names), names.values()
        named = [p for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        self.least = max(len(named), 1)
        self.around = around
        self.lift: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], Answer] | None] | None = None
        self.rules: dict[type, list[Rule]] = {}
        update_wrapper(self, default)

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """Answer by the first rule that holds, after the checks."""
        if len(args) < self.least or not self.names.issuperset(options):  # trace(A=A)
            return self._bound(args, options)
        if self.around is None:
            return self.answer(*args, **options)
        return self.around(self, *args, **options)

    def _bound(self, args: tuple[Any, ...], options: dict[str, Any]) -> R:
        """Answer where arguments come by their names."""
        signature = inspect.signature(self.default)
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise TypeError(f"{self.name}({names}): {error}.\nGive these.") from error
        ask = self.answer if self.around is None else partial(self.around, self)
        return ask(*bound.args, **bound.kwargs)

    def answer(self, *args: Any, **options: Any) -> Any:
        """Answer by the first rule that holds, without the checks.

        `lift` may turn the arguments into others, for which the rules are meant, and back.
        """
        lifted = None if self.lift is None else self.lift(args)
        if lifted is not None:
            return lifted[1](self.answer(*lifted[0], **options))
        for kind in type(args[0]).__mro__:
            for rule in self.rules.get(kind, ()):
                if rule.holds(args, options):
                    return rule.function(*args, **options)
        if RULES not in sys.modules:  # the caller has imported the operators alone
            import_module(RULES)
            return self.answer(*args, **options)
        return self.default(*args, **options)

    def knows(self, *args: Any, **options: Any) -> bool:
        """Whether a structure answers these arguments itself, and no rule for every value."""
        own = [kind for kind in type(args[0]).__mro__ if not inspect.isabstract(kind)]
        return any(rule.holds(args, options) for kind in own for rule in self.rules.get(kind, ()))

    def register(
        self, kind: Any = None, *, where: Callable[..., bool] | None = None
    ) -> Callable[..., Any]:
        """Decorate a rule: `@f.register`, `@f.register(where=condition)`, `@f.register(Type)`.

        The type is the annotation of the rule's first parameter; later parameters annotated with a
        class narrow the rule to operands of that class. `where` is called with the arguments.
        """
        if kind is None:
            return partial(self.register, where=where)
        if isinstance(kind, type | UnionType):
            return lambda function: self._add(function, _classes(kind), where)
        return self._add(kind, None, where)

    def _add(
        self, function: Answer, kinds: tuple[type, ...] | None, where: Callable[..., bool] | None
    ) -> Answer:
        """Put a rule in front of the others of its types."""
        annotations = [
            _classes(parameter.annotation)
            for parameter in inspect.signature(function).parameters.values()
        ]
        operands = tuple(
            (position, types) for position, types in enumerate(annotations) if position and types
        )
        for kind in kinds or annotations[0]:
            self.rules.setdefault(kind, []).insert(0, Rule(function, operands, where))
        return function


def _classes(annotation: Any) -> tuple[type, ...]:
    """The classes that an annotation names; none for options and for tensors of some shape."""
    if get_origin(annotation) in {Union, UnionType}:
        parts = [_classes(part) for part in get_args(annotation)]
        return sum(parts, ()) if all(parts) else ()
    plain = not isinstance(annotation, type) or annotation in PLAIN
    return () if plain or issubclass(annotation, AbstractArray) else (annotation,)
