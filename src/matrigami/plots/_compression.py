"""Figures of compression: size against quality, and the error of every layer."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from matrigami.plots._scaling import COLORS, MARKERS, render
from matrigami.studies import write_atomic


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
        line = list(some)
        x, y = [p.size for p in line], np.array([p.loss for p in line])
        spread = [y - [p.low for p in line], np.array([p.high for p in line]) - y]
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5}
        ax.errorbar(x, y, np.maximum(spread, 0), lw=1.3, capsize=2, label=name, **look)
    ax.set(xscale="log", yscale="log")
    ticks = sorted({round(p.size, 3) for p in points})
    apart = [t for i, t in enumerate(ticks) if i == 0 or t > 1.13 * ticks[i - 1]]
    ax.set_xticks(apart)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
