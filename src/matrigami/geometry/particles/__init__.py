"""Particles: matrices whose entries are functions of the distance of two points."""

from matrigami.geometry.particles._forces import (
    forces,
    potential_energy,
)
from matrigami.geometry.particles._kernels import (
    KERNELS,
    Kernel,
)
from matrigami.geometry.particles._matrix import (
    error_estimate,
    kernel_matrix,
)

__all__ = [
    "KERNELS",
    "Kernel",
    "error_estimate",
    "forces",
    "kernel_matrix",
    "potential_energy",
]
