"""A study as a TOML file: tasks x structures x widths x seeds, expanded into runs.

[study]
name = "cifar100_small"
[task]                          # or several [[task]]; a task may override any key of [train] and
[model]
dataset = "cifar100"
[model]
name = "mlp"
[train]
optimizer = "adamw"             # or "soap(frequency=5)"
lr = 3e-3
epochs = 20
batch_size = 1024
seeds = [0]
[[structure]]
name = "btt(rank=1)"
widths = [128, 256, 512]
repeat_widths = [256]           # these widths also run with [train] repeat_seeds, by default [1]
"""

import ast
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from matrigami._words import nearest
from matrigami.structures import parse
from matrigami.studies._config import NOTED, RunConfig
from matrigami.studies._optimizers import canonical_optimizer
from matrigami.studies._own import is_function, source_hash
from matrigami.studies.models import MODELS, canonical_model
from matrigami.studies.tasks import TASKS

_SEEDS = ("seeds", "repeat_seeds", "repeat_widths")
_RUN = tuple(
    f.name
    for f in fields(RunConfig)
    if f.name not in ("dataset", "model", "structure", "width", "seed", *NOTED)
)
_KEYS = {
    "study": ("name", "description"),
    "task": ("dataset", "seeds", "repeat_seeds", *_RUN),
    "model": ("name", *_RUN),
    "train": ("seeds", "repeat_seeds", *_RUN),
    "structure": ("name", "widths", "datasets", *_SEEDS, *_RUN),
}
"""Keys of each table."""

_TYPES = {
    **{f.name: f.type for f in fields(RunConfig)},
    **dict.fromkeys(("widths", *_SEEDS), list[int]),
    **dict.fromkeys(("structured_layers", "mixture"), str),
    **dict.fromkeys(("samples_per_epoch", "vocabulary", "side"), int),
    **dict.fromkeys(("datasets", "structures"), list[str]),
    **dict.fromkeys(("macs", "keep"), list[float]),
    "samples": int,
    "description": str,
    "name": str,
}
"""Type of the value of each key, also of a search."""

_REQUIRED = {"study": ("name",), "task": ("dataset",), "structure": ("name", "widths")}


@dataclass(frozen=True)
class Study:
    """A name and the runs that make it up, in the order of the file, each once."""

    name: str
    configs: tuple[RunConfig, ...]
    description: str = ""

    def only(self, structure: str) -> "Study":
        """The runs of one structure.

        Raises:
            ValueError: If the study has none.
        """
        wanted = canonical_structure(structure)
        configs = tuple(c for c in self.configs if c.structure == wanted)
        if not configs:
            names = list(dict.fromkeys(c.structure for c in self.configs))
            raise ValueError(
                f"Study {self.name!r} has no runs of {wanted!r}.\n"
                f"Its structures are {', '.join(names)}.\nDid you mean {nearest(wanted, names)!r}?"
            )
        return Study(self.name, configs, self.description)


def canonical_structure(text: str) -> str:
    """One spelling of a structure.

    Examples:
        >>> canonical_structure(" btt( rank = 2 )"), canonical_structure("dense()")
        ('btt(rank=2)', 'dense')
    """
    parse(text)
    return ast.unparse(ast.parse(text.strip(), mode="eval")).removesuffix("()")


def preset_names() -> list[str]:
    """Names of the studies that ship with the library."""
    folder = resources.files("matrigami.studies") / "presets"
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_preset(name: str) -> Study:
    """A study that ships with the library.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in preset_names():
        raise ValueError(
            f"Preset {name!r}: presets are {', '.join(preset_names())}.\n"
            f"Did you mean {nearest(name, preset_names())!r}?"
        )
    text = (resources.files("matrigami.studies") / "presets" / f"{name}.toml").read_text("utf-8")
    return parse_spec(text, f"preset {name}")


def load_spec(path: str | Path) -> Study:
    """A study file.

    Raises:
        ValueError: If the file cannot be read, is not TOML, or has an unknown, missing or invalid
            entry.
    """
    try:
        text = Path(path).read_text("utf-8-sig")  # editors of Windows write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Study file {path}: it cannot be read: {error}.\n"
            "Give the path of a TOML file, or one of `matrigami study presets`."
        ) from error
    return parse_spec(text, str(path), Path(path).resolve().parent)


def parse_spec(text: str, origin: str = "the spec", folder: str | Path = "") -> Study:
    """A study from TOML text.

    Args:
        text: The tables described at the top of this module.
        origin: What to call the text in messages.
        folder: What paths of data and models of your own are relative to.

    Raises:
        ValueError: If the text is not TOML, or has an unknown, missing or invalid entry.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{origin}: it is not valid TOML: {cause}.\nMend that line.") from error
    return study_of(tables, origin, folder)


def study_of(tables: Mapping[str, Any], origin: str, folder: str | Path = "") -> Study:
    """A study from the tables of a spec.

    Raises:
        ValueError: If an entry is unknown, missing or invalid.
    """
    parts = _parts(tables, origin)
    head, model, train = (parts[name][0] for name in ("study", "model", "train"))
    name = canonical_model(model.get("name", "mlp"))
    settings = {"model": name, **_without(model, "name"), **train}
    tasks = [{**task, **_noted(task["dataset"], name, folder)} for task in parts["task"]]
    pairs = itertools.product(tasks, parts["structure"])
    runs = [run for pair in pairs for run in _runs(settings, *pair)]
    if not runs:
        raise ValueError(
            f"{origin}: it has no runs: a list of widths or seeds is empty, or "
            "`datasets` names no task.\nGive each [[structure]] a width, and [train] a seed."
        )
    return Study(
        head["name"], tuple({run.id: run for run in runs}.values()), head.get("description", "")
    )


def _parts(tables: Mapping[str, Any], origin: str) -> dict[str, list[Mapping[str, Any]]]:
    """The tables of each name, checked."""
    check_names(origin, "tables", tables, tuple(_KEYS))
    parts = {name: _tables(origin, name, tables.get(name, {})) for name in _KEYS}
    for name in ("task", "structure"):
        if not parts[name]:
            raise ValueError(f"{origin}: it has no [[{name}]] table.\nAdd at least one.")
    _check_names_of_runs(origin, parts)
    return parts


_SPELLINGS = {"score": canonical_structure, "optimizer": canonical_optimizer}
"""Settings that have one spelling."""


def _check_names_of_runs(origin: str, parts: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Refuse a structure that asks for a task or for repeats of a width that are not there."""
    datasets = tuple(task["dataset"] for task in parts["task"])
    for table in parts["structure"]:
        check_names(origin, "datasets of the tasks", table.get("datasets", ()), datasets)
        for width in table.get("repeat_widths", ()):
            if width not in table["widths"]:
                raise ValueError(
                    f"{origin}: {table['name']}, repeat_widths = {table['repeat_widths']}: "
                    f"{width} is none of its widths.\nWidths are {table['widths']}."
                )


def _runs(
    settings: Mapping[str, Any], task: Mapping[str, Any], structure: Mapping[str, Any]
) -> Iterator[RunConfig]:
    """The runs of one structure on one task; what is nearer to the structure wins."""
    if task["dataset"] not in structure.get("datasets", [task["dataset"]]):
        return
    own = _without(structure, "name", "widths", "datasets", "repeat_widths")
    merged = {**settings, **task, **own, "structure": canonical_structure(structure["name"])}
    merged |= {key: spelt(merged[key]) for key, spelt in _SPELLINGS.items() if key in merged}
    seeds, again = merged.pop("seeds", [0]), merged.pop("repeat_seeds", [1])
    _check_settings(merged)
    for width in structure["widths"]:
        repeats = again if width in structure.get("repeat_widths", []) else []
        for seed in [*seeds, *repeats]:
            yield RunConfig(**merged, width=width, seed=seed)


def _check_settings(merged: Mapping[str, Any]) -> None:
    """Refuse runs without the settings that have no default."""
    missing = [key for key in ("lr", "epochs", "batch_size") if key not in merged]
    if missing:
        raise ValueError(
            f"[train]: runs of {merged['structure']} on {merged['dataset']} have no "
            f"{', '.join(missing)}.\nAdd this to [train], [[task]] or [[structure]]."
        )


def _noted(dataset: str, model: str, folder: str | Path) -> dict[str, str]:
    """Where sources of your own are, and a hash of each; nothing where there are none."""
    known = [*MODELS, model] if not is_function(model) else MODELS
    hashes = {
        "data_hash": source_hash(dataset, str(folder), TASKS),
        "model_hash": source_hash(model, str(folder), known),
    }
    return {"folder": str(folder), **hashes} if any(hashes.values()) else {}


def _tables(origin: str, name: str, value: Any) -> list[Mapping[str, Any]]:
    """One table or an array of tables as a list, with its keys checked."""
    many = name in ("task", "structure")
    tables = value if isinstance(value, list) else [value] if value or not many else []
    if not many and isinstance(value, list):
        raise ValueError(f"{origin}: [[{name}]] is given more than once.\nWrite one [{name}].")
    for table in tables:
        if not isinstance(table, dict):
            raise ValueError(
                f"{origin}: {name!r} is not a table.\nWrite [{name}] and its keys below."
            )
        check_names(origin, f"keys of [{name}]", table, _KEYS[name])
        check_types(origin, name, table)
        for key in _REQUIRED.get(name, ()):
            if key not in table:
                raise ValueError(f"{origin}: [{name}] has no {key!r}.\nAdd it.")
    return tables


def check_names(origin: str, what: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    """Refuse the first unknown name and suggest the nearest."""
    for name in given:
        if name not in known:
            raise ValueError(
                f"{origin}: {name!r} is none of the {what}.\n"
                f"Known are {', '.join(known)}.\n"
                f"Did you mean {nearest(name, known)!r}?"
            )


def check_types(origin: str, name: str, table: Mapping[str, Any]) -> None:
    """Refuse the first value of a wrong type."""
    for key, value in table.items():
        if not _is(value, _TYPES[key]):
            wanted = getattr(_TYPES[key], "__name__", "")
            wanted = wanted if wanted != "list" else str(_TYPES[key])
            raise ValueError(
                f"{origin}: [{name}] {key} = {value!r} is of the wrong type.\n"
                f"It should be of type {wanted}."
            )


def _is(value: Any, type_: Any) -> bool:
    """Whether a TOML value has a type; an integer will do for a float, but no boolean."""
    if get_origin(type_) is list:
        return isinstance(value, list) and all(_is(v, get_args(type_)[0]) for v in value)
    if isinstance(value, bool) or type_ is bool:
        return isinstance(value, bool) and type_ is bool
    return isinstance(value, int | float if type_ is float else type_)


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A copy that lacks some keys."""
    return {key: value for key, value in table.items() if key not in keys}
