"""One HTML file with all of a study: it needs no network, no server and no other file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrigami._pages import Drawing, page
from matrigami.plots._scaling import exponents_figure, plot_study, render, time_figure
from matrigami.studies import (
    conclusions,
    file_hash,
    fit_results,
    fit_tables,
    labelled,
    read_results,
    timed,
    write_atomic,
)

SHOWN = (
    "dataset",
    "model",
    "structure",
    "width",
    "seed",
    "lr",
    "params",
    "macs",
    "train_error",
    "test_error",
    "train_loss",
    "test_loss",
    "seconds",
    "status",
    "cause",
)
"""Columns of the table of runs."""

_CAPTIONS = {
    "scaling": "Error against multiply-adds. Left on the training stream, right on the test set, "
    "on one scale, so that the gap shows. Lines are fitted power laws, dashed with an offset; "
    "structures are ranked at the dotted line, and those that share a letter are not told apart.",
    "time": "Measured seconds of training. What multiply-adds do not tell: "
    "narrow factors run at a lower rate.",
    "exponents": "Exponents with 95 % intervals; E is what no compute removes, by its law; "
    "exponents with and without E are not comparable. "
    "An exponent says how fast the error falls, not how low it is.",
}


def write_report(folder: Path, *, command: str = "") -> Path:
    """Write `report.html` of a study folder.

    Args:
        folder: Holds `results.csv`; `study.json` and `env.json` are shown if they are there.
        command: Command line to note in the figures.

    Returns:
        The file.

    Raises:
        ValueError: If the results are missing or hold no finished run.
    """
    records = labelled(read_results(folder / "results.csv"))
    if not (folder / "fig" / "scaling.svg").exists():
        plot_study(folder, command=command)
    study, environment = _load(folder / "study.json"), _load(folder / "env.json")
    fit = fit_results(records)  # not fit.json, which may be older than the results, or the format
    name = str(study.get("name", folder.name))
    good = [r for r in records if r["status"] == "done"]
    text = page(
        "report.html",
        title=name,
        summary=summary_of(records),
        ranking=fit_tables(fit),
        method=fit.get("method", ""),
        figures=_figures(folder, good, fit),
        runs=run_table(records),
        words=conclusions(records, fit),
        settings=(["what", "value"], _common_settings(study)),
        environment=environment | {"results.csv SHA-256": file_hash(folder / "results.csv")},
    )
    write_atomic(folder / "report.html", text)
    return folder / "report.html"


def summary_of(records: Sequence[Mapping[str, Any]]) -> str:
    """How many runs ended how."""
    kinds = [str(r["status"]) for r in records]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    hours = sum(r["seconds"] or 0.0 for r in records) / 3600
    return f"{len(records)} runs ({counts}), {hours:.2f} hours of training."


def _figures(
    folder: Path, records: Sequence[Mapping[str, Any]], fit: Mapping[str, Any]
) -> list[Drawing]:
    """The figures, inside the page."""
    drawings = {"scaling": (folder / "fig" / "scaling.svg").read_bytes()}
    if own := timed(records):
        drawings["time"] = render(time_figure(own), "svg", "")
    drawings["exponents"] = render(exponents_figure(fit), "svg", "")
    return [Drawing(name, svg, "svg+xml", _CAPTIONS[name]) for name, svg in drawings.items()]


def run_table(records: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """All runs."""
    return SHOWN, [[_shown(key, r.get(key)) for key in SHOWN] for r in records]


def _shown(key: str, value: Any) -> str:
    """A cell for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.4g}" if key == "lr" else f"{value:.3f}" if "loss" in key else f"{value:.2f}"
        )
    return str(value)


def _common_settings(study: Mapping[str, Any]) -> list[list[str]]:
    """Every setting of the runs, with all the values it takes."""
    runs = [run["config"] for run in study.get("runs", [])]
    keys = runs[0] if runs else ()
    return [[key, ", ".join(dict.fromkeys(str(run[key]) for run in runs))] for key in keys]


def _load(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
