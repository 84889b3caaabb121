"""Meshes: matrices of piece-wise linear functions, on grids and on simplices."""

from matrigami.geometry.mesh._differences import SecondDifferenceMatrix
from matrigami.geometry.mesh._diffusion import DiffusionMatrix
from matrigami.geometry.mesh._grid import Grid
from matrigami.geometry.mesh._multigrid import MultigridMatrix, multigrid
from matrigami.geometry.mesh._simplices import Simplices

__all__ = [
    "DiffusionMatrix",
    "Grid",
    "MultigridMatrix",
    "SecondDifferenceMatrix",
    "Simplices",
    "multigrid",
]
