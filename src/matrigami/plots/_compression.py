"""Figures of compression: size against quality, and the error of every layer."""

import itertools
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from matrigami._pages import Drawing, page
from matrigami.compress import CompressionPlan, Option, Report, knapsack
from matrigami.plots._scaling import render
from matrigami.plots._styles import COLORS, MARKERS
from matrigami.studies import environment, write_atomic

ROOM = 1.06
"""Beside the first and the last point."""

STEPS = 25
"""Sizes at which the best mixture is drawn."""


class SizePoint(NamedTuple):
    """A compressed model in a figure.

    Attributes:
        panel: Where it is drawn.
        series: The line that it is on.
        size: Share of what the dense layers store.
        loss: What is lost, such as nats a token: the mean of some runs.
        low: The least of them.
        high: The largest of them.
    """

    panel: str
    series: str
    size: float
    loss: float
    low: float
    high: float


def plot_sizes(
    points: Sequence[SizePoint], path: Path, *, title: str = "", label: str = "nats a token"
) -> Path:
    """Draw what is lost against what is stored, both on logarithmic scales; a panel each.

    Args:
        points: The models; points of a series are joined.
        path: The file, `.png` or `.svg`.
        title: Above all.
        label: What is lost.

    Returns:
        The file.
    """
    names = list(dict.fromkeys(p.panel for p in points))
    drawing = Figure(figsize=(3.7 * len(names) + 0.8, 4.4), layout="constrained")
    axes = drawing.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, names, strict=True):
        _draw_series(ax, [p for p in points if p.panel == name])
        ax.set(title=name, xlabel="bytes / dense")
    axes[0].set_ylabel(label)
    drawing.suptitle(title, fontsize=10)
    write_atomic(path, render(drawing, path.suffix.removeprefix("."), title))
    return path


def _draw_series(ax: Axes, points: Sequence[SizePoint]) -> None:
    """The lines of one panel."""
    order = list(dict.fromkeys(p.series for p in points))
    by_series = sorted(points, key=lambda p: (order.index(p.series), p.size))
    for i, (name, some) in enumerate(groupby(by_series, key=lambda p: p.series)):
        x, y, low, high = np.array([(p.size, p.loss, p.low, p.high) for p in some]).T
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5}
        spread = np.maximum([y - low, high - y], 0)
        ax.errorbar(x, y, spread, lw=1.3, capsize=2, label=name, **look)
    ax.set(xscale="log", yscale="log")
    ticks = sorted({round(p.size, 3) for p in points})
    apart = [t for i, t in enumerate(ticks) if i == 0 or t > 1.13 * ticks[i - 1]]
    ax.set_xlim(ticks[0] / ROOM, ticks[-1] * ROOM)
    ax.set_xticks(apart)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)


def plot_layers(report: Report, path: Path, *, title: str = "") -> Path:
    """Draw the error of every layer, beside that of the simple method, and what is stored of it.

    Args:
        report: What was done with a model.
        path: The file, `.png` or `.svg`.
        title: Above all.

    Returns:
        The file.
    """
    write_atomic(path, render(_layers_figure(report, title), path.suffix[1:], title))
    return path


def plot_plan(plan: CompressionPlan, path: Path, *, title: str = "") -> Path:
    """Draw what a plan predicts: by size for the whole model, and for every layer.

    The line is the best mixture of the methods under each size, by the knapsack of `allocate`.

    Args:
        plan: What each method would cost.
        path: The file, `.png` or `.svg`.
        title: Above all.

    Returns:
        The file.
    """
    write_atomic(path, render(_plan_figure(plan, title), path.suffix[1:], title))
    return path


def write_compression(path: Path, found: Report | CompressionPlan, *, command: str = "") -> Path:
    """Write a page with the figures and the table of a compression, or of a plan.

    Args:
        path: The file, `.html`.
        found: What was done, or what it would cost.
        command: Command line to note.

    Returns:
        The file.
    """
    planned = isinstance(found, CompressionPlan)
    drawn = _plan_figure(found, "") if planned else _layers_figure(found, "")
    count = len(found.options) if planned else len(found.layers)
    what = "planned, nothing changed" if planned else "compressed"
    text = page(
        "compression.html",
        title=path.parent.name or path.stem,
        summary=f"{count} layers {what}. {command}",
        drawing=Drawing("layers", render(drawn, "png", command), "png", CAPTIONS[planned]),
        layers=_plan_table(found) if planned else _report_table(found),
        method=METHODS[planned],
        environment=environment("cpu", 1, torch.get_num_threads()),
    )
    write_atomic(path, text)
    return path


CAPTIONS = {
    False: "Relative error of every layer on held-out vectors, of the method that was used and of "
    "the simple one, and stored bits of a weight.",
    True: "Left, the predicted rise of the loss against stored bytes: each method everywhere, and "
    "the best mixture at each size. Right, the prediction for each layer.",
}
METHODS = {
    False: "Errors are tr(B E A E') / tr(B W A W') with the error E of the weights W and the "
    "second moment A of inputs that were held out; B is that of the output gradients where both "
    "sides count, else the identity. The simple method is rounding to nearest, removal by "
    "magnitude, or projection without a metric.",
    True: "The prediction is tr(B E A E') / 2, the divergence from the model in nats a token to "
    "second order: good for small errors, too low for large ones. It adds over layers.",
}


def _layers_figure(report: Report, title: str) -> Figure:
    """Errors above, bits below."""
    count = len(report.layers)
    drawing = Figure(figsize=(max(6.0, 0.17 * count + 2), 5.4), layout="constrained")
    errors, bits = drawing.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    x = np.arange(count)
    for i, (name, key) in enumerate({"simple": "simple", "this method": "loss"}.items()):
        values = [getattr(layer, key) for layer in report.layers]
        errors.plot(x, values, ls="", marker=MARKERS[i], ms=5, color=COLORS[i], label=name)
    errors.set(yscale="log", ylabel="relative error, held out")
    errors.legend(fontsize=8, frameon=False)
    bits.bar(x, [layer.bits for layer in report.layers], color=COLORS[2])
    bits.set_ylabel("bits a weight")
    names = _apart([layer.name for layer in report.layers])
    bits.set_xticks(x, names, rotation=90, fontsize=7)
    for ax in (errors, bits):
        ax.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(title, fontsize=10)
    return drawing


def _plan_figure(plan: CompressionPlan, title: str) -> Figure:
    """Sizes on the left, layers on the right."""
    count = len(plan.options)
    drawing = Figure(figsize=(max(9.0, 0.15 * count + 6), 5.0), layout="constrained")
    sizes, layers = drawing.subplots(1, 2, width_ratios=[1, max(1.0, count / 40)])
    dense = sum(nbytes for nbytes, _ in plan.dense.values())
    for i, name in enumerate(plan.methods):
        look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "ls": "", "ms": 6}
        look["marker"] = MARKERS[i % len(MARKERS)]
        total = plan.total(i)
        if total is not None:
            sizes.plot(total.nbytes / dense, total.predicted, label=_short(name), **look)
        layers.plot(*_by_layer(plan, i), **look)
    if line := list(frontier(plan)):
        sizes.plot(*zip(*line, strict=True), color="0.6", lw=1.2, zorder=0, label="best mixture")
    sizes.set(xscale="log", yscale="log", xlabel="bytes / dense", ylabel="predicted nats a token")
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    sizes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    sizes.tick_params(axis="x", which="both", labelsize=8)
    sizes.legend(fontsize=7, frameon=False)
    layers.set_xticks(range(count), _apart(list(plan.options)), rotation=90, fontsize=7)
    layers.set(yscale="log", ylabel="predicted nats, of the layer alone")
    for ax in (sizes, layers):
        ax.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(title, fontsize=10)
    return drawing


def _by_layer(plan: CompressionPlan, method: int) -> tuple[list[int], list[float]]:
    """Where a method has a prediction among the layers, and which."""
    options = itertools.chain.from_iterable(plan.options.values())
    found = {o.layer: o.predicted for o in options if o.index == method}
    return [j for j, layer in enumerate(plan.options) if layer in found], list(found.values())


def _known_sizes(options: Sequence[Option]) -> list[float]:
    """Bytes of the options of a layer that have a prediction."""
    return [o.nbytes for o in options if o.predicted >= 0]


def frontier(plan: CompressionPlan) -> Iterator[tuple[float, float]]:
    """Share of the bytes and predicted loss of the best mixtures, from the least size to the most.

    Nothing if a layer has no prediction.
    """
    dense = sum(nbytes for nbytes, _ in plan.dense.values())
    known = [_known_sizes(some) for some in plan.options.values()]
    if not all(known):
        return
    least, most = sum(map(min, known)), sum(map(max, known))
    for limit in np.geomspace(1.001 * least, 1.02 * most, STEPS):
        picked = knapsack(plan, lambda o: o.nbytes, float(limit), "")
        yield sum(o.nbytes for o in picked) / dense, sum(o.predicted for o in picked)


def _apart(names: list[str]) -> list[str]:
    """Names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]


def _short(method: str) -> str:
    """A method in a legend."""
    return method if len(method) < 30 else method[:27] + "..."


def _report_table(report: Report) -> tuple[list[str], list[list[Any]]]:
    """What was done with each layer."""
    header = [
        "layer",
        "method",
        "rows",
        "damping",
        "error",
        "simple",
        "ratio",
        "bits",
        "MACs",
        "note",
    ]
    rows = [
        [
            r.name,
            r.method,
            r.rows,
            f"{r.damping:g}",
            f"{r.loss:.3g}",
            f"{r.simple:.3g}",
            f"{r.loss / r.simple:.2f}" if r.simple else "",
            f"{r.bits:.2f}",
            r.macs,
            r.note,
        ]
        for r in report.layers
    ]
    return header, rows


def _plan_table(plan: CompressionPlan) -> tuple[list[str], list[list[Any]]]:
    """What each method would do to each layer."""
    header = ["layer", "method", "predicted nats", "error", "bytes", "of dense", "MACs"]
    rows = [
        [
            o.layer,
            o.method,
            f"{o.predicted:.3g}",
            f"{o.loss:.3g}",
            f"{o.nbytes:.0f}",
            f"{o.nbytes / plan.dense[o.layer][0]:.3f}",
            o.macs,
        ]
        for some in plan.options.values()
        for o in some
    ]
    return header, rows
