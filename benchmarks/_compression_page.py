"""The page of the measurements on language models: tables, figures, and what people wrote.

`expected.md`, written before the run, and `notes.md`, written after it, go around the tables.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks._report import table
from matrigami.plots import SizePoint, plot_sizes

FAMILIES = ("bits", "sparsity", "structure")
"""Those that are drawn."""


@dataclass(frozen=True)
class Row:
    """A measurement on the held-out text; bytes and multiply-adds are shares of the dense ones."""

    model: str
    family: str
    setting: str
    way: str
    seed: int
    bytes: float
    macs: float
    perplexity: float
    dense_perplexity: float
    kl: float
    agreement: float
    seconds: float
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured."""
        return self.model, self.family, self.setting, self.way, str(self.seed)


Group = tuple[tuple[str, str, str, str], list[Row]]
"""A way at a setting, and its rows, one for each seed."""


def write_page(out: Path, rows: Sequence[Row]) -> None:
    """`README.md` and its figures."""
    (out / "fig").mkdir(parents=True, exist_ok=True)
    parts = ["# Language models made smaller", _text(out / "expected.md"), "## Measured"]
    for model, some in _by(rows, "model"):
        parts += _section(out, model, [row for _, group in _by(some, "setting") for row in group])
    made = "\n".join(_machines(json.loads(_text(out / "env.json") or "{}")))
    parts += [_text(out / "notes.md"), f"{ABOUT}\n([env.json](env.json)).\n\n{made}"]
    (out / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", "utf-8")


def _by(rows: Iterable[Row], name: str) -> Iterable[tuple[str, list[Row]]]:
    """Rows of equal value together, in the order in which the values came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(getattr(row, name), []).append(row)
    return found.items()


def _machines(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Where each model was measured."""
    for model, machine in known.items():
        where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        yield f"* {model}: torch {machine['versions']['torch']}, {where}"


def _text(path: Path) -> str:
    """A file, if it is there."""
    return path.read_text("utf-8").strip() if path.exists() else ""


def _section(out: Path, model: str, rows: list[Row]) -> Iterator[str]:
    """One model."""
    groups = list(_groups(rows))
    drawn = [_point(*group) for group in groups if group[0][1] in FAMILIES]
    figure = Path("fig") / f"{model}.png"
    plot_sizes(drawn, out / figure, title=f"{model}: divergence from the dense model, held out")
    yield (
        f"### {model}, perplexity {rows[0].dense_perplexity:.4f}\n\n"
        "Means over draws of the calibration, and the least and largest of them."
    )
    yield f"![Nats a token against bytes, {model}]({figure.as_posix()})"
    yield table(HEAD, [_line(*group) for group in groups if group[0][1] != "budget"])
    yield _told(rows)
    if budgets := [_budget(row) for row in rows if row.family == "budget"]:
        yield table(BUDGET, budgets)


def _told(rows: Iterable[Row]) -> str:
    """What is particular about some measurements; empty if nothing is."""
    noted = [row for row in rows if row.note and row.family != "budget"]
    told = [f"* {row.setting}, {row.way}, draw {row.seed}: {row.note}" for row in noted]
    return "\n".join(["Measured in another way:", "", *told]) if told else ""


HEAD = ("", "way", "draws", "bytes", "MACs", "perplexity", "nats a token", "agreement", "s")
BUDGET = (
    "budget",
    "seed",
    "bytes",
    "perplexity",
    "nats, all held out",
    "predicted",
    "measured in `allocate`",
    "best uniform",
    "its measured",
    "kept",
)


def _groups(rows: Iterable[Row]) -> Iterator[Group]:
    """The rows of each way, in the order in which they came."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.family, row.setting, row.way), []).append(row)
    yield from found.items()


def _line(key: tuple[str, str, str, str], rows: list[Row]) -> list[str]:
    """One way."""
    words = _spread([row.perplexity for row in rows], "{:.3f}")
    size, work, same, took = (
        sum(getattr(row, name) for row in rows) / len(rows)
        for name in ("bytes", "macs", "agreement", "seconds")
    )
    loss = _spread([row.kl for row in rows], "{:.2e}")
    told = [f"{size:.3f}", f"{work:.2f}", words, loss, f"{same:.1%}", f"{took:.0f}"]
    return [key[2], key[3], str(len(rows)), *told]


def _spread(values: list[float], form: str) -> str:
    """The mean, and the range where there is one."""
    mean = form.format(sum(values) / len(values))
    if len(values) < 2:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _point(key: tuple[str, str, str, str], rows: list[Row]) -> SizePoint:
    """One way in the figure: the geometric mean."""
    losses = [row.kl for row in rows]
    series = f"{key[2].split(',')[0]}, {key[3]}" if key[1] == "structure" else key[3]
    if key[2] == "2 of 4":
        series = "both, 2 of 4"
    mean = exp(sum(map(log, losses)) / len(losses))
    return SizePoint(key[1], series, rows[0].bytes, mean, min(losses), max(losses))


def _budget(row: Row) -> list[str]:
    """What `allocate` said, and what came out."""
    told = json.loads(row.note)
    nats = [f"{v:.2e}" for v in (row.kl, told["predicted"], told["measured"])]
    other = told["uniform"].partition(",")[0].replace("(bits=", " ")
    kept = "uniform" if told["fell back"] else "allocated"
    size, words = f"{row.bytes:.3f}", f"{row.perplexity:.3f}"
    uniform = [other, f"{told['uniform measured']:.2e}"]
    return [row.setting, str(row.seed), size, words, *nats, *uniform, kept]


ABOUT = """*nearest*, *magnitude* and *Frobenius* look at the weights alone. *GPTQ* and *SparseGPT*
are the published loops (static order of activity, damping 0.01) on all calibration vectors,
*SVD-LLM* and *KFAC-SVD* the published recipes (damping 0.01; gradient norms within 0.1 and 10 of
the mean, shrinkage 0.3, 0.1). *inputs* and *both* are `compress_`, one-sided and two-sided: a
quarter of their calibration is held out, by which they choose the damping and refuse what is worse
than the simple way, and each layer makes up for half of what the layers before it have changed.
*s* is CPU time of one thread, on a card the time on the clock.

All layers of the blocks are compressed, embedding and head are not. Bytes count scales of 16 bits,
zeros, and a bit for each entry of sparse weights; bytes and multiply-adds are shares of those of
the layers in float32. All numbers: [results.csv](results.csv). Written by
`python -m benchmarks.language_models docs/results/compression --model FOLDER TEXT`"""
