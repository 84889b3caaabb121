"""Heat in a wall of two materials: implicit Euler and Crank-Nicolson steps with kept factors.

    python docs/examples/mesh/implicit_heat.py [figure.png]

    implicit Euler     (I + dt A) u+ = u
    Crank-Nicolson     (I + dt/2 A) u+ = (I - dt/2 A) u

`A = -div(c grad)` with a conductivity that jumps. The matrix of a step is sparse and always the
same: `solve` factorises it once. The error of implicit Euler halves with the step, that of
Crank-Nicolson quarters.
"""

import sys

import torch
from torch import Tensor

import matrigami as mg
from matrigami.geometry.mesh import Grid


def wall(x: Tensor, y: Tensor) -> Tensor:
    """Conductivity: ten times higher in the right half."""
    return torch.where(x < 0.5, 0.1, 1.0) + 0 * y


def cooled(n: int, dt: float, steps: int, theta: float) -> Tensor:
    """The temperature after some steps; `theta` 1 is implicit Euler, 1/2 Crank-Nicolson."""
    grid = Grid((n, n))
    A = grid.stiffness(wall)
    u = grid.values(lambda x, y: torch.sin(torch.pi * x) * torch.sin(torch.pi * y))
    left = mg.shift((theta * dt) * A.sparse(), 1.0)
    for _ in range(steps):
        u = mg.solve(left, u - (1 - theta) * dt * (A @ u))
    return u


def draw(path: str) -> None:
    """The temperature at four times, by Crank-Nicolson steps."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - only for the figure

    times = (0.0, 0.05, 0.2, 0.8)
    figure, axes = plt.subplots(1, len(times), figsize=(11, 2.8), layout="constrained")
    for ax, t in zip(axes, times, strict=True):
        u = cooled(63, t / 32, 32, 0.5).reshape(63, 63).T
        image = ax.imshow(u, origin="lower", extent=(0, 1, 0, 1), cmap="inferno", vmin=0)
        ax.axvline(0.5, color="white", linewidth=0.5, linestyle="--")
        ax.set_title(f"t = {t:g}", fontsize=10)
        ax.set_xticks([0, 0.5, 1])
        ax.set_yticks([])
        figure.colorbar(image, ax=ax, shrink=0.8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exact = cooled(31, 0.1 / 512, 512, 0.5)
    print("steps  implicit Euler  Crank-Nicolson   (relative errors)")
    for steps in (8, 16, 32):
        errors = [cooled(31, 0.1 / steps, steps, theta) - exact for theta in (1.0, 0.5)]
        print(f"{steps:5}  " + "  ".join(f"{float(e.norm() / exact.norm()):14.2e}" for e in errors))
    if len(sys.argv) > 1:
        draw(sys.argv[1])
