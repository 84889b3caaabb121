"""The gallery: one page for each topic, made by the code that it shows.

The list of topics loads at once; what runs them, and torch with it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from matrigami.demo.topics import TOPICS

if TYPE_CHECKING:
    from matrigami.demo._book import as_json, load_topic, show, write_book, write_topic
    from matrigami.demo._draw import Panel
    from matrigami.demo._page import Shown
    from matrigami.demo._program import program
    from matrigami.demo._topic import Number, Slider, Topic


HOMES = {
    "_book": ("as_json", "load_topic", "show", "write_book", "write_topic"),
    "_draw": ("Panel",),
    "_page": ("Shown",),
    "_program": ("program",),
    "_topic": ("Number", "Slider", "Topic"),
}
"""Where each name is."""


def __getattr__(name: str) -> Any:
    """Load what runs the topics when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'matrigami.demo' has no attribute {name!r}")
    home = next(home for home, names in HOMES.items() if name in names)
    return getattr(import_module(f"matrigami.demo.{home}"), name)


__all__ = [
    "TOPICS",
    "Number",
    "Panel",
    "Shown",
    "Slider",
    "Topic",
    "as_json",
    "load_topic",
    "program",
    "show",
    "write_book",
    "write_topic",
]
