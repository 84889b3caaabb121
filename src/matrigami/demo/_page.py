"""A page of the gallery: one HTML file that needs no network, no server and no other file."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

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
    first = topic.numbers[0]
    return filled(
        "topic.html",
        heading=html.escape(heading),
        line=html.escape(line),
        nav=_nav(shown.name, names),
        formula=formula(topic.formula),
        panels="".join(panel.svg() for panel in topic.picture(shown.found, shown.runs)),
        slider=_slider(shown),
        number=html.escape(first.shown(shown.found)),
        label=html.escape(first.label),
        meaning=prose(shown.meaning),
        code=html.escape(program(topic)),
        numbers=_numbers(shown),
        exercise=prose(topic.exercise),
        answer=prose(topic.answer),
        sources="".join(f"<li>{html.escape(source)}</li>" for source in topic.sources),
        made=html.escape(f"{shown.seconds:.1f} s. {made}"),
    )


def contents_page(pages: Sequence[Shown], missing: dict[str, str], made: str) -> str:
    """The table of contents, and what could not be made."""
    items = []
    for page in pages:
        heading, line = TOPICS[page.name]
        items.append(
            f'<li><a href="{page.name}.html">{html.escape(heading)}</a>'
            f"<span>{html.escape(line)}</span></li>"
        )
    lost = [f"<p>{html.escape(f'{TOPICS[n][0]}: {why}')}</p>" for n, why in missing.items()]
    return filled(
        "contents.html",
        first=f"{pages[0].name}.html" if pages else "#",
        contents="\n".join(items),
        missing="\n".join(lost),
        made=html.escape(made),
    )


def filled(name: str, **parts: str) -> str:
    """A template with its parts, the style and the script of the gallery."""
    package = resources.files("matrigami")
    here = package / "demo"
    style = (package / "plots" / "page.css").read_text("utf-8")  # one look with the reports
    style += (here / "page.css").read_text("utf-8")
    script = (here / "page.js").read_text("utf-8")
    text = (here / name).read_text("utf-8")
    return Template(text).substitute(parts, style=style, script=script)


def formula(text: str) -> str:
    """Plain text with `_{...}` and `^{...}` as HTML."""
    text = html.escape(text.strip())
    text = re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", text)
    return re.sub(r"\^\{([^}]*)\}", r"<sup>\1</sup>", text)


def prose(text: str) -> str:
    """Plain text with `code` as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _nav(name: str, names: Sequence[str]) -> str:
    """Previous page, contents, next page."""
    if len(names) < 2:
        return '<span class="next"></span>'
    place = names.index(name)
    parts = []
    if place > 0:
        parts.append(_link(names[place - 1], "previous", "← {}"))
    parts.append('<a class="home" href="index.html" title="All pages (Home)">Contents</a>')
    if place + 1 < len(names):
        parts.append(_link(names[place + 1], "next", "{} →"))
    else:
        parts.append('<span class="next"></span>')
    return "".join(parts)


def _link(name: str, kind: str, text: str) -> str:
    """A link to a neighbour."""
    heading = html.escape(TOPICS[name][0])
    return f'<a class="{kind}" href="{name}.html" title="{heading}">{text.format(heading)}</a>'


def _slider(shown: Shown) -> str:
    """The input, and every position of it."""
    slider = shown.topic.slider
    if slider is None:
        return ""
    frames = [_frame(shown, run) for run in shown.runs]
    start = list(slider.values).index(shown.found[slider.parameter])
    data = json.dumps(frames, ensure_ascii=False).replace("</", "<\\/")
    value = html.escape(str(slider.values[start]))
    return (
        f'<div class="slider"><label for="slider">{html.escape(slider.label)}</label>'
        f'<input id="slider" type="range" min="0" max="{len(frames) - 1}" value="{start}" '
        f'aria-valuetext="{value}"><output id="value" for="slider">{value}</output></div>'
        f'<script type="application/json" id="frames">{data}</script>'
    )


def _frame(shown: Shown, run: Names) -> dict[str, object]:
    """What one position of the slider shows."""
    topic, slider = shown.topic, shown.topic.slider
    return {
        "value": str(run[slider.parameter]) if slider else "",
        "panels": "".join(panel.svg() for panel in topic.picture(run, shown.runs)),
        "numbers": [number.shown(run) for number in topic.numbers],
        "meaning": prose(topic.meaning.format_map(run)),
    }


def _numbers(shown: Shown) -> str:
    """The table of all numbers."""
    rows = "".join(
        f"<tr><td>{html.escape(number.label)}</td>"
        f'<td class="number" data-number="{i}">{html.escape(number.shown(shown.found))}</td></tr>'
        for i, number in enumerate(shown.topic.numbers)
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
