"""Quantisation: codes, their entropy, and the error against Shannon's bound."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from matrigami.compress import Grid, round_ldl, round_waterfill
from matrigami.demo._draw import Panel, bars, curves
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(bits: int = 3) -> dict[str, Any]:
    """Round Gaussian weights: to nearest, with feedback, and for an entropy coder."""
    W, n = torch.randn(96, 96), 96
    x = torch.randn(2000, n) @ (torch.randn(n, n) * torch.linspace(0.1, 1, n))  # inputs: correlated
    A = x.T @ x / len(x)

    def loss(V: torch.Tensor) -> float:
        return float(torch.trace((W - V) @ A @ (W - V).T) / torch.trace(W @ A @ W.T))

    nearest = loss(Grid(bits).round(W).dense())
    feedback = loss(round_ldl(W, A, grid=Grid(bits)).value.dense())  # GPTQ
    step = math.sqrt(2 * math.pi * math.e) * 2.0**-bits  # of a scalar quantiser with this entropy
    codes = torch.round(W / step)
    share = codes.unique(return_counts=True)[1] / W.numel()
    entropy = float(-(share * share.log2()).sum())
    error = float((W - step * codes).square().mean())
    gap = 0.5 * math.log2(error / 4.0**-entropy)  # bits above Shannon's D = 4^-R
    waterfill = loss(round_waterfill(W, A, bits=float(bits)).value.dense())
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The codes, the error against the bound, and the three ways to round."""
    rates = [r["entropy"] for r in runs]
    lines = {
        "rounded": (rates, [r["error"] for r in runs]),
        "Shannon": (rates, [4.0**-r for r in rates]),
    }
    codes, counts = found["codes"].unique(return_counts=True)
    near = {
        f"{int(c):+d}": float(k) / len(found["W"]) ** 2 for c, k in zip(codes, counts, strict=True)
    }
    few = dict(sorted(near.items(), key=lambda item: -item[1])[:11])
    shown = {k: few[k] for k in sorted(few, key=int)}
    point, title = (found["entropy"], found["error"]), "Error against the rate"
    ways = {
        "to nearest": found["nearest"],
        "feedback (GPTQ)": found["feedback"],
        "waterfilling": found["waterfill"],
    }
    return [
        bars(shown, "Codes", y="share", spec=".3f"),
        curves(lines, title, x="bits a weight", y="mean square", log="y", mark=point),
        bars(ways, f"Error of the outputs, {found['bits']} bits", y="relative"),
    ]


TOPIC = Topic(
    formula="w ≈ Δ · q,   q an integer,   rate R = H(q),   error D ≈ Δ^{2} / 12\n"
    "Shannon: D ≥ σ^{2} 4^{−R};   a scalar quantiser at high rate: 1/2 log_{2}(2πe / 12) = 0.254 "
    "bits above\n"
    "of a layer:   tr (W − Ŵ) A (W − Ŵ)^{⊤},   A = E[a a^{⊤}]",
    example=example,
    numbers=(
        Number("gap", "bits above Shannon's bound", ".3f"),
        Number("entropy", "entropy of the codes, bits", ".3f"),
        Number("error", "mean square error", ".2e"),
        Number("nearest", "output error, to nearest", ".2e"),
        Number("feedback", "output error, with feedback (GPTQ)", ".2e"),
        Number("waterfill", "output error, waterfilling, entropy coded", ".2e"),
    ),
    meaning="At {entropy:.2f} bits the rounded weights are {gap:.3f} bits from Shannon's bound; "
    "0.254 is the limit for one number at a time. What counts is the error of the layer's "
    "outputs: feedback makes it {nearest:.1e} → {feedback:.1e} at {bits} bits, and steps "
    "chosen by the curvature with an entropy coder {waterfill:.1e}.",
    picture=picture,
    slider=Slider("bits", (2, 3, 4, 5, 6), "Bits"),
    exercise="One more bit: by how much does the error fall?",
    answer="D is proportional to 4^−R, so by 4: 6.02 decibels for each bit. The line in the "
    "second panel falls by log₁₀ 4 = 0.6 decades a bit.",
    sources=(
        "Gish and Pierce (1968), Asymptotically efficient quantizing.",
        "Frantar et al. (2022), GPTQ, arXiv:2210.17323.",
    ),
)
