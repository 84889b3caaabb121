"""Measurements: their lines in a file, their tables, and the places of these in `README.md`."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


def read_rows(kind: type[Any], path: Path) -> list[Any]:
    """The measurements so far, each a dataclass of this kind."""
    if not path.exists():
        return []
    kinds = kind.__annotations__
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]


def append_row(path: Path, row: Any) -> None:
    """One more measurement."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(row)), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(report: str, name: str) -> None:
    """Put a report between the marks of its name in the README."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n\n{report}\n\n{end}{after}")
