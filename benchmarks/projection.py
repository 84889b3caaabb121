"""Projection in a metric: CPU seconds, and the error beside that of a longer search.

    python -m benchmarks.projection [--sizes 64 1024] [--write]

The matrix is drawn at random, entries of variance `1 / n`; a metric is full, with eigenvalues from
`1e-2` to 1 on a logarithmic scale in random directions. "error" is that in the metric, relative to
the matrix; "plain" is that of the projection without a metric, "longer" that of a search with the
tolerance divided by thirty and a thousand steps at most. float32, one thread.
"""

import argparse
import time

import torch
from torch import Tensor

import matrigami as mg
from benchmarks._report import table, write
from benchmarks._timing import Progress, machine, one_thread

RECIPES = {
    "BTT, r=4": mg.BlockTensorTrain(rank=4),
    "Monarch, 32 blocks": mg.Monarch(blocks=32),
    "Monarch, 4 blocks": mg.Monarch(blocks=4),
    "Kronecker": mg.Kronecker(),
    "low rank": mg.LowRank(),
    "TT, r=4": mg.TensorTrain(rank=4),
}

LONGER = {"tol": 1e-4, "steps": 1000}
HEAD = ("d", "structure", "sides", "s", "error", "plain", "longer: s", "longer: error")


def moment(n: int, seed: int) -> Tensor:
    """A full positive definite matrix."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((Q * torch.logspace(-2, 0, n, dtype=torch.float64)) @ Q.T).float()


def timed(recipe: mg.Structure, W: Tensor, **options: object) -> tuple[float, Tensor]:
    """CPU seconds of a projection, and its dense matrix."""
    start = time.process_time()
    A = mg.project(recipe, W, **options)  # pyright: ignore[reportArgumentType]
    return time.process_time() - start, A.dense()


def error(D: Tensor, W: Tensor, sides: dict[str, Tensor]) -> float:
    """Relative, in the metric."""

    def size(E: Tensor) -> float:
        """The norm."""
        L = sides.get("left", torch.eye(len(E))) @ E @ sides.get("right", torch.eye(len(E)))
        return float((E.double() * L.double()).sum()) ** 0.5

    return size(D - W) / size(W)


def rows(n: int, progress: Progress) -> list[list[object]]:
    """The table of one size."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, n, generator=generator) / n**0.5
    body: list[list[object]] = []
    for name, recipe in RECIPES.items():
        for sides in ({"right": moment(n, 1)}, {"left": moment(n, 2), "right": moment(n, 1)}):
            timed(recipe, W[:64, :64] if n > 64 else W)  # loads what is loaded on first use
            seconds, D = timed(recipe, W, **sides)
            _, plain = timed(recipe, W)
            longer, E = timed(recipe, W, **sides, **LONGER)
            errors = [f"{error(M, W, sides):.4f}" for M in (D, plain, E)]
            times = f"{seconds:.2f}", f"{longer:.2f}"
            body.append([n, name, len(sides), times[0], *errors[:2], times[1], errors[2]])
            progress.advance(1, f"{name}, d={n}")
    return body


def main() -> None:
    """Measure, print, and renew the README if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--write", action="store_true", help="renew benchmarks/README.md")
    options = parser.parse_args()
    setting = one_thread()
    progress = Progress(2 * len(RECIPES) * len(options.sizes))
    body = [row for n in options.sizes for row in rows(n, progress)]
    about = ", ".join(f"{key}: {value}" for key, value in machine().items())
    report = f"{table(HEAD, body)}\n\n{setting}; {about}."
    print(report)
    if options.write:
        write(report, "projection")


if __name__ == "__main__":
    main()
