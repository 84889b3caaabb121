"""`matrigami version`."""

import click


@click.command()
def version() -> None:
    """Print the version.

    \b
    Example:
      matrigami version
    """
    from matrigami import __version__

    click.echo(f"matrigami {__version__}")
