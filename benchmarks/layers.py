"""Time of structured layers against `nn.Linear`: `python -m benchmarks.layers`.

Prints Markdown tables: forward and forward + backward of a batch, once with freed memory kept in
the process and once, in a process of its own, with the system's allocator as it is; a few tokens,
solve and logdet, projection. `--write` puts them into `benchmarks/README.md`, with the command, the
machine and the versions.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import peers
from benchmarks._report import table, write
from benchmarks._timing import Progress, interleaved, machine, one_thread
from matrigami import (
    BlockTensorTrain,
    Kronecker,
    LowRank,
    Monarch,
    Structure,
    TensorTrain,
    logdet,
    project,
    solve,
)
from matrigami.nn import StructuredLinear
from matrigami.operators import factorize


class TwoEinsums(nn.Module):
    """BTT as two plain `torch.einsum` calls on contiguous cores, the way a paper writes it.

    Args:
        d: Input and output size.
        rank: Rank of a block.
        weight_first: Name the weight before the activation. `torch.einsum` then happens to keep the
            batch as the fastest axis of the intermediate, and at rank 1 needs no copy either; the
            other order copies it.
    """

    def __init__(self, d: int, rank: int, *, weight_first: bool) -> None:
        super().__init__()
        p, e = factorize(d, 2)
        g, a = e, p
        self.input_grid, self.weight_first = (g, a), weight_first
        self.first = nn.Parameter(torch.randn(p, rank, g, a) / a**0.5)
        self.second = nn.Parameter(torch.randn(p, e, rank, g) / (g * rank) ** 0.5)

    def forward(self, x: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """Row-major result."""
        x = x.unflatten(-1, self.input_grid)
        if self.weight_first:
            z = torch.einsum("prga,kga->kprg", self.first, x)
            y = torch.einsum("perg,kprg->kpe", self.second, z)
        else:
            z = torch.einsum("kga,prga->kprg", x, self.first)
            y = torch.einsum("kprg,perg->kpe", z, self.second)
        return y.flatten(-2)


@dataclass(frozen=True)
class Row:
    """Times of one layer."""

    d: int
    layer: str
    macs: int
    forward: float
    both: float
    speedup_forward: float
    speedup_both: float


def contestants(d: int) -> dict[str, tuple[nn.Module, int]]:
    """The layers of one size by name, each with the multiply-adds of one vector."""
    r = round(math.sqrt(d))
    blocks = sorted({4, 16, 32, factorize(d, 2)[0]})
    recipes: dict[str, Structure] = {f"low rank, r={r}": LowRank(rank=r)}
    recipes |= {f"BTT, r={rank}": BlockTensorTrain(rank=rank) for rank in (1, 4)}
    recipes |= {f"Monarch, {b} blocks": Monarch(blocks=b) for b in blocks}
    recipes |= {"Kronecker": Kronecker(), "TT, r=8": TensorTrain(rank=8)}
    found: dict[str, tuple[nn.Module, int]] = {"nn.Linear": (nn.Linear(d, d, bias=False), d * d)}
    for name, recipe in recipes.items():
        layer = StructuredLinear(d, d, recipe, bias=False)
        found[name] = layer, layer.cost().macs
    for rank in (1, 4):
        macs = found[f"BTT, r={rank}"][1]
        for order, weight_first in (("x first", False), ("weight first", True)):
            name = f"two einsums, r={rank}, {order}"
            found[name] = TwoEinsums(d, rank, weight_first=weight_first), macs
    return found | peers.layers(d)


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The product alone."""
    with torch.no_grad():
        return layer(x)


def both(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The product and all its gradients, as in the middle of a network (nothing is accumulated)."""
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), g)


def time_layers(d: int, batch: int, rounds: int, tick: Callable[[], object]) -> list[Row]:
    """Forward and forward + backward of every layer of one size."""
    layers = contestants(d)
    x = torch.randn(batch, d, requires_grad=True)
    calls = {}
    for name, (layer, _) in layers.items():
        calls[name, "forward"] = partial(forward, layer, x)
        calls[name, "both"] = partial(
            both, layer, x, torch.randn_like(layer(x))
        )  # strides as the output
    seconds = interleaved(calls, rounds, tick)
    f, b = seconds["nn.Linear", "forward"], seconds["nn.Linear", "both"]
    return [
        Row(d, name, macs, t, u, f / t, b / u)
        for name, (_, macs) in layers.items()
        for t, u in [(seconds[name, "forward"], seconds[name, "both"])]
    ]


def time_by_defaults(options: argparse.Namespace) -> list[Row]:
    """The same layers in a process whose allocator nobody has touched."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-m", "benchmarks.layers", "--default-allocator"]
    command += ["--sizes", *map(str, options.sizes)]
    command += ["--batch", str(options.batch), "--rounds", str(options.rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - this very file
    return [Row(**row) for row in json.loads(done.stdout)]


def layer_table(rows: Sequence[Row], defaults: Sequence[Row], batch: int) -> str:
    """Milliseconds, speed-ups, and GFLOP/s: two for a multiply-add, thrice that with backward."""
    body = []
    for row, default in zip(rows, defaults, strict=True):
        flops = 2e-9 * row.macs * batch
        body.append(
            (
                row.d,
                row.layer,
                f"{100 * row.macs / row.d**2:.1f}",
                f"{1e3 * row.forward:.2f}",
                f"{1e3 * row.both:.2f}",
                f"{flops / row.forward:.0f}",
                f"{3 * flops / row.both:.0f}",
                f"{row.speedup_forward:.1f}",
                f"{row.speedup_both:.1f}",
                f"{1e3 * default.forward:.2f}",
                f"{1e3 * default.both:.2f}",
                f"{default.speedup_forward:.1f}",
                f"{default.speedup_both:.1f}",
            )
        )
    head = (
        "d",
        "layer",
        "MACs %",
        "f ms",
        "f+b ms",
        "f GFLOP/s",
        "f+b GFLOP/s",
        "f speed-up",
        "f+b speed-up",
        "f ms, default",
        "f+b ms, default",
        "f speed-up, default",
        "f+b speed-up, default",
    )
    return table(head, body)


def einsum_table(rows: Sequence[Row]) -> str:
    """How much faster BTT is than the two einsum calls."""
    times = {(row.d, row.layer): row for row in rows}
    body = []
    for (d, name), row in times.items():
        if name.startswith("two einsums"):
            ours = times[d, "BTT, " + name.split(", ")[1]]
            body.append(
                (d, name, f"{row.forward / ours.forward:.2f}", f"{row.both / ours.both:.2f}")
            )
    return table(("d", "BTT against", "forward", "forward + backward"), body)


def few_tokens(rounds: int, tick: Callable[[], object]) -> str:
    """Where a structured layer loses to a dense one, and what `materialize` makes of it."""
    body = []
    for d in (256, 1024, 4096):
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, d)
            calls = {"dense": partial(forward, nn.Linear(d, d, bias=False), x)}
            held = {}
            for name, recipe in {
                "BTT, r=1": BlockTensorTrain(),
                "Monarch, 16 blocks": Monarch(16),
            }.items():
                layer = StructuredLinear(d, d, recipe, bias=False).eval()
                ready = StructuredLinear(d, d, recipe, bias=False).eval()
                held[name] = ready.materialize(tokens)
                calls |= {
                    name: partial(forward, layer, x),
                    f"{name}, ready": partial(forward, ready, x),
                }
            us = {name: 1e6 * seconds for name, seconds in interleaved(calls, rounds).items()}
            for name, choice in held.items():
                numbers = us["dense"], us[name], us[f"{name}, ready"]
                body.append(
                    (
                        d,
                        tokens,
                        name,
                        *[f"{t:.0f}" for t in numbers],
                        "dense" if choice else "structured",
                    )
                )
            tick()
    head = (
        "d",
        "tokens",
        "layer",
        "nn.Linear us",
        "structured us",
        "after materialize us",
        "it holds",
    )
    return table(head, body)


def algebra(d: int, rounds: int) -> str:
    """Solve and logdet of a square block tensor train against LU of the same matrix."""
    A = BlockTensorTrain(rank=1).init(d, d, dtype=torch.float32)
    W, B = A.dense(), torch.randn(d, 16)
    calls = {
        "solve, BTT": partial(solve, A, B),
        "solve, dense": partial(torch.linalg.solve, W, B),
        "logdet, BTT": partial(logdet, A),
        "logdet, dense": partial(torch.linalg.slogdet, W),
    }
    ms = {name: 1e3 * seconds for name, seconds in interleaved(calls, rounds).items()}
    body = []
    for what in ("solve", "logdet"):
        ours, dense = ms[f"{what}, BTT"], ms[f"{what}, dense"]
        body.append((f"{what}, d={d}", f"{ours:.2f}", f"{dense:.2f}", f"{dense / ours:.1f}"))
    residuals = [
        float((W @ X - B).norm() / B.norm()) for X in (solve(A, B), torch.linalg.solve(W, B))
    ]
    note = "Relative residual of the solutions (float32): BTT {:.1e}, dense {:.1e}.".format(
        *residuals
    )
    return table(("16 right-hand sides", "BTT ms", "dense LU ms", "speed-up"), body) + "\n\n" + note


def projections(d: int, rounds: int) -> str:
    """Time to project a dense matrix onto each structure."""
    W = torch.randn(d, d) / d**0.5
    recipes = (LowRank(), BlockTensorTrain(1), BlockTensorTrain(4), Monarch(16), Kronecker())
    seconds = interleaved({str(recipe): partial(project, recipe, W) for recipe in recipes}, rounds)
    return table(
        (f"projection, d={d}", "ms"), [(name, f"{1e3 * t:.0f}") for name, t in seconds.items()]
    )


def time_all(options: argparse.Namespace, progress: Progress) -> list[Row]:
    """The layers of all sizes."""
    rows: list[Row] = []
    for d in options.sizes:
        tick = partial(progress.advance, d * d, f"layers of size {d}")
        rows += time_layers(d, options.batch, options.rounds, tick)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for."""
    options = _options(arguments)
    setting = one_thread(keep_memory=not options.default_allocator)
    torch.manual_seed(0)
    work = sum(d * d * options.rounds for d in options.sizes)
    if options.default_allocator:
        print(json.dumps(_plain(time_all(options, Progress(work)))))
        return 0
    defaults = time_by_defaults(options)
    rest = work / 4
    progress = Progress(work + rest)
    rows = time_all(options, progress)
    few = few_tokens(options.rounds, partial(progress.advance, rest / 18, "few tokens"))
    solved, projected = algebra(1024, options.rounds), projections(1024, 3)
    progress.advance(progress.total - progress.done, "done")
    command = " ".join(
        ["python -m benchmarks.layers", *(sys.argv[1:] if arguments is None else arguments)]
    )
    about = {"command": command, "setting": setting, "batch": str(options.batch)}
    about |= machine() | peers.versions()
    sections = {
        "Layers": layer_table(rows, defaults, options.batch),
        "BTT against two einsum calls (times faster)": einsum_table(rows),
        "Few tokens (forward)": few,
        "Solve and logdet": solved,
        "Projection": projected,
    }
    report = "\n\n".join(
        [table(("", ""), list(about.items())), *[f"### {k}\n\n{v}" for k, v in sections.items()]]
    )
    print("\n".join([report, "", *peers.missing()]))
    if options.json:
        options.json.write_text(
            json.dumps(about | {"rows": _plain(rows), "default_rows": _plain(defaults)}, indent=1)
            + "\n"
        )
    if options.write:
        write(report, "measured")
    return 0


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [asdict(row) for row in rows]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description="Time structured layers against nn.Linear."
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        help="input and output size of the layers",
    )
    parser.add_argument("--batch", type=int, default=512, help="number of vectors")
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each layer; the median counts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument(
        "--write", action="store_true", help="put the tables into benchmarks/README.md"
    )
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="only time the layers, with the system's allocator as it is, and print JSON",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
