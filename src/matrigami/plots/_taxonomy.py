"""The taxonomy of the einsum family against what a search measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from matrigami.studies.search import NEAR

AXES = {"omega": "sharing ω", "psi": "rank ψ", "nu": "intensity ν"}

MEASURED = {"error": "error % at equal compute", "exponent": "exponent"}

NAMED = {
    "einsum(0, 0, 1, 0, 0, 1, 0)": "dense",
    "einsum(0.5, 0, 0.5, 0, 0.5, 0.5, 0)": "BTT, rank 1",
    "einsum(0.5, 0.5, 0, 0.5, 0.5, 0, 0)": "Kronecker",
    "einsum(1, 0, 0, 0, 1, 0, 0.5)": "low rank",
}
"""Members that have a name."""


def plot_taxonomy(result: Mapping[str, Any], path: Path, *, title: str = "") -> Path:
    """Error at equal compute and exponent of every candidate, against each of the three numbers.

    Args:
        result: From `studies.search.taxonomy`.
        path: The file, `.png` or `.svg`.
        title: Above all.

    Returns:
        The file.
    """
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    for i, (key, what) in enumerate(MEASURED.items()):
        for j, (axis, label) in enumerate(AXES.items()):
            _panel(axes[i][j], result["candidates"], axis, key)
            axes[i][j].set_xlabel(label if i else "")
        axes[i][0].set_ylabel(what)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _is_full(row: Mapping[str, Any]) -> bool:
    """Whether a member shares no weights and has full rank."""
    return row["omega"] < NEAR and row["psi"] > 1 - NEAR


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """One pair of numbers, in two colours."""
    for is_full, color, name in (
        (False, "#56B4E9", "shared weights or low rank"),
        (True, "#D55E00", "ω = 0 and ψ = 1"),
    ):
        some = [r for r in rows if _is_full(r) is is_full]
        places = [r[x] for r in some], [r[y] for r in some]
        ax.scatter(*places, s=34, color=color, alpha=0.75, label=name, linewidths=0)
    for r in rows:
        if name := NAMED.get(r["structure"]):
            ax.annotate(name, (r[x], r[y]), (4, 4), fontsize=7, textcoords="offset points")
    ax.spines[["top", "right"]].set_visible(False)
