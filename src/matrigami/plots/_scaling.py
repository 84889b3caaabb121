"""Figures of a scaling study: error against computation, measured seconds, exponents.

Colours are those of Okabe and Ito (2008), which people with colour-blindness tell apart; each
structure also has its own marker.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from matrigami.studies import (
    METRICS,
    PowerLaw,
    file_hash,
    fit_results,
    labelled,
    read_results,
    write_atomic,
)

COLORS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#8C6D31",
    "#F0E442",
)
MARKERS = "osD^vP*Xph"

SAME = {
    "btt": "btt(rank=1)",
    "monarch": "monarch(blocks=4)",
    "kron": "kronecker",
    "tt": "tt(rank=16)",
    "dense": "dense",
    "lowrank": "lowrank",
}
"""Names in published tables, in lower case, and what they are here."""


class Style(NamedTuple):
    """How a structure is drawn everywhere."""

    color: str
    marker: str


LEGEND_INCHES = 1.5
"""Width of one entry of a legend, with the longest usual name."""


def plot_study(folder: Path, *, command: str = "", reference: Path | None = None) -> list[Path]:
    """Draw the figures of a study: `fig/scaling.png` and `.svg`, `time.png`, `exponents.png`.

    Each file holds the command line and the hash of `results.csv` in its metadata.

    Args:
        folder: Holds `results.csv`.
        command: Command line to note in the files.
        reference: CSV with published points, drawn with hollow markers; columns `dataset,
            structure, macs` (or
            `macs_per_example_fwd`) and `train_error, test_error` (or with `_pct`).

    Returns:
        The files.

    Raises:
        ValueError: If the results are missing or hold no finished run, or the reference lacks a
            column.
    """
    records = [r for r in labelled(read_results(folder / "results.csv")) if r["status"] == "done"]
    if not records:
        raise ValueError(
            f"Figures of {folder} were asked for.\nIts results.csv holds no finished run.\n"
            f"See `matrigami study status {folder}` for the causes."
        )
    fit = fit_results(records, resamples=1)
    published = read_reference(reference) if reference else []
    figures = {
        "scaling.png": scaling_figure(records, fit, published),
        "scaling.svg": scaling_figure(records, fit, published),
        "time.png": time_figure(records),
        "exponents.png": exponents_figure(fit),
    }
    note = json.dumps({"command": command, "results_sha256": file_hash(folder / "results.csv")})
    (folder / "fig").mkdir(exist_ok=True)
    paths = [folder / "fig" / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_atomic(path, render(figure, path.suffix[1:], note))
    return paths


def styles(records: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """Colour and marker of each structure: dense is black, then in the order of their names."""
    names = sorted({str(r["structure"]) for r in records}, key=lambda name: (name != "dense", name))
    return {
        name: Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def scaling_figure(
    records: Sequence[Mapping[str, Any]],
    fit: Mapping[str, Any],
    published: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Error against multiply-adds; train and test side by side; one row for each dataset.

    Args:
        records: Finished runs.
        fit: From `fit_results`.
        published: Points of others, from `read_reference`.
    """
    datasets = list(fit["datasets"])
    figure = _figure(9.6, 3.9 * len(datasets) + 0.7)
    axes = figure.subplots(len(datasets), 2, squeeze=False, sharey="row", sharex="row")
    drawn = styles(records)
    for row, dataset in zip(axes, datasets, strict=True):
        own = [r for r in records if r["dataset"] == dataset]
        others = [r for r in published if r["dataset"] == dataset]
        for ax, metric in zip(row, METRICS, strict=True):
            _scatter(ax, own, metric, drawn, fit["datasets"][dataset]["structures"])
            _hollow(ax, others, metric, drawn)
            ax.set_title(f"{dataset}: {metric.split('_')[0]}")
            ax.set_xlabel("multiply-adds of one forward pass of one example")
            _log_axes(ax)
        row[0].set_ylabel("error (%)")
    _legend(figure, axes[0][0], bool(published))
    return figure


def time_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Measured seconds of training for a million examples, against multiply-adds."""
    datasets = list(dict.fromkeys(str(r["dataset"]) for r in records))
    figure = _figure(9.6 if len(datasets) > 1 else 5.6, 4.4)
    axes = figure.subplots(1, len(datasets), squeeze=False)[0]
    drawn = styles(records)
    for ax, dataset in zip(axes, datasets, strict=True):
        for name, group in _groups([r for r in records if r["dataset"] == dataset]):
            x, y = zip(
                *sorted((r["macs"], 1e6 * r["seconds"] / r["examples"]) for r in group), strict=True
            )
            ax.plot(x, y, drawn[name].marker, color=drawn[name].color, label=name, ms=5, alpha=0.9)
        ax.set_title(dataset)
        ax.set_xlabel("multiply-adds of one forward pass of one example")
        _log_axes(ax)
    axes[0].set_ylabel("seconds of training per million examples")
    _legend(figure, axes[0], published=False)
    return figure


def exponents_figure(fit: Mapping[str, Any]) -> Figure:
    """Exponents with one standard error; train and test."""
    datasets = fit["datasets"]
    count = max((len(d["structures"]) for d in datasets.values()), default=1)
    figure = _figure(8.0, (0.42 * count + 1.2) * max(1, len(datasets)))
    axes = figure.subplots(max(1, len(datasets)), 1, squeeze=False)[:, 0]
    for ax, (dataset, result) in zip(axes, datasets.items(), strict=False):
        names = sorted(
            result["structures"],
            key=lambda n: result["structures"][n]["train_error"]["exponent"] or 0.0,
        )
        for offset, metric, color in (
            (0.2, "train_error", COLORS[2]),
            (-0.2, "test_error", COLORS[5]),
        ):
            laws = [result["structures"][name][metric] for name in names]
            values = [law["exponent"] or 0.0 for law in laws]
            errors = [law["standard_error"] or 0.0 for law in laws]
            ax.barh(
                np.arange(len(names)) + offset,
                values,
                0.38,
                xerr=errors,
                color=color,
                ecolor="0.3",
                capsize=2,
                label=metric.split("_")[0],
            )
        ax.set_yticks(range(len(names)), names)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.set_title(dataset)
        ax.legend(frameon=False)
    axes[-1].set_xlabel("exponent a of error = c · MACs$^{-a}$ (± one standard error)")
    return figure


def read_reference(path: Path) -> list[dict[str, Any]]:
    """Published points: `dataset, structure, macs, train_error, test_error`, names as here.

    Raises:
        ValueError: If a column is missing.
    """
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    points = []
    for row in rows:
        point = {"dataset": row.get("dataset"), "structure": row.get("structure")}
        for name, spellings in {
            "macs": ("macs", "macs_per_example_fwd"),
            "train_error": ("train_error", "train_error_pct"),
            "test_error": ("test_error", "test_error_pct"),
        }.items():
            point[name] = next((float(row[key]) for key in spellings if row.get(key)), None)
        if any(value is None for value in point.values()):
            raise ValueError(
                f"The reference {path} was asked for.\n"
                "A row lacks one of dataset, structure, macs, train_error, test_error: "
                f"{row}.\n"
                "Give a CSV with these columns."
            )
        point["structure"] = SAME.get(str(point["structure"]).lower(), point["structure"])
        points.append(point)
    return points


def render(figure: Figure, kind: str, note: str) -> bytes:
    """A figure as PNG or SVG bytes, with a note in its metadata."""
    key = "Comment" if kind == "png" else "Description"
    metadata = {key: note} | ({"Date": None} if kind == "svg" else {})
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _scatter(
    ax: Axes,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    drawn: Mapping[str, Style],
    laws: Mapping[str, Any],
) -> None:
    """Runs and fitted lines of all structures."""
    for name, group in _groups(records):
        points = sorted((r["macs"], r[metric]) for r in group if r[metric] > 0)
        if not points:
            continue
        x, y = map(np.array, zip(*points, strict=True))
        law = PowerLaw(**laws[name][metric])
        ax.plot(
            x,
            y,
            drawn[name].marker,
            color=drawn[name].color,
            ms=6,
            mec="white",
            mew=0.5,
            label=name,
        )
        if law.exponent is not None and law.prefactor is not None:
            ends = np.array([x.min(), x.max()])
            ax.plot(
                ends,
                law.prefactor * ends**-law.exponent,
                color=drawn[name].color,
                lw=1.3,
                alpha=0.8,
            )


def _hollow(
    ax: Axes, points: Sequence[Mapping[str, Any]], metric: str, drawn: Mapping[str, Style]
) -> None:
    """Published points."""
    for name, group in _groups(points):
        if name in drawn:
            x, y = zip(*sorted((r["macs"], r[metric]) for r in group), strict=True)
            ax.plot(x, y, drawn[name].marker, color=drawn[name].color, mfc="none", ms=6, alpha=0.75)


def _groups(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Records by structure, in the order of their names."""
    for name in sorted({str(r["structure"]) for r in records}):
        yield name, [r for r in records if r["structure"] == name]


def _log_axes(ax: Axes) -> None:
    """Logarithmic axes; plain numbers on the vertical one, 2e5 on the other."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, label in ((ax.xaxis, _compact), (ax.yaxis, "{:g}".format)):
        low, high = axis.get_view_interval()
        subs = (1.0,) if high > 300 * low else (1.0, 3.0) if high > 30 * low else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _, label=label: label(value)))
        axis.set_minor_formatter(NullFormatter())
    ax.grid(which="major", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _compact(value: float) -> str:
    """200000 as 2e5."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _legend(figure: Figure, ax: Axes, published: bool) -> None:
    """One legend below all axes."""
    handles, labels = ax.get_legend_handles_labels()
    fitting = int(figure.get_figwidth() / LEGEND_INCHES)
    figure.legend(
        handles,
        labels,
        title="hollow: published" if published else None,
        loc="outside lower center",
        ncols=max(min(fitting, len(labels)), 1),
        frameon=False,
        title_fontsize=9,
        fontsize=9,
    )
