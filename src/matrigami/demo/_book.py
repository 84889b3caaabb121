"""Runs topics and writes their files: one topic, or the whole book."""

import json
import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import matrigami
from matrigami._words import nearest_few, what_is_missing
from matrigami.demo._draw import svg_file
from matrigami.demo._page import Shown, contents_page, topic_page
from matrigami.demo._program import ran
from matrigami.demo._topic import Topic
from matrigami.demo.topics import TOPICS
from matrigami.studies import write_atomic


def load_topic(name: str) -> Topic:
    """The topic of a name.

    Raises:
        ValueError: If there is none; the nearest names are told.

    Examples:
        >>> load_topic("low-rank").numbers[0].label
        'relative error of the best matrix of this rank'
    """
    if name not in TOPICS:
        raise ValueError(
            f"demo {name}: there is no such topic.\n"
            f"Near: {nearest_few(name, TOPICS)}.\nmatrigami demo lists all of them."
        )
    return import_module(f"matrigami.demo.topics._{name.replace('-', '_')}").TOPIC


def show(name: str) -> Shown:
    """Run a topic with all positions of its slider.

    Raises:
        ValueError: If the name is unknown, or an optional package is missing.
    """
    start, topic = time.perf_counter(), load_topic(name)
    try:
        found = ran(topic)
    except ModuleNotFoundError as error:
        raise ValueError(what_is_missing(name, error)) from error
    runs = [found]
    if slider := topic.slider:
        key, first = slider.parameter, found[slider.parameter]
        runs = [found if v == first else ran(topic, **{key: v}) for v in slider.values]
    return Shown(name, topic, found, runs, time.perf_counter() - start)


def write_topic(shown: Shown, folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write the page and the figure of a topic.

    Args:
        shown: The topic and its numbers.
        folder: Made if it is not there.
        names: All pages of the book, for the links between them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, figure = folder / f"{shown.name}.html", folder / f"{shown.name}.svg"
    write_atomic(page, topic_page(shown, names, _made()))
    write_atomic(figure, svg_file(shown.topic.picture(shown.found, shown.runs)))
    return [page, figure]


def write_book(
    folder: Path, report: Callable[[str, float], None], names: Sequence[str] = tuple(TOPICS)
) -> tuple[list[Shown], dict[str, str]]:
    """Make the whole book; a topic whose package is missing is left out.

    Args:
        folder: Of all pages and `index.html`.
        report: Is told what is made, and the finished part of the book.
        names: The topics, in order.

    Returns:
        What was made, and for each topic that was not the reason.
    """
    made, missing = [], {}
    for i, name in enumerate(names):
        report(f"{i + 1} of {len(names)}: {TOPICS[name][0]}", i / len(names))
        try:
            made.append(show(name))
        except ValueError as error:
            missing[name] = str(error)
    pages = [shown.name for shown in made]
    for shown in made:
        write_topic(shown, folder, pages)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "index.html", contents_page(made, missing, _made()))
    return made, missing


def as_json(shown: Shown) -> dict[str, Any]:
    """The numbers of a topic, as JSON has them."""
    heading, line = TOPICS[shown.name]
    numbers = {number.name: number.value(shown.found) for number in shown.topic.numbers}
    found = {"name": shown.name, "heading": heading, "line": line, "numbers": numbers}
    return json.loads(json.dumps(found | {"meaning": shown.meaning, "seconds": shown.seconds}))


def _made() -> str:
    """With what the pages were made."""
    cores = os.cpu_count()
    return f"matrigami {matrigami.__version__}, torch {torch.__version__}, {cores} CPU cores"
