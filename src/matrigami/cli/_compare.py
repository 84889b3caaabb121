"""`matrigami study compare`: one report of two studies."""

from pathlib import Path

import click

from matrigami.cli._paths import FOLDER
from matrigami.cli._terminal import command_line, echo_json, echo_tables, echo_written


@click.command()
@click.argument("first", type=FOLDER)
@click.argument("second", type=FOLDER)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write the report. [default: print the tables only]",
)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of tables.")
def compare(first: Path, second: Path, out: Path | None, json_: bool) -> int:
    """Compare two studies of the same data: each structure in both, and all in one ranking.

    \b
    Example:
      matrigami study compare runs/adamw runs/soap --out runs/compared
    """
    from matrigami.studies import (
        compare_studies,
        fit_results,
        fit_tables,
        same_structures,
        update_results,
    )

    for folder in (first, second):
        update_results(folder)
    both = compare_studies(first, second)
    fit = fit_results(both.records)
    paths = []
    if out is not None:
        from matrigami.plots import write_comparison

        paths = write_comparison(first, second, out, command=command_line())
    if json_:
        found = {"studies": both.names, "settings": both.settings, **fit}
        echo_json({**found, "files": list(map(str, paths))})
        return 0
    tables = [(*each, []) for each in same_structures(fit, both.names)]
    echo_tables([*tables, *fit_tables(fit)])
    if paths:
        echo_written(paths)
    return 0
