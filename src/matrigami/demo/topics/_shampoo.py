"""Shampoo: a gradient preconditioned from both sides, and its limit by Newton–Schulz steps."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(steps: int = 8) -> dict[str, Any]:
    """Shampoo's update of one gradient is its orthogonal factor; a polynomial finds it, too."""
    G = torch.randn(32, 12) @ torch.diag(torch.logspace(0, -1, 12)) @ torch.randn(12, 12)
    L, R = mg.DenseMatrix(G @ G.T), mg.DenseMatrix(G.T @ G)
    left, right = mg.shift(L, 1e-9 * mg.norm(L)), mg.shift(R, 1e-9 * mg.norm(R))
    update = mg.power(left, -0.25) @ G @ mg.power(right, -0.25).dense()  # L^-1/4 G R^-1/4
    X = G / torch.linalg.matrix_norm(G, 2)
    for _ in range(steps):
        X = 1.5 * X - 0.5 * X @ X.T @ X  # Newton–Schulz: pushes every singular value to 1
    before, after, values = [torch.linalg.svdvals(M) for M in (G, update, X)]
    spread, shampoo_spread, smallest = before[0] / before[-1], after[0] / after[-1], values[-1]
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Singular values before and after, the gradient and its update."""
    place = range(1, 1 + len(found["values"]))
    lines = {
        "gradient": (place, found["before"] / found["before"][0]),
        f"{found['steps']} steps": (place, found["values"]),
        "Shampoo": (place, found["after"]),
    }
    steps, least = [r["steps"] for r in runs], [r["smallest"] for r in runs]
    point = (found["steps"], float(found["smallest"]))
    return [
        curves(lines, "Singular values", x="number", y="value", log="y"),
        curves({"": (steps, least)}, "The smallest", x="steps", y="value", log="y", mark=point),
        matrix(found["G"], "G", note="gradient"),
        matrix(found["X"], "X", note=f"after {found['steps']} steps"),
    ]


TOPIC = Topic(
    formula="L = Σ G G^{⊤},   R = Σ G^{⊤} G,   ΔW = −η L^{−1/4} G R^{−1/4}\n"
    "one gradient G = U S V^{⊤}:   L^{−1/4} G R^{−1/4} = U V^{⊤}\n"
    "Newton–Schulz:   X ← 3/2 X − 1/2 X X^{⊤} X,   σ ← 3/2 σ − 1/2 σ^{3}",
    example=example,
    numbers=(
        Number("smallest", "smallest singular value after the Newton–Schulz steps", ".3f"),
        Number("spread", "largest over smallest singular value of the gradient", ",.0f"),
        Number("shampoo_spread", "the same of Shampoo's update", ".4f"),
    ),
    meaning="A gradient whose directions differ {spread:,.0f}-fold becomes an update in which all "
    "count the same: {shampoo_spread:.3f} with Shampoo's two roots. {steps} Newton–Schulz steps, "
    "which are matrix products alone, bring the smallest singular value to {smallest:.2f}. Muon "
    "is this update of the momentum, with better polynomials (`optim.Muon`).",
    picture=picture,
    slider=Slider("steps", (0, 1, 2, 4, 6, 8, 10, 12, 16), "Newton–Schulz steps"),
    exercise="How fast does a tiny singular value σ grow in one step, and how many steps does one "
    "of 10⁻³ need to come near 1?",
    answer="3/2 σ − 1/2 σ³ ≈ 1.5 σ: it grows by half. From 10⁻³ to 1 are log(1000) / log(1.5) ≈ 17 "
    "steps. The polynomials of Muon grow more than three times as fast, so five steps do.",
    sources=(
        "Gupta, Koren and Singer (2018), Shampoo, arXiv:1802.09568.",
        "Bernstein and Newhouse (2024), Old optimizer, new norm, arXiv:2409.20325.",
        "Björck and Bowie (1971), An iterative algorithm for the best orthogonal matrix.",
    ),
)
