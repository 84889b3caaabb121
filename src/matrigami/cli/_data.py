"""`matrigami data`: fetch the data sets of the studies."""

from collections.abc import Callable
from pathlib import Path

import click

from matrigami.cli._terminal import ProgressLine

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
@click.argument("name")
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

    NAME is one of `matrigami list datasets`. A download that was interrupted continues where it
    ended.

    \b
    Examples:
      matrigami data get cifar100
      matrigami data get cifar100 --from cifar-100-binary.tar.gz --to data
    """
    from matrigami.studies.tasks._download import get_dataset

    line = ProgressLine(seconds=10.0)
    try:
        paths = get_dataset(name, to, at_hand=at_hand, tell=_tell(line))
    except OSError as error:
        raise click.ClickException(str(error)) from error
    finally:
        line.end()
    for path in paths:
        click.echo(str(path))


def _tell(line: ProgressLine) -> Callable[[str, int, int | None], None]:
    """Writes how far a download is."""

    def tell(name: str, have: int, total: int | None) -> None:
        """So many bytes of a file."""
        size = f" of {total / 1e6:.1f} MB, {100 * have // total} %" if total else " MB"
        share = have / total if total else None
        line.show(f"{name}: {have / 1e6:.1f}{size}", share=share, done=have == total)

    return tell
