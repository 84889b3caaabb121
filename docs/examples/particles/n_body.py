"""Stars that attract each other: leapfrog steps conserve the energy.

    python docs/examples/particles/n_body.py [stars] [figure.png]

Softened gravitation (Plummer's potential) of a rotating cloud of total mass one; the forces are the
gradient of the potential energy. Three lines are the integrator (Verlet 1967, Phys. Rev. 159).
"""

import sys

import torch
from torch import Tensor

from matrigami.geometry.particles import forces, potential_energy

SOFTENING = 0.1
"""Distance below which the attraction is weakened: `G m m' / sqrt(r^2 + softening^2)`, `G = 1`."""


def simulate(n: int, steps: int, dt: float = 0.01) -> tuple[list[Tensor], list[float]]:
    """The places of the stars and the energy, at the start and after each step."""
    torch.manual_seed(0)
    x = 0.5 * torch.randn(n, 3, dtype=torch.float64)
    v = 0.8 * torch.stack([-x[:, 1], x[:, 0], 0 * x[:, 2]], 1)
    mass = torch.full((n,), 1 / n, dtype=torch.float64)

    def acceleration(x: Tensor) -> Tensor:
        """Gravitation attracts: the opposite of the repulsion of like charges."""
        return -forces(x, mass, "multiquadric", scale=SOFTENING) / (SOFTENING * mass[:, None])

    def energy() -> float:
        """Kinetic and potential."""
        potential = potential_energy(x, mass, "multiquadric", scale=SOFTENING) / SOFTENING
        return float(0.5 * (mass[:, None] * v.square()).sum() - potential)

    places, energies, a = [x], [energy()], acceleration(x)
    for _ in range(steps):
        v = v + 0.5 * dt * a
        x = x + dt * v
        v = v + 0.5 * dt * (a := acceleration(x))
        places.append(x)
        energies.append(energy())
    return places, energies


def draw(places: list[Tensor], energies: list[float], path: str) -> None:
    """Three moments of the cloud, and the relative change of the energy."""
    import matplotlib as mpl  # noqa: PLC0415 - only for the figure

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    last = len(places) - 1
    for axis, step in zip(axes, (0, last // 2, last), strict=False):
        axis.scatter(places[step][:, 0], places[step][:, 1], s=2, alpha=0.6, linewidths=0)
        axis.set(title=f"step {step}", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    drift = [(e - energies[0]) / abs(energies[0]) for e in energies]
    axes[3].plot(drift)
    axes[3].set(title="relative change of energy", xlabel="step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    places, energies = simulate(n, steps=200)
    print(f"energy {energies[0]:.6f}, at the end {energies[-1]:.6f}")
    if len(sys.argv) > 2:
        draw(places, energies, sys.argv[2])
