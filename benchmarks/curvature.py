"""Time of factored curvature against its own arithmetic: `python -m benchmarks.curvature`.

One pass over one batch of a multilayer perceptron: one drawn label for each example, and the
expectation over all classes. Beside it runs what cannot be saved, written by hand: the forward and
backward pass and the matrix products of the factors. curvlinops and BackPACK run beside it where
they are installed. `--write` puts the table into `benchmarks/README.md`.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from benchmarks._report import table, write
from benchmarks._timing import Progress, interleaved, machine, one_thread
from matrigami.curvature import ekfac, kfac, kfoc

Call = Callable[[], object]

SIZES = (512, 1024, 1024, 100)
"""Inputs, hidden units, classes."""

PACKAGES = ("curvlinops-for-pytorch", "backpack-for-pytorch")


def network() -> nn.Sequential:
    """The perceptron, with ReLU and biases."""
    torch.manual_seed(0)
    n, h, k, c = SIZES
    return nn.Sequential(nn.Linear(n, h), nn.ReLU(), nn.Linear(h, k), nn.ReLU(), nn.Linear(k, c))


def drawn_by_hand(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """K-FAC with one drawn label: autograd, a hook for each layer, two products for each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Note the input with a one, and later the gradient."""
        a = torch.cat([inputs[0].detach(), inputs[0].new_ones(len(x), 1)], 1)
        output.register_hook(lambda g: seen.append((a, g)))

    hooks = [m.register_forward_hook(watch) for m in model if isinstance(m, nn.Linear)]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    labels = outputs.detach().softmax(1).multinomial(1)[:, 0]
    nn.functional.cross_entropy(outputs, labels).backward()
    return [(a.mT @ a / len(x), g.mT @ g * len(x)) for a, g in seen]


@torch.no_grad()
def expected_by_hand(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The gradient factors over all classes: bare products, with the masks of the ReLUs."""
    first, _, second, _, third = model
    h = first(x).relu()
    k = second(h).relu()
    p = third(k).softmax(1)
    eye = torch.eye(SIZES[-1])
    S = (p / len(x)).sqrt()[..., None] * (eye - p[:, None])  # examples, columns, outputs
    G2 = (S.flatten(0, 1) @ third.weight).view(*S.shape[:2], -1) * (k > 0)[:, None]
    G1 = (G2.flatten(0, 1) @ second.weight).view(*S.shape[:2], -1) * (h > 0)[:, None]
    return [G.flatten(0, 1).mT @ G.flatten(0, 1) for G in (G1, G2, S)]


def expected_operations(batch: int) -> float:
    """Giga-operations of `expected_by_hand`, of each symmetric product a half: the least."""
    _, h, k, c = SIZES
    return 1e-9 * batch * c * (2 * (c * k + k * h) + c * c + k * k + h * h)


def peers(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, dict[str, Call]]:
    """The same by other libraries, as far as they are installed."""
    found: dict[str, dict[str, Call]] = {"drawn": {}, "expected": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from curvlinops import KFACLinearOperator  # noqa: PLC0415 - a peer may be missing

            def factors(kind: str) -> None:
                """Make both factors of every layer."""
                options = {"fisher_type": kind, "separate_weight_and_bias": False}
                loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
                operator = KFACLinearOperator(
                    model, loss, parameters, [(x, y)], check_deterministic=False, **options
                )
                operator.compute_kronecker_factors()

            found["drawn"]["curvlinops KFAC, mc"] = partial(factors, "mc")
            found["expected"]["curvlinops KFAC, type-2"] = partial(factors, "type-2")
            from backpack import backpack, extend  # noqa: PLC0415
            from backpack.extensions import KFAC, KFLR  # noqa: PLC0415
        except ImportError:
            return found
    extended, loss = extend(network()), extend(nn.CrossEntropyLoss())

    def backward(extension: object) -> None:
        """The pass that leaves the factors at the parameters."""
        with warnings.catch_warnings(), backpack(extension):
            warnings.simplefilter("ignore")
            loss(extended(x), y).backward()

    found["drawn"]["BackPACK KFAC(mc_samples=1)"] = partial(backward, KFAC(mc_samples=1))
    found["expected"]["BackPACK KFLR"] = partial(backward, KFLR())
    return found


def contestants(batch: int) -> dict[str, dict[str, Call]]:
    """What to time, for one drawn label and for all classes; the first of each is the unit."""
    model, loss = network(), nn.CrossEntropyLoss()
    x, y = torch.randn(batch, SIZES[0]), torch.randint(SIZES[-1], (batch,))
    ours = {
        "drawn": {
            "by hand": partial(drawn_by_hand, model, x),
            "forward + backward": lambda: loss(model(x), y).backward(),
        },
        "expected": {"by hand": partial(expected_by_hand, model, x)},
    }
    for kind, labels in (("drawn", 1), ("expected", "exact")):
        for method in (kfac, kfoc, ekfac):
            call = partial(method, model, loss, (x, y), labels=labels)
            ours[kind][f"matrigami {method.__name__}"] = call
    other = peers(model, x, y)
    return {kind: calls | other[kind] for kind, calls in ours.items()}


def rows(calls: dict[str, Call], rounds: int, tick: Call) -> str:
    """Milliseconds, and times the hand-written bound and K-FAC."""
    seconds = interleaved(calls, rounds, tick)
    bound, ours = seconds["by hand"], seconds["matrigami kfac"]
    body = [
        (name, f"{1e3 * t:.1f}", f"{t / bound:.2f}", f"{t / ours:.2f}")
        for name, t in seconds.items()
    ]
    return table(("", "ms", "/ by hand", "/ matrigami kfac"), body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for."""
    options = _options(arguments)
    about = {"setting": one_thread(), "batch": str(options.batch)} | machine()
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed, left out"
    calls, rounds = contestants(options.batch), {"drawn": options.rounds, "expected": 3}
    progress = Progress(sum(rounds.values()))
    W = torch.randn(1024, 1024)
    product = interleaved({"W": lambda: W @ W}, options.rounds)["W"]
    rate = 2e-9 * 1024**3 / product
    titles = {"drawn": "One drawn label", "expected": "The expectation over 100 classes"}
    parts = [
        f"### {title}\n\n" + rows(calls[kind], rounds[kind], partial(progress.advance, 1, title))
        for kind, title in titles.items()
    ]
    least = expected_operations(options.batch)
    note = (
        f"A product of two 1024 x 1024 matrices runs at {rate:.0f} GFLOP/s. The expectation needs "
        f"{least:.0f} GFLOP with halves of symmetric products: {least / rate * 1e3:.0f} ms."
    )
    command = [
        "python -m benchmarks.curvature",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    head = table(("", ""), list(({"command": " ".join(command)} | about).items()))
    report = "\n\n".join([head, *parts, note])
    print(report)
    if options.write:
        write(report, "curvature")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curvature", description="Time Kronecker-factored curvature."
    )
    parser.add_argument("--batch", type=int, default=256, help="number of examples")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each; the median counts")
    parser.add_argument(
        "--write", action="store_true", help="put the table into benchmarks/README.md"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
