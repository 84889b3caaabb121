"""Particles: the fast multipole method as a matrix."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.geometry.particles import error_estimate, kernel_matrix


def example(digits: int = 4) -> dict[str, Any]:
    """The potential of all charges at all of them, without n² terms."""
    n = 5000
    x = torch.rand(n, 2)
    A = kernel_matrix(x, "coulomb2d", tol=10.0**-digits)  # K(r) = -log r
    potential = A @ torch.ones(n)
    error = error_estimate(A, x, "coulomb2d")
    macs, pairs = mg.cost(A).macs, n * n
    saving = pairs / macs
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The points, the errors, and the cost."""
    tolerance, shown = [10.0 ** -r["digits"] for r in runs], found["x"][:1500]
    errors, macs = [r["error"] for r in runs], [r["macs"] / r["n"] for r in runs]
    lines = {"measured": (tolerance, errors), "asked for": (tolerance, tolerance)}
    at, each = 10.0 ** -found["digits"], found["macs"] / found["n"]
    cost = {"": (tolerance, macs)}
    return [
        curves({"": (shown[:, 0], shown[:, 1])}, "Charges", x="1500 of 5000", dots=True),
        curves(lines, "Error", x="tol", y="relative", log="xy", mark=(at, float(found["error"]))),
        curves(cost, "Cost of a product", x="tol", y="per charge", log="xy", mark=(at, each)),
    ]


TOPIC = Topic(
    formula="φ(x_{i}) = Σ_{j ≠ i} q_{j} K(|x_{i} − x_{j}|),   A_{ij} = K(|x_{i} − x_{j}|)\n"
    "cells that do not touch:   A_{ts} ≈ U_{t} C_{ts} U_{s}^{⊤}   with nested bases (H²)",
    example=example,
    numbers=(
        Number("error", "relative error of a product, measured on sampled rows", ".1e"),
        Number("saving", "times fewer multiply-adds than all pairs", ".1f"),
        Number("macs", "multiply-adds of a product", ",d"),
        Number("pairs", "pairs", ",d"),
    ),
    meaning="Of {pairs:,} pairs none far apart is formed: a product takes {macs:,} multiply-adds, "
    "{saving:.1f} times fewer, and is right to {error:.0e} where 1e-{digits} was asked for. "
    "Twice as many charges cost twice as much, not four times, so the saving grows with n.",
    picture=picture,
    slider=Slider("digits", (2, 3, 4, 6, 8), "Digits asked for"),
    exercise="With about 600 multiply-adds a charge, from how many charges on is this cheaper than "
    "all pairs, and by how much at a million?",
    answer="All pairs cost n a charge, so from about n = 600 on. At a million it is 10⁶ / 600 ≈ "
    "1700 times cheaper.",
    sources=(
        "Greengard and Rokhlin (1987), A fast algorithm for particle simulations.",
        "Fong and Darve (2009), The black-box fast multipole method.",
    ),
)
