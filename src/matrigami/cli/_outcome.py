"""What the commands of a study print: plans, laws, files, failures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from matrigami.cli._terminal import (
    command_line,
    echo_json,
    echo_table,
    echo_tables,
    echo_written,
    say,
)

if TYPE_CHECKING:
    from matrigami.studies import Outcome, StudyPlan


def present(out: Path, outcome: "Outcome", json_: bool) -> int:
    """Fit, figures, report, and what to read."""
    from matrigami.studies import conclusions, fit_results, write_fit

    records = outcome.records
    result = fit_results(records)
    write_fit(out / "fit.json", result)
    figures = _figures(out)
    paths = [out / "results.csv", out / "fit.json", *figures]
    if json_:
        counts = {
            "total": outcome.total,
            "failed": outcome.failed,
            "crashed": outcome.crashed,
            "left": outcome.left,
        }
        fit = json.loads((out / "fit.json").read_text("utf-8"))
        echo_json({**fit, "runs": counts, "files": list(map(str, paths))})
    else:
        echo_fit(result)
        click.echo("\nIn words\n" + "\n".join(f"  {s}" for s in conclusions(records, result)))
        stacked = sum(bool(r.get("stacked")) for r in records)
        if stacked:
            click.echo(f"\n{stacked} of {len(records)} runs were trained as one batch with others.")
        echo_written(paths)
        if figures:
            click.echo(
                f"\nNext: open {out / 'report.html'}, or compare with published points:\n"
                f"  matrigami study plot {out} --reference FILE.csv"
            )
    _echo_failures(outcome)
    return 1 if outcome.crashed or outcome.left else 0


def _figures(out: Path) -> list[Path]:
    """Figures and report; without matplotlib, say how to get them."""
    try:
        from matrigami.plots import plot_study, write_report
    except ModuleNotFoundError as error:
        say(
            f"No figures: {error.name} is not installed. `pip install matplotlib`, then "
            f"`matrigami study report {out}`."
        )
        return []
    figures = plot_study(out, command=command_line())
    return [write_report(out, command=command_line()), *figures]


def _echo_failures(outcome: "Outcome") -> None:
    """How many runs have no result, and why."""
    bad = [r for r in outcome.records if r["status"] != "done"]
    if outcome.left:
        say(f"{outcome.left} runs are in the hands of another process.")
    if bad:
        say(f"{outcome.failed} runs failed, {outcome.crashed} crashed:")
    for r in bad:
        say(
            f"  {r['status']}: {r['id']}, {r['dataset']} {r['structure']} width {r['width']} "
            f"lr {r['lr']:g} seed {r['seed']}: {r.get('cause')}"
        )


def echo_plan(plan: "StudyPlan", json_: bool) -> None:
    """The runs, biggest first."""
    rows = [c.summary | plan.sizes[c.id]._asdict() for c in plan.configs]
    if json_:
        echo_json({"study": plan.name, "runs": rows})
        return
    echo_table(list(rows[0]) if rows else [], [list(row.values()) for row in rows])
    total = sum(size.macs * size.examples for size in plan.sizes.values())
    click.echo(
        f"{plan.name}: {len(rows)} runs, {total:.2e} MACs of forward passes; nothing was trained."
    )


def echo_fit(result: dict[str, Any]) -> None:
    """The laws and the ranking of each dataset."""
    from matrigami.studies import fit_tables

    echo_tables(fit_tables(result))
