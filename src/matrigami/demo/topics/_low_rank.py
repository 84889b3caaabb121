"""Low rank: the truncated singular value decomposition, from one column to all."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(rank: int = 8) -> dict[str, Any]:
    """A smooth picture with an edge, and the nearest matrix of a rank."""
    t = torch.linspace(-1, 1, 96)
    x, y = t[None, :], t[:, None]
    W = torch.sin(4 * x * y + 3 * y) + ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.4)  # waves and a disc
    A = mg.project(mg.LowRank(rank=rank), W)
    error = (W - A.dense()).norm() / W.norm()
    tail = torch.linalg.svdvals(W)[rank:].norm() / W.norm()
    macs, dense_macs = mg.cost(A).macs, W.numel()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The matrix, its approximation, and the errors of all ranks."""
    ranks, errors = [r["rank"] for r in runs], [r["error"] for r in runs]
    point = (found["rank"], float(found["error"]))
    return [
        matrix(found["W"], "W", note="96 × 96", limit=2.0),
        matrix(found["A"].dense(), f"rank {found['rank']}", note="U Vᵀ", limit=2.0),
        curves({"": (ranks, errors)}, "Error", x="rank", y="relative error", log="y", mark=point),
    ]


TOPIC = Topic(
    formula="W ≈ U V^{⊤},   U: m × r,   V: n × r,   r (m + n) numbers in place of m n\n"
    "min ‖W − U V^{⊤}‖^{2} = σ_{r+1}^{2} + σ_{r+2}^{2} + …",
    example=example,
    numbers=(
        Number("error", "relative error of the best matrix of this rank", ".4f"),
        Number("tail", "the same from the singular values that are left out", ".4f"),
        Number("macs", "multiply-adds of a product", ",d"),
        Number("dense_macs", "of the dense matrix", ",d"),
    ),
    meaning="Rank {rank} takes {macs:,} multiply-adds in place of {dense_macs:,} and misses "
    "{error:.1%} of the norm, exactly what the singular values left out say. The waves are caught "
    "by few columns; the sharp edge of the disc is what costs rank.",
    picture=picture,
    slider=Slider("rank", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), "Rank"),
    exercise="From which rank on does the low-rank form of an n × n matrix save nothing?",
    answer="It stores r (n + n) = 2 r n numbers, so at r = n / 2 it stores n²: rank 48 here. "
    "Move the slider to 32 and compare the multiply-adds.",
    sources=("Eckart and Young (1936), The approximation of one matrix by another of lower rank.",),
)
