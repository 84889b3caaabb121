"""Compression: weights rounded, removed or restructured where the loss feels it least."""

from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._rounding import Rounding, round_ldl

__all__ = ["Grid", "QuantizedMatrix", "Rounding", "round_ldl"]
