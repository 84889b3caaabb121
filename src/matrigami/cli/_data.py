"""`matrigami data`: fetch the data sets of the studies."""

import sys
import time
from pathlib import Path

import click

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the data sets. [default: $MATRIGAMI_DATA or ~/.cache/matrigami]",
)
"""Of every command that reads them."""


@click.group()
def data() -> None:
    """Fetch the data sets of the studies.

    \b
    Example:
      matrigami data get cifar100
    """


@data.command()
@click.argument("name", metavar="cifar100|cifar10|fashion_mnist")
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data folder. [default: $MATRIGAMI_DATA or ~/.cache/matrigami]",
)
@click.option(
    "--from",
    "at_hand",
    type=click.Path(exists=True, path_type=Path),
    help="An archive, or a folder with its files, that is already at hand; nothing is downloaded.",
)
def get(name: str, to: Path | None, at_hand: Path | None) -> None:
    """Download a data set from its authors, check it and unpack it.

    A download that was interrupted continues where it ended.

    \b
    Examples:
      matrigami data get cifar100
      matrigami data get cifar100 --from cifar-100-binary.tar.gz --to data
    """
    from matrigami.studies.tasks._download import get_dataset

    try:
        paths = get_dataset(name, to, at_hand=at_hand, tell=ProgressLine())
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for path in paths:
        click.echo(str(path))


class ProgressLine:
    """How far a download is, on stderr: rewritten on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.due = 0.0

    def __call__(self, name: str, have: int, total: int | None) -> None:
        """Tell, if it is time to, or at the end."""
        now, ended = time.monotonic(), have == total
        if now < self.due and not ended:
            return
        self.due = now + (0.2 if self.terminal else 10.0)
        share = f" of {total / 1e6:.1f} MB, {100 * have // total} %" if total else " MB"
        line = f"{name}: {have / 1e6:.1f}{share}"
        click.echo(f"\r{line}" if self.terminal else line, err=True, nl=ended or not self.terminal)
