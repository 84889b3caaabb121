"""What an accelerator does with the library: `python -m benchmarks.accelerator OUT`.

Layers in bfloat16 against `nn.Linear` and against `torch.compile`, a step of each optimiser,
products with a kernel matrix of particles, and training of many small networks side by side. Times
are of the device (CUDA events, median over rounds, each of many calls); bytes are what a call must
read and write once, so that TB/s is a lower bound of the traffic. Writes `OUT/accelerator.json` and
`OUT/README.md`. `--dry` runs small sizes on the CPU, to see that all parts work; its times mean
nothing. What `OUT/notes.md` says is added to the page.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._report import table
from benchmarks._timing import machine
from benchmarks.optimizers import CONTESTANTS
from matrigami import BlockTensorTrain, Kronecker, LowRank, Monarch, Structure
from matrigami.geometry.particles import error_estimate, kernel_matrix
from matrigami.nn import StructuredLinear
from matrigami.studies import RunConfig, load_preset
from matrigami.studies._accelerator import prepare
from matrigami.studies._together import SharedTask, in_turns
from matrigami.studies._train import Run
from matrigami.studies.tasks import ImageTask
from matrigami.studies.tasks._datasets import Images


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a device, or dry."""

    device: torch.device
    dims: tuple[int, ...]
    tokens: tuple[int, ...]
    compiled: int
    points: int
    examples: int
    seconds: float

    @classmethod
    def of(cls, dry: bool) -> "Sizes":
        """The sizes."""
        if dry:
            return cls(torch.device("cpu"), (64,), (32,), 0, 600, 64, 1e-3)
        dims, tokens = (1024, 2048, 4096, 8192), (4096, 16384, 65536)
        return cls(torch.device("cuda"), dims, tokens, 4096, 100_000, 20_480, 0.03)


class Clock:
    """Seconds of a call on a device."""

    def __init__(self, sizes: Sizes) -> None:
        self.cuda, self.least = sizes.device.type == "cuda", sizes.seconds

    def __call__(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Median over rounds, each long enough to be measured."""
        call()
        repeats = max(1, math.ceil(self.least / max(self._round(call, 1), 1e-6)))
        return median(self._round(call, repeats) for _ in range(rounds)) / repeats

    def _round(self, call: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            start = time.process_time()
            for _ in range(repeats):
                call()
            return time.process_time() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def recipes(d: int) -> dict[str, Structure]:
    """Structures of a layer."""
    return {
        "BTT, r=1": BlockTensorTrain(rank=1),
        "BTT, r=4": BlockTensorTrain(rank=4),
        "Monarch, 4 blocks": Monarch(blocks=4),
        "Monarch, 32 blocks": Monarch(blocks=32),
        f"low rank, r={d // 16}": LowRank(rank=d // 16),
        "Kronecker": Kronecker(),
    }


def layers(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Forward, and forward and backward, of each layer, size and number of tokens."""
    for d in sizes.dims:
        for tokens in sizes.tokens:
            x = torch.randn(tokens, d, device=sizes.device, dtype=torch.bfloat16)
            g = torch.randn_like(x)
            x.requires_grad_()
            dense: tuple[float, float] | None = None
            for name, layer in _contestants(sizes, d, tokens == sizes.tokens[-1]):
                times = clock(partial(_forward, layer, x)), clock(partial(_both, layer, x, g))
                dense = dense or times
                yield _row(name, layer, d, tokens, times, dense)
                del layer


def _contestants(sizes: Sizes, d: int, many: bool) -> Iterator[tuple[str, nn.Module]]:
    """`nn.Linear` first; at one size also compiled layers."""
    options = {"device": sizes.device, "dtype": torch.bfloat16, "bias": False}
    yield "nn.Linear", nn.Linear(d, d, **options)
    for name, recipe in recipes(d).items():
        layer = StructuredLinear(d, d, recipe, **options)
        yield name, layer
        if many and d == sizes.compiled and name.startswith(("BTT", "Monarch")):
            compiled = copy(layer)
            compiled.compile()
            yield f"{name}, compiled", compiled


def _row(
    name: str,
    layer: nn.Module,
    d: int,
    tokens: int,
    times: tuple[float, float],
    dense: tuple[float, float],
) -> dict[str, Any]:
    """One line of the table."""
    forward, both = times
    macs = layer.cost().macs if isinstance(layer, StructuredLinear) else d * d
    numbers = 2 * tokens * d + sum(p.numel() for p in layer.parameters())
    return {
        "d": d,
        "tokens": tokens,
        "layer": name,
        "macs": macs,
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "tflops": 2 * tokens * macs / forward / 1e12,
        "tbytes": 2 * numbers / forward / 1e12,
        "faster_forward": dense[0] / forward,
        "faster_both": dense[1] / both,
    }


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _both(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), g)


def optimizers(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """A step of each optimiser on an MLP of three wide layers; the mean over refresh cycles."""
    width = 64 if sizes.device.type == "cpu" else 2048
    x = torch.randn(256, width, device=sizes.device)
    y = torch.randint(100, (256,), device=sizes.device)
    for name, make in CONTESTANTS.items():
        torch.manual_seed(0)
        hidden = [part for _ in range(2) for part in (nn.Linear(width, width), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(width, 100)).to(sizes.device)
        optimizer = make(model)
        whole = partial(_cycle, model, optimizer, x, y, optimizer.step)
        whole()
        passes = clock(partial(_cycle, model, optimizer, x, y, lambda: None), rounds=3)
        both = clock(whole, rounds=3)
        yield {"optimizer": name, "step_ms": 100 * (both - passes), "passes_ms": 100 * passes}


def _cycle(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    step: Callable[[], object],
) -> None:
    """Ten passes, each with a step: a cycle of refreshes."""
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step()


def particles(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """The product of the kernel 1/r of points in a cube."""
    x = torch.rand(sizes.points, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = kernel_matrix(x.to(sizes.device), "laplace", tol=1e-5)
    b = torch.randn(sizes.points, device=sizes.device, dtype=torch.float64)
    error = error_estimate(A, x.to(sizes.device), "laplace")
    yield {
        "points": sizes.points,
        "product_ms": 1e3 * clock(lambda: A @ b),
        "relative_error": error,
    }


def throughput(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Steps of CIFAR-100's networks in a second, one by one and side by side (random pixels)."""
    prepare(sizes.device)
    configs = [c for c in load_preset("cifar100_small").configs if c.seed == 0]
    if sizes.device.type == "cpu":
        configs = configs[:2]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (sizes.examples, 32, 3, 32), dtype=torch.uint8, generator=generator
    )
    images = Images(pixels, torch.randint(0, 100, (sizes.examples,), generator=generator))
    few = Images(*[t[:2000] for t in images])
    task = ImageTask(
        images, few, 100, augment=True, mixup=0.8, shuffle_pixels=True, device=sizes.device
    )
    for groups in ([[c] for c in configs[:: max(1, len(configs) // 6)]], [configs]):
        seconds = sum(_step_of(group, task, sizes) for group in groups)
        runs = sum(map(len, groups))
        yield {
            "side_by_side": max(map(len, groups)),
            "runs": runs,
            "ms_per_run_and_step": 1e3 * seconds / runs,
        }


def _step_of(configs: list[RunConfig], task: ImageTask, sizes: Sizes) -> float:
    """Seconds of a step of all runs together, after four epochs of warm-up."""
    shared = SharedTask(task)
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(c, Path(folder), shared, sizes.device, shared=True) for c in configs]
        trainings = [run.train(lambda *_: None, lambda: False) for run in runs]
        stamps = []
        for epoch in (4, 6):
            in_turns([takewhile(lambda at, last=epoch: at[0] < last, each) for each in trainings])
            if sizes.device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
    return (stamps[1] - stamps[0]) / (2 * runs[0].steps_per_epoch)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page(found: dict[str, Any], command: str) -> str:
    """The measurements as a page."""
    parts = ["# On an accelerator", f"Made by `{command}`.", f"`{json.dumps(found['machine'])}`"]
    for name in PARTS:
        rows = found.get(name, [])
        parts += [f"## {name.capitalize()}"]
        parts += (
            [table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])]
            if rows
            else []
        )
    return "\n\n".join(parts) + "\n"


PARTS: dict[str, Callable[[Sizes, Clock], Iterator[dict[str, Any]]]] = {
    "throughput": lambda sizes, _: throughput(sizes),
    "layers": layers,
    "optimizers": optimizers,
    "particles": particles,
}


def main() -> None:
    """Measure, print, and write after each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    sizes = Sizes.of(options.dry)
    clock = Clock(sizes)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine()}
    if sizes.device.type == "cuda":
        found["machine"] |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in options.only:
        found[name] = []
        for row in PARTS[name](sizes, clock):
            found[name].append(row)
            print(name, " ".join(f"{k}={_cell(v)}" for k, v in row.items()), flush=True)
        (options.out / "accelerator.json").write_text(json.dumps(found, indent=1) + "\n")
        notes = options.out / "notes.md"
        text = page(found, "make accelerator") + (
            f"\n{notes.read_text()}" if notes.exists() else ""
        )
        (options.out / "README.md").write_text(text)


if __name__ == "__main__":
    main()
