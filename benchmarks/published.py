"""Compare a CIFAR-100 study with the published points, and write its page.

    python -m benchmarks.published runs/cifar100_small docs/results/cifar100_small

copies the results of a finished study, fits and draws them anew and writes `README.md` beside them:
the command, the machine, the order of the structures at equal compute, ours and the published one,
and what `notes.md` beside them says.
"""

import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

import click

from matrigami.plots import plot_study
from matrigami.studies import fit_results, read_results, write_fit

REFERENCE = Path("docs/results/published/mlp_cifar100.csv")
NAMES = {
    "btt": "BTT",
    "monarch": "Monarch",
    "dense": "Dense",
    "lowrank": "LowRank",
    "tt": "TT",
    "kronecker": "Kron",
}
"""The published name of each structure."""


def published_curves(path: Path = REFERENCE) -> dict[str, list[tuple[float, float]]]:
    """Multiply-adds and train error of each published structure, ascending."""
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            point = (float(row["macs_per_example_fwd"]), float(row["train_error_pct"]))
            curves.setdefault(row["structure"], []).append(point)
    return {name: sorted(points) for name, points in curves.items()}


def at(points: list[tuple[float, float]], macs: float) -> float | None:
    """The error at a cost, interpolated in log-log coordinates; None outside the points."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= macs <= x1:
            share = math.log(macs / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return None


def agreement(ours: list[str], theirs: list[str]) -> tuple[int, int]:
    """Pairs of structures in the same order, and pairs in all."""
    pairs = [(a, b) for i, a in enumerate(ours) for b in ours[i + 1 :] if {a, b} <= set(theirs)]
    return sum(theirs.index(a) < theirs.index(b) for a, b in pairs), len(pairs)


def _published_at(macs: float, curves: dict[str, Any]) -> dict[str, float]:
    """The published errors at some multiply-adds, in ascending order."""
    found = {name: at(points, macs) for name, points in curves.items()}
    known = [(error, name) for name, error in found.items() if error is not None]
    return {name: error for error, name in sorted(known, key=lambda pair: pair[0])}


def _line(
    row: dict[str, Any],
    data: dict[str, Any],
    records: list[dict[str, Any]],
    curves: dict[str, Any],
    theirs: dict[str, float],
) -> str:
    """One structure: ours beside the published numbers, which are in ascending order."""
    name = NAMES[row["structure"].split("(")[0]]
    law = data["structures"][row["structure"]]
    test = next(r for r in data["ranking"]["test_error"] if r["structure"] == row["structure"])
    return (
        f"| {row['rank']} {row['letters'] or ''} | `{row['structure']}` "
        f"| {_interval(row)} | {_interval(test)} {test['letters']} "
        f"| {_law(law['train_error'])} | {_slope(curves[name], records, row['structure'])} "
        f"| {_law(law['test_error'])} "
        f"| {law['train_error']['sizes']} | {_seeds(law['train_error'])} "
        f"| {[*theirs].index(name) + 1 if name in theirs else '–'} "
        f"| {f'{theirs[name]:.1f}' if theirs.get(name) else '–'} |"
    )


def page(fit: dict[str, Any], env: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The page of a study: its fits, its environment, its rows of `results.csv`."""
    data = fit["datasets"]["cifar100"]
    macs = data["compute"]["train_error"]["macs"]
    curves = published_curves()
    theirs = _published_at(macs, curves)
    order = list(theirs)
    lines = [_line(row, data, records, curves, theirs) for row in data["ranking"]["train_error"]]
    ours = [NAMES[r["structure"].split("(")[0]] for r in data["ranking"]["train_error"]]
    same, pairs = agreement(ours, order)
    return PAGE.format(
        macs=f"{macs:.2g}",
        header=HEADER,
        rows="\n".join(lines),
        same=same,
        pairs=pairs,
        ours=" < ".join(ours),
        theirs=" < ".join(order),
        runs=len(records),
        epochs=" or ".join(sorted({str(r["epochs"]) for r in records})),
        minutes=f"{sum(float(r['cpu_seconds']) for r in records) / 60:.0f}",
        command=env["command"],
        machine=f"{env['cpu']}, {env['cores']} cores, {env['device']}, {env['workers']} workers",
        versions=", ".join(f"{k} {v}" for k, v in env["versions"].items() if v),
        method=fit["method"],
        seconds="[seconds](fig/time.png), " if any(r.get("seconds") for r in records) else "",
    )


def _slope(curve: list[tuple[float, float]], records: list[dict[str, Any]], structure: str) -> str:
    """Exponent of the published points in the range of our runs, from the plain law."""
    ours = [float(r["macs"]) for r in records if r["structure"] == structure]
    inside = [(x, y) for x, y in curve if 0.8 * min(ours) <= x <= 1.25 * max(ours)]
    if len(inside) < 2:
        return "–"
    x, y = ([math.log(point[i]) for point in inside] for i in range(2))
    return f"{-linear_regression(x, y).slope:.3f} ({len(inside)})"


def _interval(row: dict[str, Any]) -> str:
    """An error and its interval."""
    low, high = row["interval"] or (None, None)
    return f"{row['error']:.1f}" + (f" [{low:.1f}, {high:.1f}]" if low is not None else "")


def _law(law: dict[str, Any]) -> str:
    """An exponent, its interval and the offset, if the law has one."""
    if law["exponent"] is None:
        return "–"
    interval = law["interval"]
    text = f"{law['exponent']:.3f}"
    text += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return text + (f", E = {law['offset']:.1f} (ΔAICc {law['gain']:.1f})" if law["offset"] else "")


def _seeds(law: dict[str, Any]) -> str:
    """Fewest and most seeds of a size."""
    fewest, most = law["seeds"]
    return f"{fewest}" if fewest == most else f"{fewest}–{most}"


HEADER = (
    "| rank | structure | train error % | test error % | train exponent | published "
    "| test exponent | sizes | seeds | rank | % |"
)
PAGE = """# CIFAR-100, MLP, {epochs} epochs

![Train and test error against multiply-adds](fig/scaling.png)

Data: [results.csv](results.csv), [fit.json](fit.json); figures: [scaling](fig/scaling.svg),
{seconds}[exponents](fig/exponents.png),
[with the published points](fig/published.png), which are of 500 epochs.

## Order at equal compute

Errors at {macs} multiply-adds, lower is better; train error on augmented data; 95 % intervals in
brackets; in the last two columns the published rank and train error at the same compute, and behind
our exponents that of the published train errors in the range of our sizes (number of points).
Structures that share a letter are not told apart, in train error by the letters of the rank, in
test error by those behind it. Where AICc prefers a law with an offset, E is what it expects of
infinite compute *in this training*.

{header}
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Ours: {ours}. Published, at the same compute: {theirs}.
{same} of {pairs} pairs of structures are in the same order.

## How it was made

```sh
{command}
python -m benchmarks.published {{study}} {{out}}
```

{runs} runs, {minutes} minutes of processor time, on {machine}; {versions}.

{method}
"""


@click.command()
@click.argument("study", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(study: Path, out: Path) -> None:
    """Write the page of STUDY to the folder OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "env.json"):
        shutil.copy(study / name, out / name)
    fit = fit_results(read_results(study / "results.csv"))
    write_fit(out / "fit.json", fit)
    command = f"python -m benchmarks.published {study} {out}"
    shutil.rmtree(study / "fig", ignore_errors=True)
    plot_study(study, command=command, reference=REFERENCE)
    (out / "fig").mkdir(exist_ok=True)
    shutil.copy(study / "fig" / "scaling.png", out / "fig" / "published.png")
    plot_study(study, command=command)
    shutil.copytree(study / "fig", out / "fig", dirs_exist_ok=True)
    env = json.loads((study / "env.json").read_text("utf-8"))
    with (study / "results.csv").open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    text = page(fit, env, records).replace("{study}", str(study)).replace("{out}", str(out))
    notes = out / "notes.md"
    text += "\n" + notes.read_text("utf-8") if notes.exists() else ""
    (out / "README.md").write_text(text, "utf-8")
    click.echo(f"{out / 'README.md'}")


if __name__ == "__main__":
    main()
