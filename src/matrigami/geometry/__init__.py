"""Matrices that come from geometry: meshes, particles, and any that compress by it."""

from matrigami.geometry import mesh, particles
from matrigami.geometry._distributed import DistributedMatrix, distributed
from matrigami.geometry._hierarchical import hierarchical, relative_error

__all__ = [
    "DistributedMatrix",
    "distributed",
    "hierarchical",
    "mesh",
    "particles",
    "relative_error",
]
