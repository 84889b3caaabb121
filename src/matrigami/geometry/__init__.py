"""Matrices that come from geometry: meshes, particles, and any that compress by it."""

from matrigami.geometry import mesh, particles
from matrigami.geometry._distributed import (
    DistributedMatrix,
    distributed,
    distributed_kernel_matrix,
)
from matrigami.geometry._hierarchical import hierarchical
from matrigami.geometry._ordered import relative_error
from matrigami.geometry._tiles import block_low_rank

__all__ = [
    "DistributedMatrix",
    "block_low_rank",
    "distributed",
    "distributed_kernel_matrix",
    "hierarchical",
    "mesh",
    "particles",
    "relative_error",
]
