"""Figures of which structure a matrix has, and the report that holds them.

Structures of scientific computing are drawn in solid, those of deep learning in dashed lines.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from matrigami._pages import Drawing, page
from matrigami.plots._scaling import render
from matrigami.plots._styles import COLORS
from matrigami.studies import Analysis, Finding, write_atomic

LINES = 8
"""Structures in a panel: low rank, and those with the lowest errors."""

DECADES = 3.0
"""Gains beyond ten to this power have one colour."""

DASHES = {"HPC": "-", "AI": "--", "both": ":"}

LEAST = 1e-6
"""Lowest error that is drawn."""

ROWS = 60
"""Most rows of a heat map; of more matrices those with the largest gains."""


def plot_analysis(found: Analysis, path: Path) -> Path:
    """Draw error against storage, ranks of blocks, and singular values of one matrix.

    Args:
        found: The result.
        path: The file, `.png` or `.svg`.

    Returns:
        The file.
    """
    kind = path.suffix.removeprefix(".")
    write_atomic(path, render(_analysis_figure(found), kind, found.verdict))
    return path


def plot_gains(analyses: Sequence[Analysis], path: Path) -> Path:
    """Draw a heat map, matrices by structures, of the logarithm of the gain at the budget.

    Args:
        analyses: The results.
        path: The file, `.png` or `.svg`.

    Returns:
        The file.
    """
    kind = path.suffix.removeprefix(".")
    write_atomic(path, render(_gains_figure(analyses), kind, "gains over null models"))
    return path


def write_analysis(folder: Path, analyses: Sequence[Analysis], *, command: str = "") -> Path:
    """Write `report.html`, one file with all results.

    Args:
        folder: Where; `env.json` is shown if it is there.
        analyses: The results.
        command: Command line to note.

    Returns:
        The file.
    """
    path = folder / "env.json"
    environment = json.loads(path.read_text("utf-8")) if path.exists() else {}
    environment |= {"command": command} if command else {}
    present = sum(a.structure is not None for a in analyses)
    header = ["matrix", "size", "verdict"]
    rows = [[a.name, "x".join(map(str, a.shape)), a.verdict] for a in analyses]
    storage = f"{analyses[0].storages[0]:.0%}"
    heat_map = Drawing(
        "gains",
        render(_gains_figure(analyses), "png", command),
        "png",
        f"Errors of the nearest null model over those of the matrix at {storage} storage, each in "
        "its best order. A dot marks a structure that is present.",
    )
    text = page(
        "analysis.html",
        title=folder.name,
        summary=f"{len(analyses)} matrices, {present} with a structure.",
        verdicts=(header, rows),
        gains=heat_map,
        matrices=list(map(_section, analyses)),
        environment=environment,
    )
    write_atomic(folder / "report.html", text)
    return folder / "report.html"


def _section(found: Analysis) -> dict[str, Any]:
    """One matrix."""
    header = ["structure", "members", "order", "error", "gain", "present", *_metric_names(found)]
    return {
        "name": found.name,
        "verdict": found.verdict,
        "sentences": (*found.evidence, *found.notes),
        "drawing": Drawing(
            found.name,
            render(_analysis_figure(found), "png", ""),
            "png",
            f"{found.name}: error against storage, ranks of blocks, singular values.",
        ),
        "structures": (header, [_row(found, f) for f in found.findings]),
    }


def _metric_names(found: Analysis) -> list[str]:
    """What was measured of members."""
    return list(found.findings[0].metrics) if found.findings else []


def _row(found: Analysis, f: Finding) -> list[str]:
    """One structure of a matrix."""
    members = "best" if f.optimal else "quasi-best"
    numbers = [f"{f.best[0]:.3g}", f"{f.gains[0]:.3g}"]
    measured = [f.metrics.get(name) for name in _metric_names(found)]
    shown = ["inf" if v is None or math.isinf(v) else f"{v:.3g}" for v in measured]
    return [f.label, members, f.ordering, *numbers, "yes" if f.present[0] else "", *shown]


def _analysis_figure(found: Analysis) -> Figure:
    """Three panels."""
    drawing = Figure(figsize=(12, 3.8), layout="constrained")
    curves, blocks, values = drawing.subplots(1, 3, width_ratios=[1.5, 1, 1])
    _draw_curves(curves, found)
    _draw_blocks(blocks, found)
    sigma = np.asarray(found.singular_values)
    place = np.linspace(0, 1, len(sigma))
    values.semilogy(place, np.maximum(sigma, 1e-16), color="black")
    values.set(title="singular values", xlabel="index / count", ylim=(1e-16, 2))
    for ax in (curves, values):
        ax.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(found.verdict, fontsize=10)
    return drawing


def _draw_curves(ax: Axes, found: Analysis) -> None:
    """Error against storage of the nearest structures, and the first one's null model."""
    nearest = sorted(found.findings, key=lambda f: f.best[0])
    low = [f for f in found.findings if f.structure == "low_rank"]
    chosen = [*low, *[f for f in nearest if f.structure != "low_rank"][: LINES - len(low)]]
    for color, f in zip(COLORS, chosen, strict=False):
        curve = f.curves[f.ordering]
        x, y = [0.0, *curve["storage"], 1.0], [1.0, *curve["error"]]
        y = np.maximum([*y, y[-1]], LEAST)
        name = f.label if f.ordering == "given" else f"{f.label}, {f.ordering}"
        ax.step(x, y, where="post", color=color, ls=DASHES[f.world], lw=1.5, label=name)
        null = [min(np.mean(d[i]) for d in f.nulls.values()) for i in range(len(found.storages))]
        ax.plot(found.storages, null, ls="", marker="o", mfc="none", ms=4, color=color)
    ax.axvline(found.storages[0], color="0.8", lw=1, zorder=0)
    ax.set(title="error (circles: nearest null model)", xlabel="storage / dense")
    ax.set(yscale="log", ylim=(LEAST, 1.5), xlim=(0, 0.5))
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_blocks(ax: Axes, found: Analysis) -> None:
    """The rank of each block, as a share of what would store it whole."""
    m, n = found.shape
    patches = [Rectangle((b[1], b[0]), b[3], b[2]) for b in found.blocks]
    colors = [b[4] / max(b[5], 1) for b in found.blocks]
    drawn = PatchCollection(patches, cmap="magma_r", norm=Normalize(0, 1), ec="0.6", lw=0.3)
    drawn.set_array(colors)
    ax.add_collection(drawn)
    ax.set(xlim=(0, n), ylim=(m, 0), xticks=[], yticks=[], aspect=n / m)
    if found.blocks:
        structure, order = found.blocks_of
        ax.set_title(f"ranks of {structure}, {order} order", fontsize=10)
        parent = ax.figure
        parent.colorbar(drawn, ax=ax, shrink=0.7, label="rank / full")


def _mark_present(ax: Axes, analyses: Sequence[Analysis], names: Sequence[str]) -> None:
    """A dot where a structure is present."""
    for i, a in enumerate(analyses):
        for j, name in enumerate(names):
            if a[name].present[0]:
                ax.plot(j, i, marker="o", mfc="white", mec="black", mew=0.5, ms=3.5)


def _gains_figure(analyses: Sequence[Analysis]) -> Figure:
    """The heat map."""
    shown = _largest(analyses)
    names = [f.structure for f in shown[0].findings]
    labels = {f.structure: f.label for f in shown[0].findings}
    gains = np.array([[_log_gain(a[name]) for name in names] for a in shown])
    size = (3.6 + 0.42 * len(names), 1.9 + 0.21 * len(shown))
    drawing = Figure(figsize=size, layout="constrained")
    ax = drawing.subplots()
    image = ax.imshow(gains, cmap="viridis", vmin=0, vmax=DECADES, aspect="auto")
    _mark_present(ax, shown, names)
    ax.set_xticks(range(len(names)), [labels[n] for n in names], rotation=55, ha="right")
    ax.set_yticks(range(len(shown)), [a.name for a in shown], fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    told = f"log10 gain\nat {shown[0].storages[0]:.0%} storage"
    shrink = min(1.0, 10 / len(shown))
    bar = drawing.colorbar(image, ax=ax, shrink=shrink, pad=0.08, extend="max")
    bar.ax.set_title(told, fontsize=8, loc="right")  # above, as few rows are low
    return drawing


def _largest(analyses: Sequence[Analysis]) -> list[Analysis]:
    """The largest of matrices of one kind, "kind · size"; if too many, those with most gain."""
    kinds: dict[str, Analysis] = {}
    for a in analyses:
        kind = a.name.rsplit(" · ", 1)[0]
        if kind not in kinds or math.prod(a.shape) > math.prod(kinds[kind].shape):
            kinds[kind] = a
    by_gain = sorted(kinds.values(), key=lambda a: -max(f.gains[0] for f in a.findings))
    chosen = {a.name for a in by_gain[:ROWS]}
    return [a for a in kinds.values() if a.name in chosen]


def _log_gain(finding: Finding) -> float:
    """Of the budget, none below 1."""
    return math.log10(max(finding.gains[0], 1.0))
