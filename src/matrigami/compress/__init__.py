"""Compression: weights rounded, removed or restructured where the loss feels it least."""

from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._removal import Removal, Support, n_of_m, remove, unstructured
from matrigami.compress._rounding import Rounding, round_ldl
from matrigami.compress._waterfill import LatticeMatrix, Waterfilling, entropy, round_waterfill

__all__ = [
    "Grid",
    "LatticeMatrix",
    "QuantizedMatrix",
    "Removal",
    "Rounding",
    "Support",
    "Waterfilling",
    "entropy",
    "n_of_m",
    "remove",
    "round_ldl",
    "round_waterfill",
    "unstructured",
]
