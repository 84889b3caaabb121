"""What a topic of the gallery is: one function that is both run and shown, and words around it.

`example` is a function whose parameters have defaults and which returns `locals()`. The page shows
its body as a program, with the defaults as first lines; the numbers on the page are names of that
body; the slider calls it again with other values of one parameter. So the code on a page is the
code that made its numbers, and a topic is one file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrigami.demo._draw import Panel

Names = Mapping[str, Any]
"""The local names of one call of an example."""


@dataclass(frozen=True)
class Number:
    """One number of a page.

    Attributes:
        name: The name in the example.
        label: What it is, in words.
        spec: Its format, as in an f-string.
    """

    name: str
    label: str
    spec: str = ".4g"

    def shown(self, found: Names) -> str:
        """The number as text."""
        return format(self.value(found), self.spec)

    def value(self, found: Names) -> float | int | str:
        """The number, a plain one."""
        value = found[self.name]
        return value.item() if hasattr(value, "item") else value


@dataclass(frozen=True)
class Slider:
    """The parameter that a reader moves; every position is computed beforehand.

    Attributes:
        parameter: A parameter of the example.
        values: Its positions; the default of the example is one of them.
        label: What it is, in words.
    """

    parameter: str
    values: Sequence[Any]
    label: str


@dataclass(frozen=True)
class Topic:
    """One page of the gallery.

    Attributes:
        formula: Lines of plain text; `_{...}` and `^{...}` are below and above the line.
        example: The function that is run and shown; it returns `locals()`.
        numbers: What is read from it; the first is the number of the page.
        meaning: What the numbers say, a format string over the names of the example.
        picture: Panels from the names of one call and of all calls of the slider.
        exercise: A question.
        answer: Its answer, folded on the page.
        sources: Where the mathematics comes from.
        slider: What may be moved, if anything.
    """

    formula: str
    example: Callable[..., dict[str, Any]]
    numbers: Sequence[Number]
    meaning: str
    picture: Callable[[Names, Sequence[Names]], Sequence[Panel]]
    exercise: str
    answer: str
    sources: Sequence[str]
    slider: Slider | None = None
