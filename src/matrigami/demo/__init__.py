"""The gallery: one page for each topic, made by the code that it shows."""

from matrigami.demo._book import as_json, load_topic, show, write_book, write_topic
from matrigami.demo._draw import Panel
from matrigami.demo._page import Shown
from matrigami.demo._program import program
from matrigami.demo._topic import Number, Slider, Topic
from matrigami.demo.topics import TOPICS

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
