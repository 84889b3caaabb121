"""One report of two studies: their runs in the same figures and tables."""

from pathlib import Path
from typing import Any

from matrigami._pages import Drawing, page
from matrigami.plots._report import run_table, summary_of
from matrigami.plots._scaling import exponents_figure, render, scaling_figure, time_figure
from matrigami.studies import (
    Comparison,
    compare_studies,
    conclusions,
    fit_results,
    fit_tables,
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
            f"compare {first} {second}: neither has a finished run.\n"
            f"See `matrigami study status {first}`."
        )
    fit = fit_results(both.records)
    (out / "fig").mkdir(parents=True, exist_ok=True)
    report, image = out / "compare.html", out / "fig" / "compare.png"
    write_atomic(image, render(scaling_figure(good, fit), "png", command))
    write_atomic(report, _report(both, good, fit))
    return [report, image]


def _report(both: Comparison, good: list[dict[str, Any]], fit: dict[str, Any]) -> str:
    """The report."""
    same = [(*each, []) for each in same_structures(fit, both.names)]
    settings = [[key, *values] for key, values in both.settings.items()]
    env = {
        f"{key} ({name})": value
        for name, each in zip(both.names, both.environments, strict=True)
        for key, value in each.items()
    }
    return page(
        "report.html",
        title=" and ".join(both.names),
        summary=summary_of(both.records),
        ranking=[*same, *fit_tables(fit)],
        method=fit["method"],
        figures=_figures(good, fit),
        runs=run_table(both.records),
        words=conclusions(both.records, fit),
        settings=(["setting that differs", *both.names], settings),
        environment=env,
    )


def _figures(good: list[dict[str, Any]], fit: dict[str, Any]) -> list[Drawing]:
    """The figures, inside the page."""
    drawings = {"scaling": scaling_figure(good, fit)}
    if own := timed(good):
        drawings["time"] = time_figure(own)
    drawings["exponents"] = exponents_figure(fit)
    return [
        Drawing(name, render(drawing, "svg", ""), "svg+xml", _CAPTIONS[name])
        for name, drawing in drawings.items()
    ]
