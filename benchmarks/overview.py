"""The figure of the first screen of the README: four kinds of matrices, one algebra.

`python -m benchmarks.overview` writes `docs/overview.png` and prints its alternative text, with the
same numbers; a test asks whether the README has it.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import matrigami as mg
from matrigami.compress import Grid, round_ldl
from matrigami.curvature import kfac
from matrigami.geometry.particles import kernel_matrix

TARGET = Path(__file__).parent.parent / "docs" / "overview.png"
SIZE = 1024
COLOR = "#0072B2"
DOUBLE = torch.float64


@dataclass(frozen=True)
class Shown:
    """A matrix of the figure.

    Attributes:
        heading: The chapter that it stands for.
        what: What it is, in words.
        call: What made it.
        image: The sizes of its entries, small blocks of them as one.
        share: Its bytes, as a share of those of a dense matrix.
        residual: Of `solve(A, b)`, relative to `b`.
    """

    heading: str
    what: str
    call: str
    image: Tensor
    share: float
    residual: float


def matrices() -> list[Shown]:
    """A structure, a geometry, a curvature, a compressed weight; all of one size."""
    torch.manual_seed(0)
    A, B = (torch.randn(2, 32, 32, dtype=DOUBLE) + 6 * torch.eye(32, dtype=DOUBLE)).unbind()
    points = torch.linspace(0, 1, SIZE, dtype=DOUBLE)
    W = torch.randn(SIZE, SIZE, dtype=DOUBLE) * (1.2 + torch.sin(10 * points))[:, None]
    return [
        _shown("Structures", "a Kronecker product", "kron(A, B)", mg.kron(A, B)),
        _shown(
            "Geometry",
            "a kernel of points",
            'kernel_matrix(x, "matern12")',
            kernel_matrix(points, "matern12", scale=0.1),
        ),
        _shown("Curvature", "a Fisher matrix", "kfac(model, loss, data)", _fisher()),
        _shown(
            "Compression",
            "a weight of 4 bits",
            "round_ldl(W, grid=Grid(4))",
            round_ldl(W, grid=Grid(4)).value,
        ),
    ]


def _fisher() -> mg.LinearOperator:
    """K-FAC of a network with 1024 weights, damped."""
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))
    x, y = (
        torch.randn(256, 16, dtype=DOUBLE) * torch.linspace(0.1, 2, 16, dtype=DOUBLE),
        torch.arange(256) % 16,
    )
    return mg.shift(kfac(net.double(), nn.CrossEntropyLoss(), (x, y)), 1e-4)


def _shown(heading: str, what: str, call: str, A: mg.LinearOperator) -> Shown:
    """Ask a matrix the questions of the figure."""
    b = torch.ones(SIZE, dtype=DOUBLE)
    residual = float((A @ mg.solve(A, b) - b).norm() / b.norm())
    tiles = A.dense().abs().reshape(SIZE // 4, 4, SIZE // 4, 4)
    share = mg.cost(A).bytes / (SIZE * SIZE * A.dtype.itemsize)
    return Shown(heading, what, call, tiles.amax((1, 3)), share, residual)


def alternative(found: list[Shown]) -> str:
    """What the figure says, in words."""
    parts = [f"{s.what} stored in {100 * s.share:.1f} %" for s in found]
    worst = max(s.residual for s in found)
    return (
        f"Four matrices of {SIZE} × {SIZE}, one algebra: {', '.join(parts)} of the bytes of a "
        f"dense matrix in double precision; solve(A, b) leaves at most {worst:.0e} of b"
    )


def draw(found: list[Shown]) -> None:
    """Pictures, the calls that made them, and what they take."""
    figure, rows = plt.subplots(
        2, 4, figsize=(12, 5.1), height_ratios=(14, 1), layout="constrained", facecolor="white"
    )
    for (picture, bar), s in zip(rows.T, found, strict=True):
        scale = (s.image / s.image.max()).clamp(min=1e-4).log10()
        picture.imshow(scale, cmap="Blues", vmin=-3, vmax=0, interpolation="nearest")
        picture.set_title(f"{s.heading}\n", fontsize=15, fontweight="bold")
        picture.text(
            0.5,
            1.03,
            s.call,
            transform=picture.transAxes,
            ha="center",
            family="monospace",
            fontsize=9,
        )
        picture.set(xticks=[], yticks=[], xlabel=f"{s.what}, {SIZE} × {SIZE}")
        bar.barh([0], [1], color="#E3E7EC")
        bar.barh([0], [s.share], color=COLOR)
        bar.set(xlim=(0, 1), ylim=(-0.5, 0.5), xticks=[], yticks=[])
        bar.set_xlabel(f"{100 * s.share:.1f} % of the bytes\nsolve(A, b) leaves {s.residual:.0e}")
        bar.spines[:].set_visible(False)
    figure.suptitle(
        "A @ x    solve(A, b)    logdet(A)    project(recipe, W)    cost(A)\n",
        family="monospace",
        fontsize=13,
        color=COLOR,
    )
    figure.savefig(TARGET, dpi=100)


if __name__ == "__main__":
    found = matrices()
    draw(found)
    print(alternative(found))
