"""Block tensor train: Monarch with a rank, from one step of the fast transform to any matrix."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(rank: int = 2) -> dict[str, Any]:
    """The cosines of the Fourier transform, projected onto block tensor trains."""
    n = 64
    k = torch.arange(n)
    order = k.reshape(8, 8).T.flatten()  # a perfect shuffle, of rows and of columns
    C = torch.cos(2 * torch.pi * order[:, None] * order / n)
    A = mg.project(mg.BlockTensorTrain(rank=rank), C)
    error, macs = (C - A.dense()).norm() / C.norm(), mg.cost(A).macs
    low = mg.project(mg.LowRank(rank=8 * rank), C)  # as many multiply-adds
    low_error = (C - low.dense()).norm() / C.norm()
    W = torch.randn(n, n)
    random_error = (W - mg.project(mg.BlockTensorTrain(rank=rank), W).dense()).norm() / W.norm()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Cosines, their train, and the errors of all ranks."""
    macs = [r["macs"] for r in runs]
    lines = {
        "cosines": (macs, [max(float(r["error"]), 1e-16) for r in runs]),
        "low rank": (macs, [r["low_error"] for r in runs]),
        "random": (macs, [max(float(r["random_error"]), 1e-16) for r in runs]),
    }
    point = (found["macs"], max(float(found["error"]), 1e-16))
    return [
        matrix(found["C"], "Cosines, shuffled", note="64 × 64"),
        matrix(found["A"].dense(), f"rank {found['rank']}", note=f"{found['macs']:,} MACs"),
        curves(lines, "Error", x="multiply-adds", y="relative", log="y", mark=point),
    ]


TOPIC = Topic(
    formula="y_{(φ ε)} = Σ_{γ ρ} B[φ ε γ ρ] Σ_{α} A[γ ρ φ α] x_{(γ α)}\n"
    "after a perfect shuffle:   √n × √n tiles, each of rank r;   2 r n^{3/2} multiply-adds",
    example=example,
    numbers=(
        Number("error", "relative error for the cosines", ".1e"),
        Number("low_error", "of low rank with as many multiply-adds", ".2f"),
        Number("random_error", "relative error for a random matrix", ".2f"),
        Number("macs", "multiply-adds of a product (dense: 4096)", ",d"),
    ),
    meaning="cos(a + b) = cos a cos b − sin a sin b: two terms, so the cosines are a block tensor "
    "train of rank 2. At rank {rank} the error is {error:.0e}, while low rank with the same "
    "{macs:,} multiply-adds misses {low_error:.0%}. At rank 8 any matrix is one, and nothing is "
    "saved.",
    picture=picture,
    slider=Slider("rank", (1, 2, 3, 4, 6, 8), "Rank"),
    exercise="Monarch is the block tensor train of which rank, and why is its random error 0.79 "
    "at n = 64?",
    answer="Of rank 1. Each 8 × 8 tile keeps its largest singular value of eight, which holds "
    "about 0.38 of the squared norm of a random tile; √(1 − 0.38) = 0.79.",
    sources=("Qiu et al. (2024), Compute better spent, arXiv:2406.06248.",),
)
