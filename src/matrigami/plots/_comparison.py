"""One report of two studies: their runs in the same figures and tables."""

import html
from pathlib import Path
from typing import Any

from matrigami.plots._page import figure, filled, mapping, table
from matrigami.plots._report import run_table, summary_of, tables_of, words_of
from matrigami.plots._scaling import exponents_figure, render, scaling_figure, time_figure
from matrigami.studies import (
    Comparison,
    compare_studies,
    fit_results,
    same_structures,
    timed,
    write_atomic,
)

_CAPTIONS = {
    "scaling": "Error against multiply-adds of both studies; full markers are those of the first, "
    "hollow ones those of the second, of one colour for each structure. Lines are fitted laws.",
    "time": "Measured seconds of training. Only seconds of one machine can be compared.",
    "exponents": "Exponents with 95 % intervals; those with and without an offset E are not "
    "comparable.",
}


def write_comparison(first: Path, second: Path, out: Path, *, command: str = "") -> list[Path]:
    """Write `compare.html` and `fig/compare.png` of two study folders.

    Args:
        first: A folder with `results.csv`.
        second: Another one.
        out: Where to write; made if absent.
        command: Command line to note in the figure.

    Returns:
        The files.

    Raises:
        ValueError: If results are missing, no dataset is in both, or no run has ended.
    """
    both = compare_studies(first, second)
    good = [r for r in both.records if r["status"] == "done"]
    if not good:
        raise ValueError(
            f"{first} and {second} were to be compared.\nNeither has a finished run.\n"
            f"See `matrigami study status {first}`."
        )
    fit = fit_results(both.records)
    (out / "fig").mkdir(parents=True, exist_ok=True)
    page, image = out / "compare.html", out / "fig" / "compare.png"
    write_atomic(image, render(scaling_figure(good, fit), "png", command))
    write_atomic(page, _page(both, good, fit))
    return [page, image]


def _page(both: Comparison, good: list[dict[str, Any]], fit: dict[str, Any]) -> str:
    """The report."""
    same = [
        f"<h3>{html.escape(title)}</h3>\n{table(header, rows)}"
        for title, header, rows in same_structures(fit, both.names)
    ]
    settings = [[key, *values] for key, values in both.settings.items()]
    env = {
        f"{key} ({name})": value
        for name, each in zip(both.names, both.environments, strict=True)
        for key, value in each.items()
    }
    return filled(
        "report.html",
        title=html.escape(" and ".join(both.names)),
        summary=summary_of(both.records),
        ranking="\n".join([*same, tables_of(fit)]),
        method=html.escape(str(fit["method"])),
        figures=_figures(good, fit),
        runs=run_table(both.records),
        words=words_of(both.records, fit),
        settings=table(["setting that differs", *both.names], settings),
        environment=mapping(env),
    )


def _figures(good: list[dict[str, Any]], fit: dict[str, Any]) -> str:
    """The figures, inside the page."""
    drawings = {"scaling": scaling_figure(good, fit)}
    if own := timed(good):
        drawings["time"] = time_figure(own)
    drawings["exponents"] = exponents_figure(fit)
    return "\n".join(
        figure(name, render(drawing, "svg", ""), "svg+xml", _CAPTIONS[name])
        for name, drawing in drawings.items()
    )
