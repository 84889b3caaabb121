"""Figures of a scaling study: error against computation, measured seconds, exponents."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from matrigami.plots._reference import read_reference
from matrigami.plots._styles import COLORS, Style, styles
from matrigami.studies import (
    METRICS,
    file_hash,
    fit_results,
    labelled,
    read_results,
    timed,
    write_atomic,
)

LEGEND_INCHES = 1.5
"""Width of one entry of a legend, with the longest usual name."""

LETTER_INCHES = 0.085
"""Width of a letter of a longer one."""

LETTERS_INCHES = 0.6
"""What its letters add to it."""


def plot_study(folder: Path, *, command: str = "", reference: Path | None = None) -> list[Path]:
    """Draw the figures of a study: `fig/scaling.png`, `scaling.svg`, `time.png`, `exponents.png`.

    Each file holds the command line and the hash of `results.csv` in its metadata.

    Args:
        folder: Holds `results.csv`.
        command: Command line to note in the files.
        reference: CSV with published points, drawn with hollow markers; columns `dataset,
            structure, macs` (or `macs_per_example_fwd`) and `train_error, test_error` (or `_pct`).

    Returns:
        The files.

    Raises:
        ValueError: If the results are missing or hold no finished run, or the reference lacks a
            column.
    """
    records = [r for r in labelled(read_results(folder / "results.csv")) if r["status"] == "done"]
    if not records:
        raise ValueError(
            f"Figures of {folder}: its results.csv holds no finished run.\n"
            f"See `matrigami study status {folder}` for the causes."
        )
    figures = _figures(records, reference)
    note = json.dumps({"command": command, "results_sha256": file_hash(folder / "results.csv")})
    (folder / "fig").mkdir(exist_ok=True)
    paths = [folder / "fig" / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_atomic(path, render(figure, path.suffix[1:], note))
    return paths


def _figures(records: Sequence[Mapping[str, Any]], reference: Path | None) -> dict[str, Figure]:
    """The figures of finished runs by the names of their files."""
    fit = fit_results(records)
    published = read_reference(reference) if reference else []
    figures = {
        "scaling.png": scaling_figure(records, fit, published),
        "scaling.svg": scaling_figure(records, fit, published),
    }
    if own := timed(records):  # else side by side on a card
        figures["time.png"] = time_figure(own)
    return figures | {"exponents.png": exponents_figure(fit)}


def scaling_figure(
    records: Sequence[Mapping[str, Any]],
    fit: Mapping[str, Any],
    published: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Error against multiply-adds; train and test side by side; one row for each dataset.

    The legend of a row has the letters of its ranking. A law with an offset is dashed, an error of
    0 stands on the floor, and a dotted line is where structures are ranked.

    Args:
        records: Finished runs.
        fit: From `fit_results`.
        published: Points of others, from `read_reference`.
    """
    datasets = list(fit["datasets"])
    figure = _figure(9.6, 4.6 * len(datasets))
    rows = figure.subfigures(len(datasets), 1, squeeze=False)[:, 0]
    drawn = styles(records)
    for part, dataset in zip(rows, datasets, strict=True):
        axes = part.subplots(1, 2, sharey=True, sharex=True)
        result = fit["datasets"][dataset]
        own = [r for r in records if r["dataset"] == dataset]
        others = [r for r in published if r["dataset"] == dataset]
        for ax, metric in zip(axes, METRICS, strict=True):
            _scatter(ax, own, metric, drawn, result["structures"])
            _hollow(ax, others, metric, drawn)
            if macs := result["compute"][metric]["macs"]:
                ax.axvline(macs, color="0.6", lw=0.9, ls=":", zorder=0)
            _log_axes(ax)
            ax.set_title(f"{dataset}: {metric.split('_')[0]}")
        _dress(axes, result)
        _legend(part, axes[0], figure.get_figwidth(), _key(result, bool(others)), _letters(result))
    return figure


def _dress(axes: np.ndarray, result: Mapping[str, Any]) -> None:
    """Names of the axes, and room for errors of 0."""
    axes[0].set_ylabel("error (%)")
    zeros = [law["zeros"] for both in result["structures"].values() for law in both.values()]
    for ax in axes:
        ax.set_xlabel("multiply-adds of one forward pass of one example")
        if any(zeros):
            ax.margins(y=0.12)  # the lowest positive error stands clear of the floor


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
            ax.plot(x, y, drawn[name].marker, label=name, alpha=0.9, **drawn[name].look(5))
        ax.set_title(dataset)
        ax.set_xlabel("multiply-adds of one forward pass of one example")
        _log_axes(ax)
    axes[0].set_ylabel("seconds of training per million examples")
    _legend(figure, axes[0], figure.get_figwidth())
    return figure


def exponents_figure(fit: Mapping[str, Any]) -> Figure:
    """Exponents with 95 % intervals; train and test; the offset beside the bar if there is one."""
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
            _bars(ax, laws, np.arange(len(names)) + offset, color, metric.split("_")[0])
        ax.set_yticks(range(len(names)), names)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.margins(x=0.22)  # for the words beside the bars
        ax.set_title(dataset)
        ax.legend(frameon=False)
    axes[-1].set_xlabel("exponent a of c · MACs$^{-a}$, or of E + c · MACs$^{-a}$ (95 % interval)")
    return figure


def _bars(
    ax: Axes, laws: Sequence[Mapping[str, Any]], places: np.ndarray, color: str, label: str
) -> None:
    """Exponents as bars with intervals, and in words what a bar does not show."""
    values = np.array([law["exponent"] or 0.0 for law in laws])
    ends = np.array([law["interval"] or (v, v) for law, v in zip(laws, values, strict=True)])
    errors = np.abs(ends.T - values)
    style: dict[str, Any] = {"ecolor": "0.3", "capsize": 2}
    ax.barh(places, values, 0.38, xerr=errors, color=color, label=label, **style)
    for law, place, end in zip(laws, places, ends[:, 1], strict=True):
        if law["interval"] is None:
            text = "not enough sizes" if law["exponent"] is not None else law["reason"]
        else:
            text = f"E = {law['offset']:.3g} %" if law["offset"] else ""
        ax.annotate(
            text.split(",")[0],
            (max(end, 0.0), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="0.3",
        )


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
        look = drawn[name].look(6)
        x = _markers(ax, group, metric, drawn[name].marker, {**look, "label": name})
        law = laws[name][metric]
        if law["exponent"] is not None and len(x):
            at = np.geomspace(x.min(), x.max(), 60)
            ax.plot(
                at,
                law["offset"] + law["prefactor"] * at ** -law["exponent"],
                "--" if law["offset"] else "-",
                color=drawn[name].color,
                lw=1.3,
                alpha=0.8,
            )


def _markers(
    ax: Axes,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    marker: str,
    look: Mapping[str, Any],
) -> np.ndarray:
    """Draw runs, those with an error of 0 on the floor; return the MACs of the others."""
    points = sorted((float(r["macs"]), float(r[metric])) for r in records if r[metric] is not None)
    above = np.array([p for p in points if p[1] > 0]).reshape(-1, 2)
    ax.plot(above[:, 0], above[:, 1], marker, **look)  # an empty one is still in the legend
    floor = ax.get_xaxis_transform()  # MACs, and a share of the height
    zeros = sorted({x for x, y in points if y == 0})
    if zeros:
        silent = {**look, "label": None, "transform": floor, "clip_on": False, "zorder": 3}
        ax.plot(zeros, np.zeros(len(zeros)), marker, **silent)
        ax.annotate("0", (0, 0), (-8, 0), "axes fraction", "offset points", ha="right", va="center")
    return above[:, 0]


def _hollow(
    ax: Axes, points: Sequence[Mapping[str, Any]], metric: str, drawn: Mapping[str, Style]
) -> None:
    """Published points."""
    for name, group in _groups(points):
        if name in drawn:
            look = {"color": drawn[name].color, "mfc": "none", "ms": 6, "alpha": 0.75}
            _markers(ax, group, metric, drawn[name].marker, look)


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
    """200000 as 2e5, 650 as 6.5e2: ticks of a short axis differ in the second digit."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _letters(result: Mapping[str, Any]) -> dict[str, str]:
    """The letters of each structure in train and test error; a dash if it is not ranked."""
    found = {
        metric: {e["structure"]: e["letters"] for e in result["ranking"][metric]}
        for metric in METRICS
    }
    return {
        name: ", ".join(found[metric].get(name) or "–" for metric in METRICS)
        for name in result["structures"]
    }


def _key(result: Mapping[str, Any], published: bool) -> str:
    """What marks and letters mean, as far as they occur."""
    laws = [law for both in result["structures"].values() for law in both.values()]
    ranked = any(result["ranking"].values())
    parts = [
        "hollow: published" if published else "",
        "dashed: with offset E" if any(law["offset"] for law in laws) else "",
        "0: error of 0, not in the fit" if any(law["zeros"] for law in laws) else "",
        "dotted: compared here" if ranked else "not ranked",
        "letters (train, test): a shared one means not told apart" if ranked else "",
    ]
    return "; ".join(part for part in parts if part)


def _legend(
    figure: FigureBase,
    ax: Axes,
    width: float,
    title: str = "",
    marks: Mapping[str, str] | None = None,
) -> None:
    """One legend below all axes of a figure, or of a part of one, `width` inches wide."""
    handles, names = ax.get_legend_handles_labels()
    longest = LETTER_INCHES * max(map(len, names), default=0)
    inches = max(LEGEND_INCHES, longest) + (LETTERS_INCHES if marks else 0.0)
    fitting = int(width / inches)
    figure.legend(
        handles,
        [f"{name} ({marks[name]})" if marks else name for name in names],
        title=title or None,
        loc="outside lower center",
        ncols=max(min(fitting, len(names)), 1),
        frameon=False,
        title_fontsize=9,
        fontsize=9,
    )
