"""Write the page of a finished study: its ranking, its seconds, its conclusion, its command.

    python -m benchmarks.study_page runs/gpt_text_small docs/results/gpt_text_small

copies the results, fits and draws them anew and writes `README.md` beside them, with what
`expected.md` and `notes.md` there say.
"""

import json
import shutil
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from matrigami.plots import plot_study
from matrigami.studies import (
    conclusions,
    fit_results,
    fit_tables,
    read_results,
    timed,
    write_fit,
)

SHOWN = ("rank", "structure", "error %", "95 % interval", "exponent", "E %", "sizes", "seeds")
"""Columns of the ranking on the page."""


def page(
    name: str, planned: int, fit: dict[str, Any], env: dict[str, Any], records: list[dict[str, Any]]
) -> str:
    """The page of a study: planned runs, fits, environment, rows of `results.csv`."""
    lines = [f"# {name}", "", "![Error against multiply-adds](fig/scaling.png)", ""]
    lines += ["Written before the run: [expected.md](expected.md).", "", "## In words", ""]
    lines += [f"* {sentence}" for sentence in conclusions(records, fit)]
    for title, header, rows, notes in fit_tables(fit):
        shown = itemgetter(*[header.index(column) for column in SHOWN])
        lines += ["", f"## {title}", "", _table(list(SHOWN), list(map(shown, rows))), "", *notes]
    lines += ["", "## Seconds beside multiply-adds", "", _seconds(records), ""]
    lines += ["## How it was made", ""]
    lines += [
        "```sh",
        env["command"],
        f"python -m benchmarks.study_page runs/{name} docs/results/{name}",
        "```",
        "",
        _made(planned, env, records),
    ]
    return "\n".join(lines) + "\n"


def _on_a_processor(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose seconds are those of one thread of a processor."""
    return [r for r in timed(records) if r["cpu_seconds"] and r.get("device") in (None, "cpu")]


def _made(planned: int, env: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """How many runs, on which machines, for how long."""
    missing = planned - len(records)
    stopped = f" {missing} of the {planned} runs of the preset were not trained." if missing else ""
    own = _on_a_processor(records)
    cpu = sum(r["cpu_seconds"] for r in own)
    others = Counter(str(r.get("machine")) for r in records if r not in own)
    here = f"{len(own)} runs, {cpu / 60:.0f} minutes of processor time, 1 thread of a processor "
    parts = [here + "that also did other work"] if own else []
    parts += [f"{n} runs on {name}, without seconds" for name, n in others.items()]
    versions = ", ".join(f"{key} {value}" for key, value in env["versions"].items())
    return f"{'; '.join(parts)}; {versions}.{stopped}"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    """A table of Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in cells)


def _seconds(records: list[dict[str, Any]]) -> str:
    """Each size: multiply-adds, processor time of a training example, their ratio, errors."""
    own = _on_a_processor(records)
    rows = [
        [
            f"`{r['structure']}`",
            r["width"],
            r["seed"],
            f"{r['macs']:.2e}",
            f"{1e6 * r['cpu_seconds'] / r['examples']:.0f}" if r in own else "",
            f"{3 * r['macs'] * r['examples'] / r['cpu_seconds'] / 1e9:.1f}" if r in own else "",
            f"{r['train_error']:.2f}",
            f"{r['test_error']:.2f}",
            f"{r['test_loss']:.3f}",
        ]
        for r in sorted(records, key=lambda r: (r["structure"], r["macs"], r["seed"]))
        if r["status"] == "done"
    ]
    header = [
        "structure",
        "width",
        "seed",
        "MACs",
        "µs a training example",
        "1e9 MACs a second, forward and backward",
        "train error %",
        "test error %",
        "test loss",
    ]
    return _table(header, rows)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--planned", type=int, help="Runs of the preset. [default: those of the folder]")
def main(folder: Path, out: Path, planned: int | None) -> None:
    """Copy the results of FOLDER to OUT, fit and draw them, write the page."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "env.json"):
        shutil.copy(folder / name, out / name)
    records = read_results(out / "results.csv")
    fit = fit_results(records)
    write_fit(out / "fit.json", fit)
    plot_study(out, command=f"matrigami study plot {out}")
    (out / "fig" / "time.png").unlink(
        missing_ok=True
    )  # wall time, of a machine that may do other work
    env = json.loads((out / "env.json").read_text("utf-8"))
    text = page(out.name, planned or len(records), fit, env, records)
    notes = out / "notes.md"
    said = f"\n{notes.read_text('utf-8')}" if notes.exists() else ""
    (out / "README.md").write_text(text + said, "utf-8")
    click.echo(out / "README.md")


if __name__ == "__main__":
    main()
