"""A page of the gallery: one HTML file that needs no network, no server and no other file."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matrigami._pages import page
from matrigami.demo._program import program
from matrigami.demo._topic import Names, Topic
from matrigami.demo.topics import TOPICS


@dataclass(frozen=True)
class Shown:
    """A topic that was run.

    Attributes:
        name: Its name.
        topic: The topic.
        found: The names of its example.
        runs: The same for each position of its slider; at least one.
        seconds: How long it took.
    """

    name: str
    topic: Topic
    found: Names
    runs: Sequence[Names]
    seconds: float

    @property
    def meaning(self) -> str:
        """What the numbers say."""
        return self.topic.meaning.format_map(self.found)


def topic_page(shown: Shown, names: Sequence[str], made: str) -> str:
    """The page of a topic.

    Args:
        shown: The topic and its numbers.
        names: All pages that there are, in order; others are not linked.
        made: A line for the end of the page.
    """
    topic = shown.topic
    heading, line = TOPICS[shown.name]
    return page(
        "topic.html",
        heading=heading,
        line=line,
        **_neighbours(shown.name, names),
        formula=formula(topic.formula),
        panels=_panels(topic, shown.found, shown.runs),
        slider=_slider(shown),
        numbers=[(number.label, number.shown(shown.found)) for number in topic.numbers],
        meaning=prose(shown.meaning),
        code=program(topic),
        exercise=prose(topic.exercise),
        answer=prose(topic.answer),
        sources=topic.sources,
        made=f"{shown.seconds:.1f} s. {made}",
    )


def contents_page(pages: Sequence[Shown], missing: dict[str, str], made: str) -> str:
    """The table of contents, and what could not be made."""
    return page(
        "contents.html",
        first=f"{pages[0].name}.html" if pages else "#",
        contents=[(shown.name, *TOPICS[shown.name]) for shown in pages],
        missing=[f"{TOPICS[name][0]}: {why}" for name, why in missing.items()],
        made=made,
    )


def formula(text: str) -> str:
    """Plain text with `_{...}` and `^{...}` as HTML."""
    found = re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", html.escape(text.strip()))
    return re.sub(r"\^\{([^}]*)\}", r"<sup>\1</sup>", found)


def prose(text: str) -> str:
    """Plain text with `code` as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _neighbours(name: str, names: Sequence[str]) -> dict[str, dict[str, str] | None]:
    """The pages before and after one, to link to."""
    found: dict[str, dict[str, str] | None] = {"previous": None, "next": None}
    for before, after in pairwise(names):
        if after == name:
            found["previous"] = {"name": before, "heading": TOPICS[before][0]}
        if before == name:
            found["next"] = {"name": after, "heading": TOPICS[after][0]}
    return found


def _panels(topic: Topic, found: Names, runs: Sequence[Names]) -> str:
    """The pictures."""
    return "".join(panel.svg() for panel in topic.picture(found, runs))


def _slider(shown: Shown) -> dict[str, Any] | None:
    """The input, and every position of it."""
    slider = shown.topic.slider
    if slider is None:
        return None
    frames = [_frame(shown, run) for run in shown.runs]
    start = list(slider.values).index(shown.found[slider.parameter])
    data = json.dumps(frames, ensure_ascii=False).replace("</", "<\\/")  # ends no script
    return {
        "label": slider.label,
        "last": len(frames) - 1,
        "start": start,
        "value": str(slider.values[start]),
        "frames": data,
    }


def _frame(shown: Shown, run: Names) -> dict[str, object]:
    """What one position of the slider shows."""
    topic, slider = shown.topic, shown.topic.slider
    return {
        "value": str(run[slider.parameter]) if slider else "",
        "panels": _panels(topic, run, shown.runs),
        "numbers": [number.shown(run) for number in topic.numbers],
        "meaning": prose(topic.meaning.format_map(run)),
    }
