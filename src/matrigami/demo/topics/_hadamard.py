"""Hadamard: the entry-wise product of two low-rank matrices has a rank far above theirs."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(rank: int = 4) -> dict[str, Any]:
    """Multiply two low-rank matrices entry by entry, and count."""
    n = 48
    U1, V1, U2, V2 = torch.randn(4, n, rank) / rank**0.5
    A, B = mg.LowRankMatrix(U1, V1), mg.LowRankMatrix(U2, V2)
    H = mg.hadamard(A, B)  # never formed: a product of row-wise products
    values = mg.svdvals(H)
    found_rank = int((values > 1e-10 * values[0]).sum())
    params, x = mg.cost(H).params, torch.randn(n)
    difference = (H @ x - (A.dense() * B.dense()) @ x).abs().max()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The product and its singular values."""
    params = [r["params"] for r in runs]
    lines = {
        "Hadamard": (params, [r["found_rank"] for r in runs]),
        "low rank": (params, [2 * r["rank"] for r in runs]),
    }
    place = range(1, 1 + len(found["values"]))
    kept = {"": (place, found["values"].clamp(1e-17))}
    point = (found["params"], found["found_rank"])
    return [
        matrix(found["H"].dense(), "A ∘ B", note=f"from rank {found['rank']} and {found['rank']}"),
        curves(kept, "Singular values", x="number", y="value", log="y"),
        curves(lines, "Rank for storage", x="numbers stored", y="rank", mark=point),
    ]


TOPIC = Topic(
    formula="W = (U_{1} V_{1}^{⊤}) ∘ (U_{2} V_{2}^{⊤}) = (U_{1} • U_{2}) (V_{1} • V_{2})^{⊤}\n"
    "2 r (m + n) numbers, rank up to r^{2}",
    example=example,
    numbers=(
        Number("found_rank", "rank of the product", "d"),
        Number("rank", "rank of each factor", "d"),
        Number("params", "numbers stored", ",d"),
        Number("difference", "difference of H @ x from the dense product", ".1e"),
    ),
    meaning="Two factors of rank {rank} make a matrix of rank {found_rank}; with the same "
    "{params:,} numbers a sum of two such matrices has twice the rank of one, no more. That is "
    "LoHa, the low-rank adapter with Hadamard products.",
    picture=picture,
    slider=Slider("rank", (1, 2, 3, 4, 5, 6), "Rank of each factor"),
    exercise="At which r does the product of two 48 × 48 matrices reach full rank, and what does "
    "it store then?",
    answer="At r = 7, since 7² = 49 ≥ 48, with 2 · 7 · 96 = 1344 numbers in place of 2304. Full "
    "rank does not mean any matrix: it is still a family of 1344 numbers.",
    sources=("Hyeon-Woo, Ye-Bin and Oh (2022), FedPara, arXiv:2108.06098.",),
)
