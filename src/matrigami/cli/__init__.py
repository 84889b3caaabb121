"""The command line: one module per verb, imported when the verb is used."""

from matrigami.cli._main import main

__all__ = ["main"]
