"""Files and folders that a command reads: one that is not there is told with its neighbours."""

from pathlib import Path
from typing import Any

import click

from matrigami._words import nearest_few


class There(click.Path):
    """A path that has to be there.

    Args:
        kind: `file` or `folder`.
        preset: Whether the name may be meant for `--preset`.
        word: Something that may be given in its place.
    """

    def __init__(self, kind: str, *, preset: bool = False, word: str = "") -> None:
        folder = kind == "folder"
        super().__init__(exists=True, file_okay=not folder, dir_okay=folder, path_type=Path)
        self.kind, self.preset, self.word = kind, preset, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, checked; the names of the arguments are click's."""
        path = Path(value)
        if self.word and value == self.word:
            return path
        if not path.exists():
            self.fail(f"there is no {self.kind} {str(value)!r}.\n{self._advice(path)}", param, ctx)
        return super().convert(value, param, ctx)

    def _advice(self, path: Path) -> str:
        """What was probably meant: a preset, or what is beside it."""
        name = path.name.removesuffix(".toml")
        if self.preset and (near := _near_presets(name)):
            return f"Presets are called by name: --preset {near}."
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        wanted = Path.is_dir if self.kind == "folder" else Path.is_file
        names = [p.name for p in beside if wanted(p)]
        return f"Nearest in {path.parent}: {nearest_few(path.name, names)}."


def _near_presets(name: str) -> str:
    """The preset of nearly this name; empty if there is none."""
    import difflib

    from matrigami.studies import preset_names

    return "".join(difflib.get_close_matches(name, preset_names(), n=1))


FILE = There("file")
FILE_OR_SELF = There("file", word="self")
FOLDER = There("folder")
SPEC = There("file", preset=True)
