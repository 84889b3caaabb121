"""Figures of curvature: what blocks look like, and how far approximations are from them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from matrigami.curvature import BlockErrors

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
"""One for each approximation, in order (Okabe and Ito 2008)."""


def plot_blocks(
    blocks: Mapping[str, Tensor], path: Path, *, title: str = "", decades: float = 4.0
) -> Path:
    """Draw matrices side by side, the size of their entries on one logarithmic scale.

    Args:
        blocks: Square matrices by name; the first is the exact one, and sets the scale.
        path: The file, `.png` or `.svg`.
        title: Above all.
        decades: Orders of magnitude below the largest entry that are shown.

    Returns:
        The file.
    """
    figure = Figure(figsize=(2.6 * len(blocks) + 0.9, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    top = max(float(next(iter(blocks.values())).abs().max()), 1e-300)
    scale = LogNorm(top * 10**-decades, top, clip=True)
    image = None
    for ax, (name, block) in zip(axes, blocks.items(), strict=True):
        image = ax.imshow(block.abs().numpy(), norm=scale, cmap="magma", interpolation="nearest")
        ax.set_title(name, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    if image is not None:
        figure.colorbar(image, ax=list(axes), shrink=0.8, label="|entry|")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)
    return path


def plot_errors(
    stages: Mapping[str, Sequence[BlockErrors]], path: Path, *, title: str = ""
) -> Path:
    """Draw the Frobenius error of every approximation of every block, a panel for each stage.

    Args:
        stages: Results of `curvature.compare` by name, such as at the start and after training.
        path: The file, `.png` or `.svg`.
        title: Above all.

    Returns:
        The file.
    """
    figure = Figure(figsize=(4.6 * len(stages) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for ax, (name, errors) in zip(axes, stages.items(), strict=True):
        _bars(ax, errors)
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("relative Frobenius error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def _bars(ax: Axes, errors: Sequence[BlockErrors]) -> None:
    """Groups of bars: one group for each block, one bar for each approximation."""
    names = list(dict.fromkeys(e.approximation for e in errors))
    blocks = list(dict.fromkeys(e.block for e in errors))
    height = {(e.block, e.approximation): e.frobenius for e in errors}
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        x = np.arange(len(blocks)) + (i - (len(names) - 1) / 2) * width
        values = [height.get((block, name), math.nan) for block in blocks]
        ax.bar(x, values, width, color=COLORS[i % len(COLORS)], label=name)
    labels = [block[0].removesuffix(".weight") for block in blocks]
    ax.set_xticks(np.arange(len(blocks)), labels, rotation=30, ha="right", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
