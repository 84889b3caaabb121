"""Three ways to model a system: a mesh, particles, a network. Each ends in a matrix."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.geometry.mesh import Grid
from matrigami.geometry.particles import kernel_matrix


def example(n: int = 16) -> dict[str, Any]:
    """Solve with the matrix of each."""
    grid = Grid((n, n))  # mesh: piece-wise linear functions
    A, f = grid.stiffness(), grid.load(lambda x, y: 1 + x * y)
    u = mg.solve(A, f)

    points = torch.rand(n * n).sort().values  # particles: pair-wise functions
    K = kernel_matrix(points, "matern32", scale=0.3) + 0.01 * mg.identity(n * n)
    b = torch.sin(9 * points)
    w = mg.solve(K, b)

    net = torch.nn.Sequential(torch.nn.Linear(n, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    data = torch.randn(64, n), torch.randint(3, (64,))  # network: a composition of functions
    F = mg.curvature.kfac(net, torch.nn.CrossEntropyLoss(), [data])
    g = torch.randn(F.shape[0])
    step = mg.solve(F, g, 1e-2)  # a natural gradient, damped

    residuals = [(A @ u - f).norm() / f.norm(), (K @ w - b).norm() / b.norm()]
    residuals += [(F @ step + 1e-2 * step - g).norm() / g.norm()]
    worst, unknowns = max(residuals), n * n
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The three matrices."""
    del runs
    F = found["F"].dense().detach()
    return [
        matrix(found["A"].dense()[:64, :64], "Mesh", note="64 of the rows: sparse, Kronecker sum"),
        matrix(found["K"].dense(), "Particles", note="dense; far blocks of low rank"),
        matrix(F, "Network", note="a Kronecker product per layer", limit=float(F.abs().max()) / 5),
    ]


TOPIC = Topic(
    formula="mesh:   A u = f        particles:   K w = b,   K_{ij} = k(|x_{i} − x_{j}|)\n"
    "network:   (F + λ I) Δ = ∇ℓ,   F ≈ B ⊗ A",
    example=example,
    numbers=(
        Number("worst", "largest relative residual of the three solutions", ".1e"),
        Number("unknowns", "unknowns of mesh and particles", ",d"),
    ),
    meaning="A mesh of {unknowns} points, {unknowns} particles and a network end in the same call, "
    "`mg.solve`, with three different structures behind it: sines, a hierarchical "
    "factorisation, eigenvectors of small factors. The largest residual is {worst:.0e}.",
    picture=picture,
    slider=Slider("n", (8, 12, 16, 20, 24), "Points in each direction"),
    exercise="Which of the three matrices could be stored with n numbers, n log n numbers, and "
    "which needs the square?",
    answer="None needs the square: the mesh stores two numbers whatever its size, the particles on "
    "a line n log n (low rank between halves), the network a small matrix on each side of every "
    "layer. Stored dense, all three need it.",
    sources=(
        "Hackbusch (2015), Hierarchical matrices: algorithms and analysis.",
        "Martens and Grosse (2015), K-FAC, arXiv:1503.05671.",
    ),
)
