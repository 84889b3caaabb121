"""Finite differences on a rectangular grid, in any dimension.

`-div(c grad u) = f` becomes `A u = f`. With a constant coefficient, or one for each axis, `A` is a
Kronecker sum of second differences, solved by fast diagonalisation; with a coefficient for each
node it is a `DiffusionMatrix`, solved by conjugate gradients with a multigrid preconditioner.

Shapes: d = dimensions, n = unknowns in all, the last axis fastest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.geometry.mesh._differences import (
    Boundary,
    SecondDifferenceMatrix,
    first_difference,
)
from matrigami.geometry.mesh._diffusion import DiffusionMatrix
from matrigami.geometry.mesh._functions import given_at
from matrigami.operators import LinearOperator, free_memory, identity, kron, kron_sum

BOUNDARIES = ("dirichlet", "neumann", "periodic")


@dataclass(frozen=True)
class Grid:
    """The unknowns of a grid on the box from the origin to `lengths`.

    Args:
        sizes: Unknowns along each axis.
        lengths: Sides of the box; 1 by default.
        boundary: `dirichlet` (zero on the boundary; unknowns are interior points at `h, 2 h, ...`,
            `h = length / (size + 1)`), `neumann` (no flux; unknowns are centres of cells) or
            `periodic`; one for all axes, or one for each.
        dtype: Type of all matrices.
        device: Where they are.

    Raises:
        ValueError: If a size is below 1, a length is not positive, or the boundary is unknown.

    Examples:
        >>> import matrigami as mg
        >>> grid = Grid((3, 3))
        >>> A = grid.stiffness()
        >>> A
        KroneckerSumMatrix(9x9, 2 parameters)
        >>> u = mg.solve(A, grid.load(lambda x, y: 1.0 + 0 * x))
        >>> round(float(u[4]), 6)
        0.070312
    """

    sizes: Sequence[int]
    lengths: Sequence[float] | float = 1.0
    boundary: Boundary | Sequence[Boundary] = "dirichlet"
    dtype: torch.dtype = field(default=torch.float64, kw_only=True)
    device: torch.device | str = field(default="cpu", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        d = len(self.sizes)
        for name, values in (("lengths", self.sides), ("boundary", self.ends)):
            _require(len(values) == d, self, f"it has {d} sizes but {len(values)} {name}.")
        whole = d >= 1 and all(isinstance(n, int) and n >= 1 for n in self.sizes)
        _require(whole, self, "each size must be a whole number of at least 1.")
        _require(all(0 < x < float("inf") for x in self.sides), self, "lengths must be positive.")
        unknown = set(self.ends) - set(BOUNDARIES)
        _require(not unknown, self, f"boundaries are {', '.join(BOUNDARIES)}.")

    @property
    def sides(self) -> tuple[float, ...]:
        """The length of each axis."""
        given = self.lengths
        return (given,) * len(self.sizes) if isinstance(given, int | float) else tuple(given)

    @property
    def ends(self) -> tuple[str, ...]:
        """The boundary of each axis."""
        given = self.boundary
        return (given,) * len(self.sizes) if isinstance(given, str) else tuple(given)

    @property
    def spacings(self) -> tuple[float, ...]:
        """The distance of neighbours along each axis."""
        along = zip(self.sizes, self.sides, self.ends, strict=True)
        return tuple(side / (n + (end == "dirichlet")) for n, side, end in along)

    def points(self) -> Float[Tensor, "n d"]:
        """Where the unknowns are.

        Raises:
            ValueError: If they do not fit into the free memory.
        """
        wanted = 2 * math.prod(self.sizes) * len(self.sizes) * self.dtype.itemsize
        free = free_memory(torch.device(self.device))
        fits = f"its points would take {wanted / 2**30:.1f} GiB, and {free / 2**30:.1f} are free."
        _require(wanted <= free, self, fits)
        offsets = {"dirichlet": 1.0, "neumann": 0.5, "periodic": 0.0}
        axes = [
            (torch.arange(n, dtype=self.dtype, device=self.device) + offsets[end]) * h
            for n, h, end in zip(self.sizes, self.spacings, self.ends, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    def stiffness(self, coefficient: Any = 1.0) -> LinearOperator:
        """The matrix of `u -> -div(c grad u)`, symmetric and positive (semi-)definite.

        Args:
            coefficient: A number, a number for each axis, or a function of the coordinates or a
                tensor of the sizes of the grid: the value at each unknown, positive. Between two
                unknowns it is their harmonic mean, which conserves the flux through a jump.

        Raises:
            ValueError: If it is not positive or of another shape.
        """
        X = self.points() if callable(coefficient) else torch.zeros(0, 1, dtype=self.dtype)
        c = given_at("stiffness(coefficient)", coefficient, X.to(self.device))
        if c.ndim == 0 or (c.shape == (len(self.sizes),) and c.shape != tuple(self.sizes)):
            terms = [
                SecondDifferenceMatrix(factor / h**2, n, end)
                for factor, h, n, end in zip(
                    c.expand(len(self.sizes)), self.spacings, self.sizes, self.ends, strict=True
                )
            ]
            return terms[0] if len(terms) == 1 else kron_sum(*terms)
        unknowns = math.prod(self.sizes)
        if c.numel() != unknowns:
            raise ValueError(
                f"stiffness(coefficient): it has shape {tuple(c.shape)} on {self}.\n"
                f"Give a number, one for each axis, or one for each of the {unknowns} unknowns."
            )
        return DiffusionMatrix.of(c.reshape(tuple(self.sizes)), self.spacings, self.ends)

    def mass(self) -> LinearOperator:
        """The identity times the volume of a cell: `u . M v` is the integral of `u v`."""
        volume = torch.tensor(self.spacings, dtype=self.dtype, device=self.device).prod()
        return volume * identity(len(self.points()), dtype=self.dtype, device=self.device)

    def gradient(self) -> tuple[LinearOperator, ...]:
        """The matrix of `(f2 - f1) / h` along each axis, a row for each face between unknowns.

        `sum(G.T @ G for G in gradient())` is the stiffness matrix of the coefficient 1.
        """
        parts = []
        for axis, (n, h, end) in enumerate(zip(self.sizes, self.spacings, self.ends, strict=True)):
            D = first_difference(n, h, end, self.dtype, torch.device(self.device))
            eyes = [identity(m, dtype=self.dtype, device=self.device) for m in self.sizes]
            factors = [D if a == axis else eye for a, eye in enumerate(eyes)]
            parts.append(kron(*factors) if len(factors) > 1 else D)
        return tuple(parts)

    def load(self, function: Callable[..., Any]) -> Inexact[Tensor, " n"]:
        """The right-hand side: a function of the coordinates at the unknowns."""
        return self.values(function)

    def values(self, function: Callable[..., Any]) -> Inexact[Tensor, " n"]:
        """A function of the coordinates `f(x, y, ...)` of tensors, at the unknowns."""
        return given_at("values(function)", function, self.points())

    def norm(self, u: Inexact[Tensor, " n"]) -> Float[Tensor, ""]:
        """The norm of L2: the root of the integral of the square."""
        return (u.abs().square().sum() * torch.tensor(self.spacings).prod()).sqrt()


def _require(holds: bool, grid: Grid, what: str) -> None:
    """Refuse a grid."""
    if not holds:
        raise ValueError(
            f"Grid({tuple(grid.sizes)}, {grid.lengths}, {grid.boundary!r}): {what}\n"
            "For example Grid((63, 63)), or Grid((64, 64), (1.0, 2.0), ('periodic', 'neumann'))."
        )
