"""Tensor train: a matrix of many small axes, one small core for each."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(rank: int = 8) -> dict[str, Any]:
    """A smooth kernel of 256 points as a train of four cores."""
    t = torch.linspace(0, 1, 256)
    W = 1 / (1 + 40 * (t[:, None] - t) ** 2) + 0.3 * torch.sin(9 * (t[:, None] + t))
    A = mg.project(mg.TensorTrain(rank=rank, cores=4), W)
    error = (W - A.dense()).norm() / W.norm()
    params, dense_params = mg.cost(A).params, W.numel()
    share = params / dense_params
    low = mg.project(mg.LowRank(rank=max(1, round(params / 512))), W)  # with as many numbers
    low_error = (W - low.dense()).norm() / W.norm()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The kernel, the train, and the errors against storage."""
    params = [r["params"] for r in runs]
    lines = {
        "tensor train": (params, [r["error"] for r in runs]),
        "low rank": (params, [r["low_error"] for r in runs]),
    }
    point = (found["params"], float(found["error"]))
    near = f"train of rank {found['rank']}"
    return [
        matrix(found["W"], "W", note="256 × 256"),
        matrix(found["A"].dense(), near, note=f"{found['params']:,} numbers"),
        curves(lines, "Error", x="numbers stored", y="relative", log="xy", mark=point),
    ]


TOPIC = Topic(
    formula="W[i_{1} i_{2} i_{3} i_{4}, j_{1} j_{2} j_{3} j_{4}] = "
    "G_{1}[i_{1} j_{1}] G_{2}[i_{2} j_{2}] G_{3}[i_{3} j_{3}] G_{4}[i_{4} j_{4}]\n"
    "each G[i j] an r × r matrix:   about 4 · 16 r^{2} numbers for 256 × 256",
    example=example,
    numbers=(
        Number("error", "relative error of the train", ".1e"),
        Number("low_error", "of low rank with as many numbers", ".1e"),
        Number("params", "numbers stored", ",d"),
        Number("share", "of the dense matrix", ".1%"),
    ),
    meaning="A train of rank {rank} stores {params:,} numbers, {share:.1%} of the matrix, and "
    "misses {error:.1e}; a low-rank matrix with as many numbers misses {low_error:.1e}. A smooth "
    "function depends on its coarse digits strongly and on its fine digits weakly: that is what "
    "the cores share.",
    picture=picture,
    slider=Slider("rank", (1, 2, 3, 4, 6, 8, 12), "Rank"),
    exercise="A 1,048,576 × 1,048,576 matrix with cores of 4 × 4 and rank 8: how many numbers?",
    answer="4¹⁰ = 1,048,576, so ten cores of at most 8 · 4 · 4 · 8 = 1024 numbers: about 8,500 in "
    "place of 10¹².",
    sources=(
        "Oseledets (2011), Tensor-train decomposition.",
        "Khoromskij (2011), O(d log N)-quantics approximation.",
    ),
)
