"""What an accelerator does with the library: `python -m benchmarks.accelerator OUT`.

Layers in bfloat16, by two products, by one kernel of Triton and by `torch.compile`, against
`nn.Linear`; a step of each optimiser, and the factorisations in it; products with kernel matrices
of particles; training of many small networks side by side. Times are CUDA events, the median over
rounds, each of many calls; `replayed` is a recorded graph, without the host. Bytes are what a call
must read and write once, so that TB/s is a lower bound of the traffic. `taken` says in which passes
the library takes that way of itself. Writes `OUT/accelerator.json` and `OUT/README.md` after every
row; what fails is a row with its error. `--dry` runs small sizes on the CPU, to see that all parts
work; its times mean nothing. What `OUT/notes.md` says is added to the page.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._card import Attempt, Clock, Row, Sizes
from benchmarks._card_layers import layers
from benchmarks._report import table
from benchmarks._timing import machine
from benchmarks.optimizers import CONTESTANTS
from matrigami.geometry.particles import error_estimate, kernel_matrix
from matrigami.optim._bases import orthonormal
from matrigami.optim._roots import cans_root
from matrigami.studies import RunConfig, load_preset
from matrigami.studies._accelerator import prepare
from matrigami.studies._together import SharedTask, in_turns
from matrigami.studies._train import Run
from matrigami.studies.tasks import ImageTask
from matrigami.studies.tasks._datasets import Images


def optimizers(sizes: Sizes, clock: Clock) -> Iterator[Attempt]:
    """A step of each optimiser on an MLP of three wide layers; the mean over refresh cycles."""
    for name, make in CONTESTANTS.items():
        yield name, partial(_optimizer, name, make, sizes, clock)


def _optimizer(name: str, make: Any, sizes: Sizes, clock: Clock) -> Row:
    """One of them."""
    width = sizes.width
    x = torch.randn(256, width, device=sizes.device)
    y = torch.randint(100, (256,), device=sizes.device)
    torch.manual_seed(0)
    hidden = [part for _ in range(2) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, 100)).to(sizes.device)
    optimizer = make(model)
    whole = partial(_cycle, model, optimizer, x, y, optimizer.step)
    whole()
    passes = clock(partial(_cycle, model, optimizer, x, y, lambda: None), rounds=3)
    both = clock(whole, rounds=3)
    return {"optimizer": name, "step_ms": 100 * (both - passes), "passes_ms": 100 * passes}


def factorizations(sizes: Sizes, clock: Clock) -> Iterator[Attempt]:
    """What refreshes are made of, for one symmetric positive definite matrix."""
    for m in (sizes.width // 2, sizes.width):
        G = torch.randn(1, m, 2 * m, device=sizes.device) / m**0.5
        S = G @ G.mT
        ways = {
            "product": lambda S=S: S @ S,
            "eigh": lambda S=S: torch.linalg.eigh(S),
            "QR": lambda S=S: torch.linalg.qr(S),
            "QR by Cholesky, twice": lambda S=S: _cholesky_q(_cholesky_q(S)),
            "QR by blocks, checked by the host": lambda S=S: orthonormal(S),
            "Cholesky": lambda S=S: torch.linalg.cholesky_ex(S),
            "inverse by Cholesky": lambda S=S: torch.cholesky_inverse(torch.linalg.cholesky(S)),
            "root by polynomials": lambda S=S: cans_root(S, -0.25),
        }
        for name, call in ways.items():
            yield f"{name}, m={m}", partial(_factorization, m, name, call, clock)


def _cholesky_q(X: Tensor) -> Tensor:
    """The orthogonal factor by the Cholesky factor of the Gram matrix."""
    C = torch.linalg.cholesky_ex(X.mT @ X).L
    return torch.linalg.solve_triangular(C.mT, X, upper=True, left=False)


def _factorization(m: int, name: str, call: Callable[[], object], clock: Clock) -> Row:
    """One of them."""
    return {"m": m, "what": name, "ms": 1e3 * clock(call, rounds=3)}


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


def particles(sizes: Sizes, clock: Clock) -> Iterator[Attempt]:
    """Products with kernels of points in a cube: H2 matrices, by the fast multipole method."""
    for kernel in ("laplace", "matern32"):
        for points in sizes.points:
            yield f"{kernel}, {points} points", partial(_particles, kernel, points, sizes, clock)


def _particles(kernel: str, points: int, sizes: Sizes, clock: Clock) -> Row:
    """One kernel and one number of points."""
    x = torch.rand(points, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(sizes.device)
    start = time.perf_counter()
    A = kernel_matrix(x, kernel, tol=1e-5)
    error = error_estimate(A, x, kernel)  # waits for the device
    build = time.perf_counter() - start
    b = torch.randn(points, 16, device=sizes.device, dtype=torch.float64)
    return {
        "kernel": kernel,
        "points": points,
        "matrix": type(A).__name__,
        "build_and_check_s": build,
        "product_ms": 1e3 * clock(lambda: A @ b[:, 0]),
        "16_vectors_ms": 1e3 * clock(lambda: A @ b, rounds=3),
        "relative_error": error,
    }


def throughput(sizes: Sizes, clock: Clock) -> Iterator[Attempt]:  # noqa: ARG001
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
        yield f"{len(groups[0])} side by side", partial(_side_by_side, groups, task, sizes)


def _side_by_side(groups: list[list[RunConfig]], task: ImageTask, sizes: Sizes) -> Row:
    """Runs of a group at once, the groups one after the other."""
    seconds = sum(_step_of(group, task, sizes) for group in groups)
    runs = sum(map(len, groups))
    return {
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


def page(found: Row, command: str) -> str:
    """The measurements as a page."""
    parts = ["# On an accelerator", f"Made by `{command}`.", f"`{json.dumps(found['machine'])}`"]
    for name in PARTS:
        rows = found.get(name, [])
        head = list(dict.fromkeys(key for row in rows for key in row))
        body = [[_cell(row.get(key, "")) for key in head] for row in rows]
        parts += [f"## {name.capitalize()}", table(head, body)] if rows else []
    return "\n\n".join(parts) + "\n"


PARTS: dict[str, Callable[[Sizes, Clock], Iterator[Attempt]]] = {
    "layers": layers,
    "optimizers": optimizers,
    "factorizations": factorizations,
    "particles": particles,
    "throughput": throughput,
}


def rows(name: str, sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """The rows of a part; what fails is a row that says so."""
    for what, call in PARTS[name](sizes, clock):
        try:
            yield call()
        except Exception as error:
            reason = f"{what}: {type(error).__name__}: {error}"
            yield {"error": reason.splitlines()[0][:200]}


def main() -> None:
    """Measure, print, and write after each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    sizes = Sizes.of(options.dry)
    clock = Clock(sizes)
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "accelerator.json"
    about: Row = machine()
    if sizes.device.type == "cuda":
        about |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found: Row = json.loads(data.read_text()) if data.exists() else {}
    if found.get("machine") != about:
        found = {"machine": about}
    for name in options.only:
        found[name], start = [], time.perf_counter()
        for row in rows(name, sizes, clock):
            found[name].append(row)
            print(name, " ".join(f"{k}={_cell(v)}" for k, v in row.items()), flush=True)
            _write(found, options.out)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _write(found: Row, out: Path) -> None:
    """Both files, as far as they are known."""
    (out / "accelerator.json").write_text(json.dumps(found, indent=1) + "\n")
    notes = out / "notes.md"
    rest = f"\n{notes.read_text()}" if notes.exists() else ""
    (out / "README.md").write_text(page(found, "make accelerator") + rest)


if __name__ == "__main__":
    main()
