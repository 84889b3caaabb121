"""Matrices that come from geometry: meshes, and particles that interact by their distances."""

from matrigami.geometry import mesh, particles

__all__ = ["mesh", "particles"]
