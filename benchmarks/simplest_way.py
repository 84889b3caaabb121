"""One budget, spent in every way: a smaller network, structure, bits, sparsity. Which is simplest?

    python -m benchmarks.simplest_way docs/results/simplest_way [--stories FOLDER TEXT]

A perceptron on scikit-learn's digits is trained here. With `--stories` the dense network is the
Llama in FOLDER: what is trained learns from its outputs on TEXT, from a random start or from what
was made of it, for the same number of steps. The budget counts the layers that are compressed, all
but the last, in float32. Finished measurements in `results.csv` are kept.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks._report import append_row, read_rows
from benchmarks._simplest_way_page import BUDGETS, COMMAND, Result, write_page
from benchmarks._timing import one_thread
from benchmarks._ways import GROUP, Calibration, Made, low_rank, monarch, ours, train
from matrigami.compress import Grid, unstructured, weight
from matrigami.nn import chosen, param_groups, replace_
from matrigami.studies import environment

TOKENS = 128
"""Of a sequence that the Llama learns from, or is judged on."""


@dataclass(frozen=True)
class Problem:
    """Data and a family of dense models.

    Attributes:
        name: What it is.
        build: The dense model of which the layers that count have about this share of the weights.
        batches: Training batches of a seed, one a step.
        held: Batches that are held out.
        loss: The loss of a model on a batch that is held out, a mean.
        lesson: What training makes small.
        calibration: Of a draw.
        rates: Learning rates of Adam, from a random start and afterwards.
        tuning: Share of the steps for what is trained afterwards.
        seeds: Starts.
        budgets: Shares.
        given: The dense model, where it is trained already.
    """

    name: str
    build: Callable[[float], nn.Module]
    batches: Callable[[int], list[Any]]
    held: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    lesson: Callable[[nn.Module, Any], Tensor]
    calibration: Callable[[int], Calibration]
    rates: tuple[float, float]
    tuning: float
    seeds: int
    budgets: tuple[float, ...]
    given: nn.Module | None = None


def digits() -> Problem:
    """64-256-256-10 on digits; 500 images are held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 8 - 1
    y = torch.tensor(labels)[order]

    def build(share: float) -> nn.Module:
        """The widest network within the share."""
        most = share * 256 * (64 + 256)
        w = max(w for w in range(8, 257, 8) if w * (64 + w) <= most)
        layers = [nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10)]
        return nn.Sequential(*layers)

    def batches(seed: int) -> list[Any]:
        """400 draws."""
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(x) - 500, (400, 128), generator=generator)
        return [(x[i], y[i]) for i in at]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Of the labels."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return Problem(
        name="digits, perceptron of width 256",
        build=build,
        batches=batches,
        held=[(x[-500:], y[-500:])],
        loss=loss,
        lesson=loss,
        calibration=lambda seed: Calibration(seed, list(x[:-500].split(128))),
        rates=(2e-3, 2e-3 / 3),
        tuning=0.1,
        seeds=3,
        budgets=BUDGETS,
    )


def stories(folder: Path, text: Path, steps: int = 600) -> Problem:
    """A Llama that is given, as the teacher of all that are made of it or like it."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    from benchmarks.language_models import read_text  # noqa: PLC0415

    data = read_text(text, AutoTokenizer.from_pretrained(folder))
    given = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def build(share: float) -> nn.Module:
        """Narrower by the root of the share, heads of one size; the rest goes into the MLP."""
        config = AutoConfig.from_pretrained(folder)
        if share == 1:
            return LlamaForCausalLM(config)  # of random weights
        n, k = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
        budget = share * ((2 + 2 * k) * n**2 + 3 * n * config.intermediate_size)
        size = n // config.num_attention_heads
        config.num_attention_heads = config.num_key_value_heads = int(n * share**0.5 / size)
        config.hidden_size, config.head_dim = size * config.num_attention_heads, size
        rest = budget - 4 * config.hidden_size**2
        config.intermediate_size = int(rest / (3 * config.hidden_size))
        return LlamaForCausalLM(config)

    def batches(seed: int) -> list[Any]:
        """Draws of four sequences."""
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(data.pool), (steps, 4), generator=generator)
        return [{"input_ids": data.pool[i, :TOKENS]} for i in at]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Of the next tokens."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        return model(**batch, labels=labels).loss

    def lesson(model: nn.Module, batch: Any) -> Tensor:
        """The divergence from what is given, a token."""
        with torch.no_grad():
            aim = given(**batch).logits.log_softmax(-1).flatten(0, 1)
        found = model(**batch).logits.log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(found, aim, log_target=True, reduction="batchmean")

    return Problem(
        name=f"{folder.name}, {steps} steps",
        build=build,
        batches=batches,
        held=[{key: t[:, :TOKENS] for key, t in batch.items()} for batch in data.held],
        loss=loss,
        lesson=lesson,
        calibration=data.calibration,
        rates=(1e-2, 3e-3),
        tuning=1.0,
        seeds=1,
        budgets=BUDGETS[:2],
        given=given,
    )


def fit(problem: Problem, model: nn.Module, seed: int, *, afterwards: bool = False) -> int:
    """Adam with a falling rate; afterwards what is zero stays."""
    batches = problem.batches(seed + 1000 * afterwards)
    batches = batches[: round(problem.tuning * len(batches))] if afterwards else batches
    rate = problem.rates[afterwards]
    masks = {p: p != 0 for p in model.parameters() if bool((p == 0).any())} if afterwards else {}
    optimizer = torch.optim.Adam(param_groups(model, rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        problem.lesson(model, batch).backward()
        optimizer.step()
        schedule.step()
        for p, mask in masks.items():
            p.data.mul_(mask)
    model.eval()
    return len(batches)


@torch.no_grad()
def held_out(problem: Problem, model: nn.Module) -> float:
    """The mean loss on batches that were not trained on."""
    return float(torch.stack([problem.loss(model, batch) for batch in problem.held]).mean())


def whole(model: nn.Module) -> int:
    """Weights of the layers that are compressed."""
    return sum(weight(layer).numel() for layer in chosen(model).values())


def within(layer: nn.Module, budget: float) -> tuple[Any, ...]:
    """A block tensor train, Monarch matrices, and low rank; the last alone if no other is small."""
    m, n = weight(layer).shape
    low = low_rank(m, n, budget)
    try:
        return (train(m, n, budget), *monarch(m, n, budget), low)
    except ValueError:
        return (low,)


def narrower(problem: Problem, _dense: nn.Module, seed: int, budget: float) -> tuple[Made, int]:
    """A smaller dense model, trained."""
    torch.manual_seed(seed)
    model = problem.build(budget)
    steps, size = fit(problem, model, seed), whole(model)
    return Made(model, 4 * size, size), steps


def trained_in(problem: Problem, _dense: nn.Module, seed: int, budget: float) -> tuple[Made, int]:
    """A block tensor train for each layer, or low rank if none is small enough; a random start."""
    torch.manual_seed(seed)
    model = problem.build(1.0)
    recipes = {name: within(layer, budget)[0] for name, layer in chosen(model).items()}
    done = replace_(model, recipes, init="random")
    size = sum(layer.macs[1] for layer in done.layers)
    return Made(model, 4 * size, size), fit(problem, model, seed)


def projected(problem: Problem, dense: nn.Module, seed: int, budget: float) -> tuple[Made, int]:
    """The nearest of a block tensor train, Monarch matrices and low rank, in both moments."""
    recipes = {name: within(layer, budget) for name, layer in chosen(dense).items()}
    return ours(recipes, dense, problem.calibration(seed), two_sided=True), 0


def rounded(problem: Problem, dense: nn.Module, seed: int, budget: float) -> tuple[Made, int]:
    """The most bits within the budget, scales counted; 8 at most."""
    bits = max(b for b in range(2, 9) if b + (16 + b) / GROUP <= 32 * budget)
    grid = Grid(bits, GROUP, symmetric=False)
    return ours(grid, dense, problem.calibration(seed), two_sided=True), 0


def pruned(problem: Problem, dense: nn.Module, seed: int, budget: float) -> tuple[Made, int]:
    """As many weights as the budget pays with a bit for each entry."""
    support = unstructured(1 - (budget - 1 / 32))
    return ours(support, dense, problem.calibration(seed), two_sided=True), 0


def and_tuned(make: Callable[..., tuple[Made, int]], problem: Problem, *args: Any) -> Any:
    """The same, trained afterwards."""
    made, _ = make(problem, *args)
    return made, fit(problem, made.model, args[1], afterwards=True)


WAYS: dict[str, Callable[..., tuple[Made, int]]] = {
    "a narrower dense network": narrower,
    "structure, trained in": trained_in,
    "structure, projected": projected,
    "structure, projected, then trained": partial(and_tuned, projected),
    "bits": rounded,
    "sparsity": pruned,
    "sparsity, then trained": partial(and_tuned, pruned),
}


def run(problem: Problem, done: set[Any]) -> Iterator[Result]:
    """All measurements of one problem that are lacking."""
    for seed in range(problem.seeds):
        keys = [(problem.name, b, way, seed) for b in problem.budgets for way in WAYS]
        dense_key = (problem.name, 1.0, "dense", seed)
        if {dense_key, *keys} <= done:
            continue
        torch.manual_seed(seed)
        start = time.process_time()
        dense = problem.build(1.0) if problem.given is None else problem.given
        steps = fit(problem, dense, seed) if problem.given is None else 0
        took = time.process_time() - start
        if dense_key not in done:
            yield Result(*dense_key, 1.0, 1.0, held_out(problem, dense), steps, took)
        for key in keys:
            if key not in done:
                yield measured(problem, dense, key)


def measured(problem: Problem, dense: nn.Module, key: tuple[str, float, str, int]) -> Result:
    """One way."""
    _, budget, way, seed = key
    start = time.process_time()
    made, steps = WAYS[way](problem, copy.deepcopy(dense), seed, budget)
    took, size = time.process_time() - start, whole(dense)
    loss = held_out(problem, made.model)
    return Result(*key, made.nbytes / (4 * size), made.macs / size, loss, steps, took)


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stories", "text", type=(FOLDER, Path), metavar="FOLDER TEXT")
@click.option("--page-only", is_flag=True, help="Measure nothing.")
def main(out: Path, text: tuple[Path, Path] | None, page_only: bool) -> None:
    """Measure what is lacking in OUT/results.csv, and write the page."""
    one_thread()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.csv"
    for make in [] if page_only else [digits, *([partial(stories, *text)] if text else [])]:
        for result in run(make(), {r.key for r in read_rows(Result, path)}):
            append_row(path, result)
            print(*asdict(result).values(), flush=True)
        machine = environment("cpu", 1, torch.get_num_threads()) | {"command": COMMAND}
        (out / "env.json").write_text(json.dumps(machine, indent=1) + "\n", "utf-8")
    write_page(out, read_rows(Result, path), WAYS)


if __name__ == "__main__":
    main()
