"""The page of `benchmarks.simplest_way`, and the rows that it is made of."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks._report import table

BUDGETS = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Result:
    """One model: what it stores and multiplies, of the dense one, and its loss held out."""

    problem: str
    budget: float
    way: str
    seed: int
    bytes: float
    macs: float
    loss: float
    steps: int
    seconds: float

    @property
    def key(self) -> tuple[str, float, str, int]:
        """What was measured."""
        return self.problem, self.budget, self.way, self.seed


def section(name: str, results: list[Result], ways: Iterable[str]) -> str:
    """The table of one problem."""
    rows = []
    order = [(1.0, "dense"), *((b, way) for b in BUDGETS for way in ways)]
    results = sorted(results, key=lambda r: order.index((r.budget, r.way)))
    for (budget, way), some in groupby(results, key=lambda r: (r.budget, r.way)):
        group = list(some)
        losses = [r.loss for r in group]
        size, work, took = (
            sum(getattr(r, field) for r in group) / len(group)
            for field in ("bytes", "macs", "seconds")
        )
        mean = sum(losses) / len(losses)
        spread = f"{mean:.4f} ({min(losses):.4f} to {max(losses):.4f})"
        cells = [f"{size:.3f}", f"{work:.3f}", spread, group[0].steps, f"{took:.1f}"]
        rows.append([f"{budget:g}x", way, *cells])
    head = ("budget", "way", "bytes", "MACs", "nats, held out", "steps", "CPU s")
    return f"### {name}\n\n{table(head, rows)}"


def write_page(out: Path, results: list[Result], ways: Iterable[str]) -> None:
    """`README.md`."""
    texts = [(out / name) for name in ("expected.md", "notes.md")]
    before, after = (p.read_text("utf-8").strip() if p.exists() else "" for p in texts)
    names = dict.fromkeys(r.problem for r in results)
    tables = [section(name, [r for r in results if r.problem == name], ways) for name in names]
    machine = json.loads((out / "env.json").read_text("utf-8"))
    made = f"with torch {machine['versions']['torch']} on {machine['cpu']}"
    parts = [TITLE, before, "## Measured", *tables, ABOUT, after, f"{END} {made}."]
    (out / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", "utf-8")


TITLE = """# One budget, spent in every way

What is the simplest way to a smaller model: a smaller network, structure that is trained in,
structure projected afterwards, fewer bits, or fewer weights?"""

ABOUT = """Bytes and multiply-adds are shares of those of the dense layers in float32; scales of 16
bits and a bit for each entry of sparse weights are counted. *steps* are those of training that the
way needs itself: where there are none, or it is *then trained*, the dense network of the first line
is needed too. Means over all starts, and the least and largest.

*Trained in* is a block tensor train, or low rank where no train is so small; *projected* takes the
nearest of a train, Monarch matrices and low rank in both moments; *bits* and *sparsity* are
`compress_`, two-sided."""

COMMAND = "python -m benchmarks.simplest_way docs/results/simplest_way --stories FOLDER TEXT"

END = f"""All numbers: [results.csv](results.csv). Written by
`{COMMAND}`"""
