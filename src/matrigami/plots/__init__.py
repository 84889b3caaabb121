"""Figures and reports; the only package that imports matplotlib."""

from matrigami.plots._analysis import plot_analysis, plot_gains, write_analysis
from matrigami.plots._comparison import write_comparison
from matrigami.plots._compression import (
    SizePoint,
    plot_layers,
    plot_plan,
    plot_sizes,
    write_compression,
)
from matrigami.plots._curvature import plot_blocks, plot_errors
from matrigami.plots._report import write_report
from matrigami.plots._scaling import plot_study
from matrigami.plots._taxonomy import plot_taxonomy

__all__ = [
    "SizePoint",
    "plot_analysis",
    "plot_blocks",
    "plot_errors",
    "plot_gains",
    "plot_layers",
    "plot_plan",
    "plot_sizes",
    "plot_study",
    "plot_taxonomy",
    "write_analysis",
    "write_comparison",
    "write_compression",
    "write_report",
]
