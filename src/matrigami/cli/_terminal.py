"""What the commands print: tables, messages, and a line that shows how far the work is."""

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from matrigami._words import columns, duration, finite


class ProgressLine:
    """How far the work is, on stderr: rewritten on a terminal, else a line from time to time.

    Args:
        seconds: Between two lines where there is no terminal.
        quiet: Show nothing.
    """

    def __init__(self, seconds: float = 30.0, *, quiet: bool = False) -> None:
        self.terminal, self.quiet = sys.stderr.isatty(), quiet
        self.seconds = 0.1 if self.terminal else seconds
        self.color = self.terminal and "NO_COLOR" not in os.environ
        self.last, self.open = -math.inf, False
        self.begun: tuple[float, float] | None = None

    def show(
        self, text: str, *, share: float | None = None, done: bool = False, bad: bool = False
    ) -> None:
        """Draw the state, if it is time to; the last state is always drawn.

        Args:
            text: The state.
            share: Finished part of the work, for the time that is left. It is measured since the
                first of them.
            done: Whether this is the last state.
            bad: Whether something has failed.
        """
        now = time.monotonic()
        left = "" if share is None else self._left(share, now)
        if self.quiet or (now - self.last < self.seconds and not (done and self.open)):
            return
        self.last, self.open = now, self.terminal or not done
        self._draw(text + left, bad)

    def _left(self, share: float, now: float) -> str:
        """The time that is left, as soon as it can be said."""
        self.begun = self.begun or (share, now)
        done, passed = share - self.begun[0], now - self.begun[1]
        return f" · eta {duration((1 - share) * passed / done)}" if done > 0 and share < 1 else ""

    def _draw(self, text: str, bad: bool) -> None:
        """The line itself."""
        width = shutil.get_terminal_size().columns - 1
        if not self.terminal:
            click.echo(text, err=True)
        elif self.color:
            shown = click.style(text[:width], fg="red" if bad else "cyan")
            click.echo(f"\r\x1b[2K{shown}", err=True, nl=False)
        else:
            click.echo(f"\r{text[:width]:<{width}}", err=True, nl=False)

    def end(self) -> None:
        """Leave the line, if there is one."""
        if self.terminal and self.open:
            click.echo("", err=True)
        self.open = False


def echo_table(header: list[str], rows: list[list[Any]]) -> None:
    """Columns, numbers to the right."""
    right = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
    cells = [[str(cell) for cell in row] for row in rows]
    for line in columns([header, *cells], right or [True] * len(header)):
        click.echo(line)


def echo_tables(tables: Iterable[tuple[str, list[str], list[list[Any]], list[str]]]) -> None:
    """Titles, tables and the notes below them."""
    for title, header, rows, notes in tables:
        click.echo(f"\n{title}")
        echo_table(header, rows)
        click.echo("".join(f"  {note}\n" for note in notes), nl=False)


def echo_json(document: Any) -> None:
    """One JSON document; what is not finite is null."""
    click.echo(json.dumps(finite(document), indent=1, allow_nan=False))


def echo_written(files: Iterable[Path]) -> None:
    """The files that a command has written."""
    click.echo("\nWritten:\n" + "\n".join(f"  {path}" for path in files))


def _is_number(cell: Any) -> bool:
    """Whether a cell is a number, or begins like one."""
    return isinstance(cell, int | float) or str(cell)[:1].isdigit()


def say(text: str) -> None:
    """To the person, not to the pipe."""
    click.echo(text, err=True)


def command_line() -> str:
    """The command line that was given."""
    return shlex.join(["matrigami", *sys.argv[1:]])
