r"""The page of the comparison of HPC and AI matrices, from the results of a run.

    matrigami analyze --preset hpc_vs_ai --model stories260k --data-dir data --draws 3 \
      -o runs/hpc_vs_ai
    python -m benchmarks.hpc_vs_ai runs/hpc_vs_ai docs/results/hpc_vs_ai

copies the heat map, the table of gains and the machine, and writes the tables of the page between
its marks; what people wrote around them stays.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import click

from matrigami.studies import Analysis

FILES = ("gains.png", "gains.csv", "env.json")
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
HEADER = ("matrix", "sizes", "verdict at the largest", "gains", "low rank", "HODLR", "alpha")


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("page", type=click.Path(file_okay=False, path_type=Path))
def main(run: Path, page: Path) -> None:
    """Copy the files of RUN and write the tables of the README of PAGE."""
    for name in FILES:
        shutil.copy(run / name, page / name)
    found = results(run)
    readme = page / "README.md"
    text = readme.read_text("utf-8")
    block = re.compile(f"{MARKS[0]}.*?{MARKS[1]}", re.DOTALL)
    lines = "\n".join([MARKS[0], *table(found), "", *orders(found), MARKS[1]])
    readme.write_text(block.sub(lambda _: lines, text), "utf-8")


def results(run: Path) -> dict[str, list[Analysis]]:
    """For each kind of matrix its sizes, the smallest first, in the order of the first table."""
    names = [row[0] for row in csv.reader((run / "gains.csv").read_text("utf-8").splitlines())][1:]
    files = [json.loads(p.read_text("utf-8")) for p in (run / "matrices").glob("*.json")]
    by_name = {f["analysis"]["name"]: Analysis.from_json(f["analysis"]) for f in files}
    kinds: dict[str, list[Analysis]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(name.rsplit(" · ", 1)[0], []).append(by_name[name])
    return kinds


def table(kinds: dict[str, list[Analysis]]) -> Iterable[str]:
    """A row for each kind."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---|---|---|---|--:|--:|--:|"
    for kind, sizes in kinds.items():
        last = sizes[-1]
        shape = ", ".join("x".join(map(str, dict.fromkeys(a.shape))) for a in sizes)
        name = last.structure or "low_rank"
        gains = ", ".join(f"{min(a[name].gains[0], 1e5):.3g}" for a in sizes)
        low, hodlr = (last[s].best[0] for s in ("low_rank", "hodlr"))
        alpha = last.exponents[last["hodlr"].ordering]["weak"]["0.01"]
        shown = "–" if alpha is None else f"{alpha:.2f}"
        yield (
            f"| {kind} | {shape} | {last.verdict} | {gains} | {low:.2g} | {hodlr:.2g} | {shown} |"
        )


def orders(kinds: dict[str, list[Analysis]]) -> Iterable[str]:
    """The error of HODLR at the largest size by the order."""
    names = ("given", "random", "geometric", "pca", "gram", "rcm")
    yield f"| HODLR error, largest size | {' | '.join(names)} |"
    yield f"|---|{'--:|' * len(names)}"
    for kind, sizes in kinds.items():
        errors = sizes[-1]["hodlr"].errors
        cells = [f"{errors[n][0]:.2g}" if n in errors else "–" for n in names]
        yield f"| {kind} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
