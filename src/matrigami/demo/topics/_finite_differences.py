"""Finite differences: Poisson's equation as a system, and the order of its error."""

import math
from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.geometry.mesh import Grid


def example(n: int = 31) -> dict[str, Any]:
    """Solve -Δu = f where the solution is known, on a grid and on one of half its step."""
    errors = []
    for size in (n, 2 * n + 1):
        grid = Grid((size, size))
        A = grid.stiffness()  # a Kronecker sum of second differences
        exact = grid.values(lambda x, y: torch.sin(math.pi * x) * torch.sin(2 * math.pi * y))
        f = grid.load(
            lambda x, y: 5 * math.pi**2 * torch.sin(math.pi * x) * torch.sin(2 * math.pi * y)
        )
        u = mg.solve(A, f)
        errors.append(float((u - exact).abs().max()))
    error, ratio = errors[0], errors[0] / errors[1]
    unknowns, stored = n * n, mg.cost(Grid((n, n)).stiffness()).params
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The matrix of a small grid, the solution, and errors against steps."""
    small, n = Grid((6, 6)).stiffness().dense(), found["size"]
    steps, errors = [1 / (r["n"] + 1) for r in runs], [r["error"] for r in runs]
    point = (1 / (found["n"] + 1), found["error"])
    title = "The error falls as h²"
    return [
        matrix(small, "A of a 6 × 6 grid", note="−1, 4, −1: each point and its neighbours"),
        matrix(found["u"].reshape(n, n), "u", note=f"{n} × {n} unknowns"),
        curves({"": (steps, errors)}, title, x="step h", y="largest error", log="xy", mark=point),
    ]


TOPIC = Topic(
    formula="−u″(x) ≈ (−u_{i−1} + 2 u_{i} − u_{i+1}) / h^{2}   in each direction\n"
    "A = T ⊗ I + I ⊗ T,   A u = f",
    example=example,
    numbers=(
        Number("ratio", "times smaller is the error with half the step", ".2f"),
        Number("error", "largest error on the grid", ".2e"),
        Number("unknowns", "unknowns", ",d"),
        Number("stored", "numbers that the matrix stores", ",d"),
    ),
    meaning="A grid of {n} × {n} points gives an error of {error:.1e}; half the step makes it "
    "{ratio:.2f} times smaller. The matrix of {unknowns:,} unknowns is a Kronecker sum of two "
    "second differences, {stored} numbers, and `solve` uses their sines: no elimination.",
    picture=picture,
    slider=Slider("n", (7, 15, 31, 63, 127), "Points in each direction"),
    exercise="How many points would you need for an error of one millionth?",
    answer="The error is proportional to h². From the numbers above with step h and error e you "
    "need the step h · √(10⁻⁶ / e): about 1800 points in each direction, 3 million unknowns. "
    "`solve` does that too: the Kronecker sum still stores two numbers.",
    sources=("LeVeque (2007), Finite difference methods for differential equations, chapter 3.",),
)
