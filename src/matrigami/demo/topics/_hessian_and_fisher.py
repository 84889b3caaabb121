"""Hessian and Fisher: what they share, and how training brings them together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from matrigami.curvature import fisher, ggn, hessian
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(steps: int = 100) -> dict[str, Any]:
    """Train a small network and compare the exact matrices."""
    x = torch.randn(200, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    net, loss = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    problem = (net, loss, (x, y))
    H, G, F = [make(*problem).dense().detach() for make in (hessian, ggn, fisher)]
    value = loss(net(x), y).detach()
    same = (G - F).norm() / G.norm()
    error = (H - G).norm() / H.norm()
    values = torch.linalg.eigvalsh(H).flip(0)
    negative = int((values < -1e-6 * values[0]).sum())
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Both matrices, the spectrum, and the difference as training goes on."""
    steps, errors = [r["steps"] for r in runs], [r["error"] for r in runs]
    losses = [r["value"] for r in runs]
    limit, place = float(found["H"].abs().max()) / 3, range(1, 1 + len(found["values"]))
    lines = {"|H − F| / |H|": (steps, errors), "loss": (steps, losses)}
    point = (found["steps"], float(found["error"]))
    return [
        matrix(found["H"], "Hessian", note=f"loss {float(found['value']):.3f}", limit=limit),
        matrix(found["F"], "Fisher = Gauss–Newton", limit=limit),
        curves(lines, "In training", x="steps", mark=point),
        curves({"": (place, found["values"])}, "Eigenvalues of the Hessian", x="number"),
    ]


TOPIC = Topic(
    formula="H = Σ J^{⊤} (∇^{2} ℓ) J + Σ (∂ℓ/∂z) ∇^{2} z = G + residual\n"
    "F = E_{y ∼ p}[∇ log p ∇ log p^{⊤}] = G   for a likelihood",
    example=example,
    numbers=(
        Number("error", "relative difference of Hessian and Fisher", ".3f"),
        Number("same", "relative difference of Fisher and Gauss–Newton", ".1e"),
        Number("value", "loss", ".3f"),
        Number("negative", "negative eigenvalues of the Hessian (of 63)", "d"),
    ),
    meaning="After {steps} steps the loss is {value:.3f}; Hessian and Fisher differ by "
    "{error:.0%}. Fisher and Gauss–Newton agree to {same:.0e} always. The Hessian has {negative} "
    "negative eigenvalues, the Fisher matrix never has one: that is why optimisers "
    "precondition with it.",
    picture=picture,
    slider=Slider("steps", (0, 20, 50, 100, 200, 400), "Training steps"),
    exercise="What makes the two differ, and when does that go away?",
    answer="The residual term: the gradient at the outputs times the curvature of the network. It "
    "goes away where the outputs' gradients p − y vanish, or where the network is linear.",
    sources=("Martens (2020), New insights on the natural gradient method, arXiv:1412.1193.",),
)
