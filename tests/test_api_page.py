"""The page of the API has each public name once, under one heading."""

import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import matrigami

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
ENTRY = re.compile(r"^::: (?P<path>\S+)\n(?P<options>(?:    .*\n)*)", re.MULTILINE)

Key = tuple[str, int]
"""A name and its object: packages pass on what is in lower ones."""


def key(package: Any, name: str) -> Key:
    return name, id(getattr(package, name))


def shown() -> Iterator[Key]:
    """What mkdocstrings makes of each entry: an object, members of a package, or all of it."""
    for entry in ENTRY.finditer(PAGE):
        home, _, name = entry["path"].rpartition(".")
        if name not in matrigami.PACKAGES:
            yield key(import_module(home), name)
            continue
        package = import_module(entry["path"])
        members = re.search(r"members: \[(.*)\]", entry["options"])
        for member in members[1].split(", ") if members else package.__all__:
            yield key(package, member)


COUNTS = Counter(shown())


@pytest.mark.parametrize("package", ["", *matrigami.PACKAGES])
def test_each_name_is_on_the_page_once(package: str):
    module = import_module(f"matrigami.{package}".rstrip("."))
    counts = {name: COUNTS[key(module, name)] for name in module.__all__}
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_the_page_has_no_name_that_is_not_public():
    packages = [import_module(f"matrigami.{name}") for name in matrigami.PACKAGES]
    public = {key(package, name) for package in packages for name in package.__all__}
    assert [name for name, number in COUNTS if (name, number) not in public] == []
