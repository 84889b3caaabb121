"""How well influence scores foretell what happens when half of the data is left out.

    python -m benchmarks.influence docs/results/influence_digits

The linear datamodeling score (Park et al. 2023, arXiv:2303.14186): many networks are trained, each
on a random half of scikit-learn's digits, and for every query Spearman's correlation is taken over
the halves between its loss and the sum of the scores of the examples that were left out. The mean
over the queries is 1 for a perfect ranking. Every half is trained from several starts, whose losses
are averaged; so is the score of each approximation over models trained on all of the data.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks._report import table
from matrigami.curvature import ekfac, ggn, influence, kfac, kfoc
from matrigami.operators import DenseMatrix, identity
from matrigami.studies import environment

WIDTH, STEPS, LR, DECAY = 24, 300, 5e-3, 1e-3
"""64-24-24-10 with tanh, full-batch Adam, weight decay as a part of the loss."""

TRAIN, QUERIES, HALVES, STARTS = 600, 150, 60, 4
DAMPINGS = (0.01, 0.1, 1.0)

Methods = dict[str, Callable[..., Any]]


def network(seed: int) -> nn.Module:
    """A start."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, 10),
    )


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training examples and queries."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    stop = TRAIN + QUERIES
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:stop], y[TRAIN:stop])


def trained(models: list[nn.Module], weights: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """All models at once, each on its own weights of the examples: the stacked parameters."""
    stacked, _ = stack_module_state(models)  # pyright: ignore[reportArgumentType]
    at = {name: t.detach().requires_grad_() for name, t in stacked.items()}
    base = network(0)

    def objective(w: dict[str, Tensor], share: Tensor) -> Tensor:
        """The loss of one model."""
        losses = nn.functional.cross_entropy(functional_call(base, w, (x,)), y, reduction="none")
        size = sum((t.square().sum() for t in w.values()), torch.zeros(()))
        return (share * losses).sum() / share.sum() + DECAY / 2 * size

    slopes = vmap(grad(objective))
    optimizer = torch.optim.Adam(at.values(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        for name, slope in slopes(at, weights).items():
            at[name].grad = slope
        optimizer.step()
        schedule.step()
    return {name: t.detach() for name, t in at.items()}


def query_losses(at: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of every query in every model."""
    base = network(0)
    outputs = vmap(lambda w: functional_call(base, w, (x,)))(at)
    each = partial(nn.functional.cross_entropy, reduction="none")
    return vmap(lambda f: each(f, y))(outputs)


def methods() -> Methods:
    """The curvatures, by name; the identity is the product of plain gradients."""
    return {
        "identity": lambda model, *_: identity(
            sum(p.numel() for p in model.parameters()), dtype=torch.float64
        ),
        "K-FAC": kfac,
        "EKFAC": ekfac,
        "KFOC": kfoc,
        "KFOC corrected": partial(ekfac, basis=kfoc),
        "exact": lambda *task: DenseMatrix(ggn(*task).dense()),
    }


def scores(
    models: list[nn.Module], make: Callable[..., Any], train: Any, queries: Any
) -> Iterator[Tensor]:
    """The mean scores of some models, for each damping."""
    loss = nn.CrossEntropyLoss()
    curvatures = [make(model, loss, train) for model in models]
    for damping in DAMPINGS:
        found = [
            influence(F, model, loss, queries, train, damping=damping)
            for F, model in zip(curvatures, models, strict=True)
        ]
        yield torch.stack(found).mean(0)


def agreement(score: Tensor, left_out: Tensor, losses: Tensor) -> float:
    """The linear datamodeling score."""
    return spearman(score @ left_out.mT, losses.mT)


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks in each row, on average over the rows."""
    ranks = torch.stack([t.argsort(1).argsort(1).double() for t in (a, b)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    x, y = ranks / ranks.norm(dim=-1, keepdim=True)
    return float((x * y).sum(-1).mean())


def _whole_models(train: tuple[Tensor, ...]) -> list[nn.Module]:
    """A model from each start, trained on all examples."""
    models = [network(seed) for seed in range(STARTS)]
    whole = trained([network(seed) for seed in range(STARTS)], torch.ones(STARTS, TRAIN), *train)
    for i, model in enumerate(models):
        model.load_state_dict({name: t[i] for name, t in whole.items()})
    return models


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    """Train, score, and write the page."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    train, queries = digits()
    generator = torch.Generator().manual_seed(1)
    kept = torch.stack([torch.randperm(TRAIN, generator=generator) for _ in range(HALVES)])
    weights = (kept < TRAIN // 2).double()
    runs = []
    for seed in range(STARTS):
        at = trained([network(seed)] * HALVES, weights, *train)
        runs.append(query_losses(at, *queries))
        print(f"start {seed}: mean query loss {float(runs[-1].mean()):.3f}", flush=True)
    losses = torch.stack(runs).mean(0)
    models = _whole_models(train)
    half = STARTS // 2
    ends = [torch.stack(some).mean(0).mT for some in (runs[:half], runs[half:])]
    rows = []
    for name, make in methods().items():
        start = time.process_time()
        found = scores(models, make, train, queries)
        lds = [agreement(score, 1 - weights, losses) for score in found]
        rows.append([name, *lds, time.process_time() - start])
        print(name, rows[-1], flush=True)
    write(out, rows, spearman(ends[0], ends[1]))


def write(out: Path, rows: list[list[Any]], ceiling: float) -> None:
    """The table as CSV and on a page."""
    head = ["curvature", *(f"damping {d:g}" for d in DAMPINGS), "CPU s"]
    with (out / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    command = f"python -m benchmarks.influence {out}"
    machine: dict[str, Any] = environment("cpu", 1, torch.get_num_threads()) | {"command": command}
    (out / "env.json").write_text(json.dumps(machine, indent=1) + "\n", "utf-8")
    body = [[name, *(f"{v:.3f}" for v in lds), f"{took:.1f}"] for name, *lds, took in rows]
    notes = out / "notes.md"
    told = notes.read_text("utf-8").strip() if notes.exists() else ""
    page = PAGE.format(
        table=table(head, body),
        notes=told,
        ceiling=ceiling,
        command=command,
        cpu=machine["cpu"],
        torch=machine["versions"]["torch"],
        width=WIDTH,
        steps=STEPS,
        decay=DECAY,
        train=TRAIN,
        queries=QUERIES,
        halves=HALVES,
        starts=STARTS,
        half=STARTS // 2,
    )
    (out / "README.md").write_text(page, "utf-8")


PAGE = """# Influence scores of small networks on digits

The linear datamodeling score: Spearman's correlation, over {halves} random halves of {train}
training examples, between the loss of a query in a network that was trained on the half, and the
sum of the scores of the examples left out; the mean over {queries} queries. 1 would be a perfect
ranking. Two sets of {half} retrained networks for each half, which differ in their starts alone,
agree with each other at {ceiling:.3f}.

{table}

*identity* is the product of plain gradients. Damping is a multiple of the mean eigenvalue of each
block, of *exact* of the whole matrix, which knows what couples the layers. Networks
64-{width}-{width}-10 with tanh, weight decay {decay}, {steps} steps of Adam on the whole half,
{starts} starts of each half; scores are means over {starts} networks trained on all examples. In
float64.

{notes}

All numbers: [scores.csv](scores.csv). Written by `{command}` with torch {torch} on {cpu}
([env.json](env.json)).
"""

if __name__ == "__main__":
    main()
