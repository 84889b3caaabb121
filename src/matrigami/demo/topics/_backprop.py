"""Backprop is a Kronecker product: a layer's gradient, and its Fisher matrix."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.curvature import fisher, kfac
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(examples: int = 64) -> dict[str, Any]:
    """One example: exact. Many: the expectation of the product is not the product of the two."""
    layer, loss = torch.nn.Linear(12, 5, bias=False), torch.nn.CrossEntropyLoss()
    a, y = torch.randn(256, 12), torch.randint(5, (256,))

    s = layer(a[:1])
    (g,) = torch.autograd.grad(loss(s, y[:1]), s, retain_graph=True)
    (dW,) = torch.autograd.grad(loss(s, y[:1]), layer.weight)
    product = mg.kron(g.T, a[:1].T).dense()[:, 0]  # g (x) a
    difference = (dW.flatten() - product).abs().max()

    data = (a[:examples], y[:examples])
    F, K = fisher(layer, loss, data).dense(), kfac(layer, loss, data).dense().detach()
    error = (F - K).norm() / F.norm()
    stored, entries = 5 * 5 + 12 * 12, F.numel()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The Fisher matrix, K-FAC's, and the error against examples."""
    counts, errors = [r["examples"] for r in runs], [r["error"] for r in runs]
    limit, point = float(found["F"].abs().max()), (found["examples"], float(found["error"]))
    title = "Error of K-FAC"
    return [
        matrix(found["F"], "Fisher", note="60 × 60, exact", limit=limit),
        matrix(found["K"], "K-FAC: B ⊗ A", note="25 + 144 numbers", limit=limit),
        curves({"": (counts, errors)}, title, x="examples", y="relative", log="x", mark=point),
    ]


TOPIC = Topic(
    formula="s = W a,   ∇_{W} ℓ = g a^{⊤},   vec(∇_{W} ℓ) = g ⊗ a\n"
    "F = E[(g ⊗ a)(g ⊗ a)^{⊤}] = E[g g^{⊤} ⊗ a a^{⊤}] ≈ E[g g^{⊤}] ⊗ E[a a^{⊤}]",
    example=example,
    numbers=(
        Number("error", "relative error of K-FAC", ".3f"),
        Number("difference", "difference of the gradient from g ⊗ a", ".1e"),
        Number("stored", "numbers that K-FAC stores", ",d"),
        Number("entries", "entries of the Fisher matrix", ",d"),
    ),
    meaning="The gradient is g ⊗ a (difference {difference:.0e}). So the Fisher matrix of one "
    "example is a Kronecker product exactly; with {examples} examples the product of the two "
    "expectations misses {error:.1%} of it, and stores {stored} numbers in place of {entries:,}.",
    picture=picture,
    slider=Slider("examples", (1, 2, 4, 16, 64, 256), "Examples"),
    exercise="How much would K-FAC store for a layer with 4096 inputs and 4096 outputs, and the "
    "Fisher matrix?",
    answer="2 · 4096² = 3.4 · 10⁷ numbers, twice the weights. The Fisher matrix has 4096⁴ = "
    "2.8 · 10¹⁴ entries.",
    sources=("Martens and Grosse (2015), K-FAC, arXiv:1503.05671.",),
)
