"""`matrigami demo`: the gallery, one topic or the whole book."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from matrigami.cli._terminal import ProgressLine, echo_table, echo_written, say

if TYPE_CHECKING:
    from matrigami.demo import Shown


@click.command()
@click.argument("topic", required=False)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("gallery"),
    show_default=True,
    help="Folder of the pages and figures.",
)
@click.option("--all", "all_", is_flag=True, help="Make the whole book; begin at index.html.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of text.")
def demo(topic: str | None, out: Path, all_: bool, json_: bool) -> int:
    """Show the ideas one by one: formula, code, picture, number, exercise.

    Without TOPIC it lists the topics. With one it runs it, prints its numbers and writes its page.

    \b
    Examples:
      matrigami demo
      matrigami demo low-rank
      matrigami demo --all -o gallery
    """
    if topic is not None and all_:
        raise click.UsageError("Give a TOPIC or --all.")
    if all_:
        return _book(out, json_)
    return _list(json_) if topic is None else _one(topic, out, json_)


def _list(json_: bool) -> int:
    """All topics, one line each."""
    from matrigami.demo import TOPICS

    if json_:
        found = [{"name": n, "heading": h, "line": line} for n, (h, line) in TOPICS.items()]
        click.echo(json.dumps({"topics": found}, indent=1, ensure_ascii=False))
    else:
        echo_table(["topic", "heading", ""], [[n, *words] for n, words in TOPICS.items()])
    return 0


def _one(name: str, out: Path, json_: bool) -> int:
    """One topic."""
    from matrigami.demo import as_json, show, write_topic

    shown = show(name)
    files = write_topic(shown, out)
    if json_:
        answer = as_json(shown) | {"files": [str(path) for path in files]}
        click.echo(json.dumps(answer, indent=1, ensure_ascii=False))
        return 0
    _echo(shown)
    echo_written(files)
    return 0


def _echo(shown: "Shown") -> None:
    """Formula, numbers, and what they mean."""
    from matrigami.demo import TOPICS

    heading, line = TOPICS[shown.name]
    click.echo(f"{heading}\n{line}\n\n{shown.topic.formula.strip()}\n")
    echo_table(["number", "value"], [[n.label, n.shown(shown.found)] for n in shown.topic.numbers])
    click.echo(f"\n{shown.meaning}")


def _book(out: Path, json_: bool) -> int:
    """All topics as pages that link to each other."""
    from matrigami.demo import as_json, write_book

    line = ProgressLine(seconds=10.0, quiet=json_)
    made, missing = write_book(out, lambda text, share: line.show(text, share=share))
    line.end()
    for reason in missing.values():
        say(f"matrigami: {reason}")
    if json_:
        answer = {"topics": [as_json(shown) for shown in made], "missing": missing}
        click.echo(json.dumps(answer | {"file": str(out / "index.html")}, indent=1))
    else:
        click.echo(f"{len(made)} pages. Begin at {out / 'index.html'}")
    return 0
