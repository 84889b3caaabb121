"""How far K-FAC, EKFAC and KFOC are from the exact Fisher matrix, before and after training.

    python -m benchmarks.curvature_errors docs/results/curvature_digits

trains small networks on scikit-learn's digits, one of dense and two of structured layers, and
writes the errors of every block, figures, and a page with the command, the machine and the table.
"""

import csv
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click
import torch
from sklearn.datasets import load_digits
from torch import nn

from matrigami import Kronecker, Monarch, Structure
from matrigami.curvature import (
    BlockErrors,
    CurvatureMatrix,
    compare,
    dense_block,
    ekfac,
    fisher,
    kfac,
    kfoc,
    positions,
)
from matrigami.nn import StructuredLinear
from matrigami.operators import LinearOperator
from matrigami.plots import plot_blocks, plot_errors
from matrigami.studies import environment

WIDTH, STEPS, BATCH, LR, EXAMPLES = 32, 400, 256, 3e-3, 300
STRUCTURES: dict[str, Structure | None] = {
    "dense": None,
    "monarch": Monarch(blocks=4),
    "kronecker": Kronecker(),
}


def network(structure: Structure | None) -> nn.Module:
    """64-32-32-10 with tanh."""
    torch.manual_seed(0)

    def layer(n: int, m: int) -> nn.Module:
        """A dense or structured layer."""
        return nn.Linear(n, m) if structure is None else StructuredLinear(n, m, structure)

    body = [layer(64, WIDTH), nn.Tanh(), layer(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(*body)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images, standardised as one, and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float64)
    return (x - x.mean()) / x.std(), torch.tensor(labels)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Adam; the last loss."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loss = torch.zeros(())
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def measure(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[LinearOperator, dict[str, CurvatureMatrix], list[BlockErrors]]:
    """The exact matrix, its approximations and their errors."""
    args = (model, nn.CrossEntropyLoss(), batch)
    exact, plain, best = fisher(*args), kfac(*args), kfoc(*args)
    found = {
        "K-FAC": plain,
        "EKFAC": ekfac(*args, basis=plain),
        "KFOC": best,
        "KFOC corrected": ekfac(*args, basis=best),
    }
    return exact, found, compare(exact, found, largest=4096)


def table(rows: list[dict[str, object]]) -> Iterator[str]:
    """Frobenius errors, a line for each network, stage and block."""
    names = list(dict.fromkeys(str(row["approximation"]) for row in rows))
    yield "| network | training | block | parameters | " + " | ".join(names) + " |"
    yield "|---|---|---|--:|" + "--:|" * len(names)
    for (net, stage, block), some in groupby(
        rows, key=lambda row: (row["network"], row["stage"], row["block"])
    ):
        group = list(some)
        cells = [f"{row['frobenius']:.3f}" for row in group]
        least = min(cells)
        if least < max(cells):
            cells = [f"**{cell}**" if cell == least else cell for cell in cells]
        yield f"| {net} | {stage} | `{block}` | {group[0]['size']} | {' | '.join(cells)} |"


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    """Train, measure, and write the page."""
    torch.set_default_dtype(torch.float64)
    x, y = digits()
    (out / "fig").mkdir(parents=True, exist_ok=True)
    batch = (x[:EXAMPLES], y[:EXAMPLES])
    rows: list[dict[str, object]] = []
    for name, structure in STRUCTURES.items():
        model, stages = network(structure), {}
        for stage in ("initial", f"after {STEPS} steps"):
            if stage != "initial":
                print(f"{name}: loss {train(model, x, y):.3g}", flush=True)
            exact, found, errors = measure(model, batch)
            stages[stage] = errors
            for e in errors:
                row = {"network": name, "stage": stage, **e._asdict(), "block": "+".join(e.block)}
                rows.append(row)
        plot_errors(stages, out / "fig" / f"errors_{name}.png", title=f"{name}, digits")
        block = ("2.weight", "2.bias") if structure is None else found["K-FAC"].names[0]
        matrices = {"exact": exact, **found}
        at = positions(found["K-FAC"])[block][:: 4 if structure is None else 1]
        shown = {key: dense_block(F, at) for key, F in matrices.items()}
        title = f"{name}: Fisher block of {' and '.join(block)}, {stage}"
        plot_blocks(shown, out / "fig" / f"blocks_{name}.png", title=title)
    write(out, rows)


def write(out: Path, rows: list[dict[str, object]]) -> None:
    """The table as CSV and on a page."""
    with (out / "errors.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    command = f"python -m benchmarks.curvature_errors {out}"
    machine = environment("cpu", 1, torch.get_num_threads()) | {"command": command}
    (out / "env.json").write_text(json.dumps(machine, indent=1) + "\n", "utf-8")
    page = PAGE.format(
        steps=STEPS,
        batch=BATCH,
        lr=LR,
        examples=EXAMPLES,
        width=WIDTH,
        table="\n".join(table(rows)),
        cpu=machine["cpu"],
        torch=machine["versions"]["torch"],
        command=command,
    )
    (out / "README.md").write_text(page, "utf-8")


PAGE = """# Curvature of small networks on digits

Relative Frobenius error of each block of the exact Fisher matrix, `||F - G|| / ||G||`, for the
approximations of `matrigami.curvature`. The best of each row is in bold. K-FAC and KFOC store the
same numbers; EKFAC and the corrected KFOC also one number for each parameter.

Networks 64-{width}-{width}-10 with tanh, standardised digits, Adam with learning rate {lr}, batches
of {batch}, {steps} steps; the Fisher matrix of {examples} examples in float64. A block of a
structured tensor counts what the approximation leaves out between its small blocks, too.

{table}

![Errors of the dense network](fig/errors_dense.png)

![Errors of the Monarch network](fig/errors_monarch.png)

![Errors of the Kronecker network](fig/errors_kronecker.png)

![A block of the dense network](fig/blocks_dense.png)

![A block of the Monarch network](fig/blocks_monarch.png)

![A block of the Kronecker network](fig/blocks_kronecker.png)

All columns of the errors (trace, spectral norm, damped solve) are in [errors.csv](errors.csv).
Written by `{command}`
with torch {torch} on {cpu} ([env.json](env.json)).
"""

if __name__ == "__main__":
    main()
