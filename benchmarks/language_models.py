"""Pretrained language models made smaller: rounded, pruned, restructured, and by a budget.

    python -m benchmarks.language_models docs/results/compression --model FOLDER TEXT

FOLDER holds a model of transformers and its tokenizer; `--model` may be given several times. TEXT
is plain or packed by xz. Where it has `<|endoftext|>` it is a set of documents, each read by itself
behind the token that begins a text: calibration draws documents from the front, and the last ones
are held out. Otherwise calibration draws windows from the second half, and the first windows are
held out. Every measurement is a line of `results.csv`, those of the first draw first; what is there
already is not measured again, so that the command may be killed and started again.
"""

import copy
import json
import lzma
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks._compression_page import Row, write_page
from benchmarks._report import append_row, read_rows
from benchmarks._timing import one_thread
from benchmarks._ways import SAMPLES, Calibration, Way, clock_of, ways
from matrigami.compress import evaluate
from matrigami.nn import chosen
from matrigami.studies import environment

LENGTH, CALIBRATION, BATCH = 256, 64, 8
"""Tokens of a calibration sequence, sequences of a calibration, sequences at once."""

DOCUMENTS, DOCUMENT, WINDOWS, WINDOW = 100, 512, 16, 1024
"""What is held out: documents and where they are cut, or windows and their tokens."""

COMMAND = "python -m benchmarks.language_models docs/results/compression --model FOLDER TEXT"
"""As it is told, without the folders of a machine."""


@dataclass(frozen=True)
class Text:
    """Sequences to draw `sequences` from, `(N, LENGTH)`, and batches that are held out."""

    pool: Tensor
    held: list[dict[str, Tensor]]
    sequences: int = CALIBRATION

    def calibration(self, seed: int, samples: int = SAMPLES, batch: int = BATCH) -> Calibration:
        """The draw of a seed, in batches."""
        generator = torch.Generator().manual_seed(seed)
        at = torch.randperm(len(self.pool), generator=generator)[: self.sequences]
        rows = self.pool[at.to(self.pool.device)].split(batch)
        return Calibration(seed, [{"input_ids": ids} for ids in rows], samples)

    def to(self, device: str) -> "Text":
        """The same on a device."""
        held = [{key: t.to(device) for key, t in batch.items()} for batch in self.held]
        return Text(self.pool.to(device), held, self.sequences)


def _ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text alone."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _windows(text: str, tokenizer: Any) -> Text:
    """One long text: windows of the beginning are held out, the second half is to calibrate on."""
    ids = torch.tensor(_ids(text, tokenizer))
    held = ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    pool = ids[len(ids) // 2 :]
    pool = pool[: len(pool) // LENGTH * LENGTH].view(-1, LENGTH)
    return Text(pool, [{"input_ids": row} for row in held.split(1)])


def read_text(path: Path, tokenizer: Any) -> Text:
    """Calibration and held-out sequences of a text."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    if "<|endoftext|>" not in text:
        return _windows(text, tokenizer)
    documents = map(str.strip, text.split("<|endoftext|>")[:-1])  # the last one may be cut
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [first + _ids(d, tokenizer) for d in documents if d]
    front = [row[:LENGTH] for row in rows[: -2 * DOCUMENTS] if len(row) >= LENGTH]
    held = sorted((row[:DOCUMENT] for row in rows[-DOCUMENTS:]), key=len)
    parts = [held[i : i + BATCH] for i in range(0, len(held), BATCH)]
    return Text(torch.tensor(front), list(map(padded, parts)))


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Sequences of unequal length, filled up behind."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def measure(name: str, dense: nn.Module, text: Text, way: Way, data: Calibration) -> Row:
    """Compress a copy and evaluate it."""
    clock, data.owed = clock_of(dense), 0.0
    start = clock()
    made = way.make(copy.deepcopy(dense), data)
    took = clock() - start + data.owed
    weights: Any = chosen(dense, None, ()).values()
    whole = sum(m.weight.numel() for m in weights)
    found = evaluate(made.model, dense, text.held)
    return Row(
        name,
        way.family,
        way.setting,
        way.name,
        data.seed,
        made.nbytes / (4 * whole),
        made.macs / whole,
        found.perplexity,
        found.reference_perplexity,
        found.kl,
        found.agreement,
        took,
        made.note,
    )


@dataclass(frozen=True)
class Plan:
    """What is measured: draws, a choice of ways, the device, and for large models less data."""

    seeds: int
    only: str
    device: str
    sequences: int
    windows: int
    samples: int
    batch: int

    @property
    def told(self) -> list[str]:
        """What is not as it is by default."""
        usual = {
            "sequences": CALIBRATION,
            "windows": WINDOWS,
            "samples": SAMPLES,
            "batch": BATCH,
        }
        return [f"--{k} {getattr(self, k)}" for k, v in usual.items() if getattr(self, k) != v]


def run(folder: Path, text: Path, out: Path, plan: Plan) -> None:
    """All measurements of one model that are lacking."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    done = {row.key for row in read_rows(Row, out / "results.csv")}
    wanted = [
        (way, seed)
        for seed in range(plan.seeds)
        for way in ways(group_of(AutoConfig.from_pretrained(folder).hidden_size))
        if (way.seeded or seed == 0)
        and re.search(plan.only, f"{way.family} {way.setting} {way.name}")
        and (folder.name, way.family, way.setting, way.name, str(seed)) not in done
    ]
    if not wanted:
        return
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(plan.device)
    whole = read_text(text, AutoTokenizer.from_pretrained(folder))
    data = Text(whole.pool, whole.held[: plan.windows], plan.sequences).to(plan.device)
    told = ", ".join([*plan.told, *note_machine(out, folder.name, plan.device)])
    draw = partial(data.calibration, samples=plan.samples, batch=plan.batch)
    drawn = draw(wanted[0][1])
    for i, (way, seed) in enumerate(wanted):
        drawn = drawn if drawn.seed == seed else draw(seed)
        row = measure(folder.name, model, data, way, drawn)
        row = row if row.note else replace(row, note=told)
        append_row(out / "results.csv", row)
        found = f"{way.setting}, {way.name}, seed {seed}: perplexity {row.perplexity:.3f}"
        print(f"{folder.name} {i + 1}/{len(wanted)} {found}, {row.seconds:.0f} s", flush=True)


def group_of(width: int) -> int:
    """Inputs that share a scale: 32 where the model is that narrow, else 64."""
    return 64 if width >= 512 else 32


def note_machine(out: Path, name: str, device: str) -> list[str]:
    """Where a model is measured, into `env.json`; told if others of its rows are from elsewhere."""
    path = out / "env.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    card = {} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}
    told = {"command": COMMAND if device == "cpu" else f"{COMMAND} --device {device}"} | card
    here = environment("cpu", 1, torch.get_num_threads()) | told
    usual = known.get(name, here)["device"] == here["device"]
    where = here["device"] if card else f"a processor, threads: {here['threads']}"
    known[name if usual else f"{name}, {where}"] = here
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    return [] if usual else [where]


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "models", type=(FOLDER, Path), multiple=True, metavar="FOLDER TEXT")
@click.option("--seeds", default=3, show_default=True, help="Draws of the calibration.")
@click.option("--only", default="", help="A regular expression for family, setting and way.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--sequences", default=CALIBRATION, show_default=True, help="Of the calibration.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Draws of labels.")
@click.option("--batch", default=BATCH, show_default=True, help="Sequences at once.")
@click.option("--windows", default=WINDOWS, show_default=True, help="Batches that are held out.")
def main(out: Path, models: tuple[tuple[Path, Path], ...], **options: Any) -> None:
    """Measure what is lacking in OUT/results.csv, and write the page and its figures."""
    one_thread()
    out.mkdir(parents=True, exist_ok=True)
    for folder, text in models:
        run(folder, text, out, Plan(**options))
    write_page(out, read_rows(Row, out / "results.csv"))


if __name__ == "__main__":
    main()
