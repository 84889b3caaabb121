"""`matrigami list`: what there is to be named in study files and on the command line."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from matrigami._words import nearest
from matrigami.cli._terminal import echo_json, echo_table

Rows = list[dict[str, Any]]
"""One mapping for each thing, all with the same keys."""


def structures() -> Rows:
    """Structures, with the multiply-adds of the example of 1024 x 1024 in percent of dense."""
    from matrigami import cost
    from matrigami.structures import EXAMPLES

    size = 1024
    return [
        {
            "name": name,
            "example": _spelled(name, recipe),
            "macs_percent": round(100 * cost(recipe.init(size, size)).macs / size**2, 2),
            "what": _about(inspect.getmodule(type(recipe))),
        }
        for name, recipe in EXAMPLES.items()
    ]


def optimizers() -> Rows:
    """Optimisers, with the options that a study file may give."""
    from matrigami.optim import OPTIMIZERS
    from matrigami.studies._optimizers import ELSEWHERE, TORCH

    theirs = [{"name": name, "options": [], "what": "torch's own"} for name in TORCH]
    ours = [
        {
            "name": name,
            "options": [p for p in inspect.signature(kind).parameters if p not in ELSEWHERE],
            "what": _about(kind),
        }
        for name, kind in sorted(OPTIMIZERS.items())
    ]
    return [*theirs, *ours]


def datasets() -> Rows:
    """Data sets to fetch, and whether they are in the data folder."""
    from matrigami.studies.tasks import TASKS
    from matrigami.studies.tasks._datasets import data_folder
    from matrigami.studies.tasks._sources import SOURCES

    folder = data_folder()
    return [
        {
            "name": name,
            "here": all((folder / source.folder / file).exists() for file in source.files),
            "folder": str(folder / source.folder),
            "what": TASKS[name].about,
        }
        for name, source in SOURCES.items()
    ]


def presets() -> Rows:
    """Studies that ship with the library."""
    from matrigami.studies import load_preset, preset_names

    studies = {name: load_preset(name) for name in preset_names()}
    return [
        {"name": name, "runs": len(study.configs), "what": study.description}
        for name, study in studies.items()
    ]


def tasks() -> Rows:
    """What a study trains on, beside data of your own."""
    from matrigami.studies import TASKS

    return [{"name": n, "what": e.about, "where from": e.source} for n, e in TASKS.items()]


def models() -> Rows:
    """Networks of a study, beside your own, and their options."""
    from matrigami.studies.models import MODELS, options_of

    return [
        {"name": name, "options": options_of(name), "what": _about(kind)}
        for name, kind in MODELS.items()
    ]


KINDS: dict[str, Callable[[], Rows]] = {
    "structures": structures,
    "optimizers": optimizers,
    "datasets": datasets,
    "presets": presets,
    "tasks": tasks,
    "models": models,
}
"""What can be listed."""


@click.command("list")
@click.argument("kind", metavar=f"[{'|'.join(KINDS)}]", required=False)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
def list_(kind: str | None, json_: bool) -> int:
    """List what can be named in study files and on the command line.

    Without KIND it says which kinds there are.

    \b
    Examples:
      matrigami list
      matrigami list structures
      matrigami list tasks --json
    """
    if kind and kind not in KINDS:
        raise ValueError(
            f"list {kind!r}: kinds are {', '.join(KINDS)}.\nDid you mean {nearest(kind, KINDS)!r}?"
        )
    rows = KINDS[kind]() if kind else [{"kind": k, "what": _about(of)} for k, of in KINDS.items()]
    if json_:
        echo_json({kind or "kinds": rows})
    else:
        echo_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    return 0


def _spelled(name: str, recipe: Any) -> str:
    """A recipe as a study file has it, without its defaults."""
    values = {f.name: (getattr(recipe, f.name), f.default) for f in fields(recipe)}
    given = {key: value for key, (value, default) in values.items() if value != default}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given else name


def _about(thing: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _cell(value: Any) -> Any:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {'|'.join(map(str, choices))}" for key, choices in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value
