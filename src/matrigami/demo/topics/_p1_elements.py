"""P1 elements: the tones of an L-shaped drum."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix, mesh as drawn
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.geometry.mesh import Simplices


def example(n: int = 8) -> dict[str, Any]:
    """The smallest eigenvalues of the Laplacian on three quarters of a square."""
    square = Simplices.box((2 * n, 2 * n), 2.0)
    centres = square.vertices[square.cells].mean(1)
    drum = Simplices(square.vertices, square.cells[(centres < 1).any(1)])
    mass = drum.mass() @ torch.ones(len(drum.free))  # lumped: the area around each vertex
    root = mg.DiagonalMatrix(mass**-0.5)
    A = root @ drum.stiffness() @ root  # K v = lambda M v as A w = lambda w
    values, vectors = mg.eigh(mg.inverse(A), 3)  # the largest of the inverse
    tones = 1 / values
    first, third, exact = tones[0], tones[2], 9.6397238440219
    error, unknowns = abs(first - exact) / exact, len(drum.free)
    mode = drum.extended(root @ vectors.dense()[:, 0])
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The mesh with the first mode, the matrix, and the error."""
    drum, mode = found["drum"], found["mode"]
    sizes, errors = [1 / r["n"] for r in runs], [r["error"] for r in runs]
    stiffness = drum.stiffness().dense()[:80, :80]
    point, note = (1 / found["n"], float(found["error"])), f"{len(drum.cells)} triangles"
    return [
        drawn(drum.vertices, drum.cells, mode * mode.sum().sign(), "The first tone", note),
        matrix(stiffness, "Stiffness matrix", note="80 of its rows: neighbours only"),
        curves({"": (sizes, errors)}, "Error", x="step h", y="relative", log="xy", mark=point),
    ]


TOPIC = Topic(
    formula="u(x) = Σ u_{i} φ_{i}(x),   φ_{i} piece-wise linear, 1 at vertex i\n"
    "K_{ij} = ∫ ∇φ_{i} · ∇φ_{j},   M_{ij} = ∫ φ_{i} φ_{j},   K v = λ M v",
    example=example,
    numbers=(
        Number("first", "first eigenvalue (exact: 9.6397)", ".4f"),
        Number("third", "third eigenvalue (exact: 2π² = 19.7392)", ".4f"),
        Number("error", "relative error of the first", ".1e"),
        Number("unknowns", "unknowns", ",d"),
    ),
    meaning="{unknowns} unknowns give the first tone {first:.4f}, {error:.2%} from the known one. "
    "The third, {third:.3f}, is the tone of a single square, whose sine fits into the L. The "
    "corner spoils the order of the first: its mode is not smooth there.",
    picture=picture,
    slider=Slider("n", (4, 6, 8, 12, 16), "Squares along a side"),
    exercise="Why does one find the smallest eigenvalues through the inverse?",
    answer="Lanczos' method finds the eigenvalues of largest magnitude first. Those of A⁻¹ are the "
    "reciprocals of the smallest of A, and a product with A⁻¹ is a solve whose sparse factors are "
    "made once.",
    sources=("Trefethen and Betcke (2006), Computed eigenmodes of planar regions.",),
)
