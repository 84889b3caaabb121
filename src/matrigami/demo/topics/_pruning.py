"""Pruning: which weights to remove, and what the others can make good."""

from collections.abc import Sequence
from typing import Any

import torch

from matrigami.compress import n_of_m, remove, unstructured
from matrigami.demo._draw import Panel, bars, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(sparsity: float = 0.5) -> dict[str, Any]:
    """Remove weights of a layer whose inputs are correlated, as those of networks are."""
    W, n = torch.randn(48, 64), 64
    x = torch.randn(3000, n) @ (torch.randn(n, n) * torch.linspace(0.1, 1, n))
    A, holdout = x[:2000].T @ x[:2000] / 2000, x[2000:].T @ x[2000:] / 1000

    def loss(V: torch.Tensor) -> float:
        return float(torch.trace((W - V) @ holdout @ (W - V).T) / torch.trace(W @ holdout @ W.T))

    small = loss(remove(W, unstructured(sparsity)).W)  # the smallest weights
    found = remove(W, unstructured(sparsity), A).W  # by the curvature, the others are fitted
    fitted = loss(found)
    pairs = loss(remove(W, n_of_m(2, 4), A).W)  # two of four, as tensor cores take them
    ratio, zeros = small / fitted, float((found == 0).double().mean())
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """What stays, and the errors."""
    at = [r["sparsity"] for r in runs]
    lines = {
        "smallest": (at, [r["small"] for r in runs]),
        "fitted": (at, [r["fitted"] for r in runs]),
    }
    names = {"smallest": "small", "fitted": "fitted", "2 of 4, fitted": "pairs"}
    ways = {name: found[key] for name, key in names.items()}
    point, V = (found["sparsity"], found["fitted"]), found["found"]
    return [
        matrix(V, f"{found['zeros']:.0%} zeros", note="48 × 64, columns by size of the input"),
        curves(lines, "Error of the outputs", x="sparsity", y="relative", log="y", mark=point),
        bars(ways, f"At {found['sparsity']:.0%}", spec=".3f"),
    ]


TOPIC = Topic(
    formula="min tr (W − V) A (W − V)^{⊤}   over V with enough zeros,   A = E[a a^{⊤}]\n"
    "one weight:   w_{i}^{2} / (A^{−1})_{ii}   (optimal brain surgeon)",
    example=example,
    numbers=(
        Number("fitted", "error of the outputs, relative, others fitted", ".3f"),
        Number("small", "of removing the smallest weights", ".3f"),
        Number("ratio", "times lower", ".1f"),
        Number("pairs", "two of four, fitted", ".3f"),
        Number("zeros", "share of zeros", ".2f"),
    ),
    meaning="With {zeros:.0%} of the weights gone the outputs err by {fitted:.1%} if the choice "
    "follows the inputs and the others are fitted, and by {small:.1%} if the smallest weights go: "
    "{ratio:.1f} times as much. Measured on inputs that were held out.",
    picture=picture,
    slider=Slider("sparsity", (0.1, 0.25, 0.5, 0.7, 0.8, 0.9), "Share removed"),
    exercise="If A is the identity, which weights should go, and what can the others do?",
    answer="The smallest ones: the error is then the sum of the squares of what was removed, and "
    "no other weight can make anything good.",
    sources=(
        "Hassibi and Stork (1992), Second order derivatives for network pruning.",
        "Frantar and Alistarh (2023), SparseGPT, arXiv:2301.00774.",
    ),
)
