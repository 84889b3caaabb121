"""Two studies side by side: their runs in one list, with the study in the name of the structure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrigami.studies._fit import METRICS
from matrigami.studies._record import Record, damaged, labelled, read_json, read_results

JOINT = " · "
"""Between a structure and its study."""


@dataclass(frozen=True)
class Comparison:
    """What two studies have to say of the same data.

    Attributes:
        names: What the studies are called.
        records: Runs of both on datasets that both have; `structure` ends with the `study`, and
            without it is `kind`.
        settings: Settings in which the studies differ, with their values in each.
        environments: `env.json` of each.
    """

    names: tuple[str, str]
    records: list[dict[str, Any]]
    settings: dict[str, tuple[str, str]]
    environments: tuple[Mapping[str, Any], Mapping[str, Any]]


def compare_studies(first: Path, second: Path) -> Comparison:
    """Read two study folders.

    Args:
        first: A folder with `results.csv`.
        second: Another one.

    Raises:
        ValueError: If there are no results, or no dataset is in both.
    """
    folders = (first, second)
    if first.resolve() == second.resolve():
        raise ValueError(f"compare {first} {second}: it is one folder.\nGive two studies.")
    studies = [read_json(folder / "study.json") or {} for folder in folders]
    names = _names(folders, studies)
    rows = [labelled(read_results(folder / "results.csv")) for folder in folders]
    common = _common_datasets(folders, rows)
    configs = list(map(_configs, folders, studies))
    _check_same_data(folders, configs)
    records = [
        {**r, "structure": f"{r['structure']}{JOINT}{name}", "kind": r["structure"], "study": name}
        for name, each in zip(names, rows, strict=True)
        for r in each
        if str(r["dataset"]) in common
    ]
    environments = [read_json(folder / "env.json") or {} for folder in folders]
    settings = _differing(*map(_settings, configs))
    return Comparison(names, records, settings, (environments[0], environments[1]))


def _common_datasets(folders: Sequence[Path], rows: Sequence[Sequence[Record]]) -> set[str]:
    """The data sets of both studies.

    Raises:
        ValueError: If there is none.
    """
    first, second = ({str(r["dataset"]) for r in each} for each in rows)
    if not first & second:
        names = [", ".join(sorted(each)) or "no run that ended" for each in (first, second)]
        raise ValueError(
            f"compare {folders[0]} {folders[1]}: they have no dataset in common.\n"
            f"The first has {names[0]}, the second {names[1]}.\n"
            "Compare studies of the same data."
        )
    return first & second


def _configs(folder: Path, study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of all runs of a study."""
    try:
        return [dict(run["config"]) for run in study.get("runs", [])]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(folder / "study.json", f"an entry is missing or wrong ({error})") from error


def _check_same_data(
    folders: Sequence[Path], configs: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Refuse a name that was another file in each study.

    Raises:
        ValueError: If there is one: its errors would be compared as those of one data set.
    """
    first, second = (
        {str(c.get("dataset")): c["data_hash"] for c in each if c.get("data_hash")}
        for each in configs
    )
    other = [name for name, known in first.items() if second.get(name, known) != known]
    if other:
        raise ValueError(
            f"compare {folders[0]} {folders[1]}: {other[0]} was another file in each.\n"
            "Compare studies of the same data."
        )


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that two studies do not share."""
    return {
        key: (first.get(key, "–"), second.get(key, "–"))
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    }


def same_structures(
    fit: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """For each dataset and error: a structure in both studies, and the ratio of its errors.

    Args:
        fit: `fit_results` of the runs of both.
        names: What the studies are called.

    Yields:
        Title, header and rows, where there are any.
    """
    first, second = names
    header = ["structure", f"{second} / {first}", "95 % interval", "told apart"]
    for dataset, result in fit["datasets"].items():
        for metric in METRICS:
            rows = [row for pair in result["comparisons"][metric] for row in _same(pair, second)]
            if rows:
                yield f"{dataset}: {metric.replace('_', ' ')}, same structure", header, rows


def _same(pair: Mapping[str, Any], second: str) -> Iterator[list[Any]]:
    """The ratio of a pair that is one structure in both studies."""
    (a, _, study_a), (b, _, study_b) = (pair[k].rpartition(JOINT) for k in ("better", "worse"))
    if a != b or study_a == study_b:
        return
    ratio, (low, high) = pair["ratio"], pair["interval"]
    if study_a == second:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    yield [a, f"{ratio:.3f}", f"{low:.3f} – {high:.3f}", "yes" if pair["differ"] else "no"]


def _names(folders: Sequence[Path], studies: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Names of the studies; of their folders where these are the same, or else A and B."""
    for found in (
        [str(study.get("name", f.name)) for study, f in zip(studies, folders, strict=True)],
        [folder.resolve().name for folder in folders],
    ):
        if found[0] != found[1]:
            return found[0], found[1]
    return "A", "B"


def _settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each setting with all its values, without what is a folder or follows from others."""
    settings: dict[str, dict[str, None]] = {}
    for config in configs:
        for key, value in config.items():
            if key not in ("folder", "checkpoint_seconds"):
                settings.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(values) for key, values in settings.items()}
