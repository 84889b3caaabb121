"""A loss is a composition, and its gradient a product of matrices; the last step is -log p."""

from collections.abc import Sequence
from typing import Any

import torch

from matrigami.demo._draw import Panel, bars, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(confidence: float = 1.0) -> dict[str, Any]:
    """The gradient of a network by the chain rule, written as matrices."""
    from torch.func import grad, jacrev

    W, V, x = torch.randn(12, 16) / 4, confidence * torch.randn(5, 12), torch.randn(16)

    def h(x: torch.Tensor) -> torch.Tensor:
        return W @ x

    def g(s: torch.Tensor) -> torch.Tensor:
        return V @ torch.tanh(s)

    def f(z: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(z, 0)[2]  # -log p of the right class

    Jf, Jg, Jh = jacrev(f)(g(h(x))), jacrev(g)(h(x)), jacrev(h)(x)
    difference = (Jf @ Jg @ Jh - grad(lambda x: f(g(h(x))))(x)).abs().max()
    p, loss = torch.softmax(g(h(x)), 0), f(g(h(x)))
    right, residual = p[2], (Jf - (p - torch.eye(5)[2])).abs().max()
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """-log p, the probabilities, and the matrices of the chain."""
    del runs
    grid = torch.linspace(0.004, 1, 120)
    point = (float(found["right"]), float(found["loss"]))
    shares = {
        f"class {i}{' (right)' if i == 2 else ''}": float(p) for i, p in enumerate(found["p"])
    }
    return [
        curves({"": (grid, -grid.log())}, "Loss", x="p of the right class", y="−log p", mark=point),
        bars(shares, "Probabilities", y="p", spec=".3f"),
        matrix(found["Jg"], "Jacobian of g", note="V diag(1 − tanh²)"),
        matrix(found["Jf"][None].expand(2, -1), "Jacobian of f", note="p − y: one row"),
    ]


TOPIC = Topic(
    formula="ℓ = f(g(h(x))),   ∂ℓ/∂x = J_{f} J_{g} J_{h}   (multiplied from the left: backprop)\n"
    "f(z) = −log p_{y},   p = softmax(z),   J_{f} = (p − y)^{⊤}",
    example=example,
    numbers=(
        Number("loss", "loss, −log p of the right class", ".4f"),
        Number("right", "p of the right class", ".4f"),
        Number("difference", "difference of J_f J_g J_h from autograd", ".1e"),
        Number("residual", "difference of J_f from p − y", ".1e"),
    ),
    meaning="The right class has p = {right:.3f}, so the loss is {loss:.3f}. Three Jacobians "
    "multiplied give the gradient of autograd to {difference:.0e}. From the left each product is a "
    "row times a matrix; from the right it would be a matrix times a matrix: that is why "
    "gradients go backwards.",
    picture=picture,
    slider=Slider("confidence", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), "Size of the logits"),
    exercise="What is the loss of a network that knows nothing about 5 classes, and what happens "
    "to it as the network becomes sure of a wrong class?",
    answer="It is log 5 = 1.609: move the slider to 0. A sure and wrong network pays without "
    "limit, since −log p → ∞ as p → 0; its gradient p − y stays below 1 in every entry.",
    sources=(
        "Griewank and Walther (2008), Evaluating derivatives.",
        "Good (1952), Rational decisions: the logarithmic score.",
    ),
)
