"""Matrices that come from geometry: particles, whose interactions depend on distances."""

from matrigami.geometry import particles

__all__ = ["particles"]
