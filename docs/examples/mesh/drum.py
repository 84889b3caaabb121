"""The tones of an L-shaped drum: eigenvalues of the Laplacian by P1 elements and shift-invert.

`K v = lambda M v` with the lumped mass `M = diag(m)` is `A w = lambda w` for the sparse matrix
`A = m^-1/2 K m^-1/2`. The smallest eigenvalues are the largest of `A^-1`, which Lanczos' method
finds by a solve in each step; the factors of `A` are made once. The first one of the L of three
unit squares is 9.6397238440219 (Trefethen and Betcke 2006), the third 2 pi^2.
"""

import sys

import torch
from torch import Tensor

import matrigami as mg
from matrigami.geometry.mesh import Simplices


def drum(n: int) -> Simplices:
    """Three of the four quarters of a square of side 2, `2 n` squares along each side."""
    square = Simplices.box((2 * n, 2 * n), 2.0)
    centres = square.vertices[square.cells].mean(1)
    return Simplices(square.vertices, square.cells[(centres < 1).any(1)])


def tones(mesh: Simplices, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest eigenvalues, and the modes at all vertices as columns."""
    root = mg.DiagonalMatrix((mesh.mass() @ torch.ones(len(mesh.free)).double()) ** -0.5)
    A = root @ mesh.stiffness() @ root
    values, vectors = mg.eigh(mg.inverse(A), k)
    return 1 / values, torch.stack([mesh.extended(v) for v in (root @ vectors.dense()).T], 1)


def draw(mesh: Simplices, values: Tensor, modes: Tensor, path: str) -> None:
    """Six modes."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only for the figure

    figure, axes = plt.subplots(1, modes.shape[1], figsize=(2.2 * modes.shape[1], 2.5))
    x, y = mesh.vertices.T
    for ax, value, mode in zip(axes, values, modes.T, strict=True):
        peak = float(mode.abs().max())
        levels = torch.linspace(-peak, peak, 16)
        ax.tricontourf(x, y, mesh.cells, mode, levels=levels, cmap="RdBu_r")
        ax.set_title(f"{float(value):.2f}", fontsize=10)
        ax.set_aspect("equal")
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    mesh = drum(32)
    values, modes = tones(mesh, 6)
    print(f"{len(mesh.free)} unknowns, eigenvalues", [round(float(v), 3) for v in values])
    if len(sys.argv) > 1:
        draw(mesh, values, modes, sys.argv[1])
