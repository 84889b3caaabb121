"""Tables of measurements, and their places in `benchmarks/README.md`."""

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).with_name("README.md")


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
