"""Compression: weights rounded, removed or restructured where the loss feels it least."""

from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._rounding import Rounding, round_ldl
from matrigami.compress._waterfill import LatticeMatrix, Waterfilling, entropy, round_waterfill

__all__ = [
    "Grid",
    "LatticeMatrix",
    "QuantizedMatrix",
    "Rounding",
    "Waterfilling",
    "entropy",
    "round_ldl",
    "round_waterfill",
]
