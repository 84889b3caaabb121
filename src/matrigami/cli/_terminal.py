"""What the commands print: tables, messages, and a line that shows how far a study is."""

import os
import shlex
import shutil
import sys
import time
from typing import Any

import click


class ProgressLine:
    """The state of the work on stderr: rewritten on a terminal, else a line every half minute."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.terminal, self.seconds, self.last, self.open = sys.stderr.isatty(), seconds, 0.0, False
        self.color = self.terminal and "NO_COLOR" not in os.environ

    def show(self, text: str, *, done: bool = False, bad: bool = False) -> None:
        """Draw the state, if it is time to; the last state is always drawn."""
        now = time.monotonic()
        if not self.terminal and now - self.last < self.seconds and not (done and self.open):
            return
        self.last, self.open = now, not done
        if not self.terminal:
            click.echo(text, err=True)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        shown = click.style(text, fg="red" if bad else "cyan") if self.color else text
        click.echo(
            f"\r\x1b[2K{shown}"
            if self.color
            else f"\r{text:<{shutil.get_terminal_size().columns - 1}}",
            err=True,
            nl=False,
        )

    def end(self) -> None:
        """Leave the line."""
        if self.terminal:
            click.echo("", err=True)


def echo_table(header: list[str], rows: list[list[Any]]) -> None:
    """Columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    right = [
        all(isinstance(row[i], int | float) or str(row[i])[:1].isdigit() for row in rows)
        for i in range(len(header))
    ]
    for line in [header, *cells]:
        padded = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def say(text: str) -> None:
    """To the person, not to the pipe."""
    click.echo(text, err=True)


def command_line() -> str:
    """The command line that was given."""
    return shlex.join(["matrigami", *sys.argv[1:]])
