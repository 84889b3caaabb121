"""P1 finite elements on triangles and tetrahedra (and intervals): piece-wise linear functions.

On a simplex with vertices `v0 ... vd` the basis functions have constant gradients `G`, the rows of
`inverse([v1 - v0, ..., vd - v0])` and minus their sum. Then

    stiffness   |T| c G G'          mass   |T| / ((d + 1)(d + 2)) (1 + delta_ij)

of all simplices in one batched expression, differentiable in the coefficient and in the vertices.
Source: Braess (2007), Finite Elements, chapter II.8.

Shapes: v = vertices, e = simplices, d = dimensions, n = unknowns (the vertices that are free).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor

from matrigami.geometry.mesh._functions import given_at
from matrigami.structures import SparseMatrix
from matrigami.structures._sparse import assembled


@dataclass(frozen=True, eq=False)
class Simplices:
    """Vertices, and the simplices between them.

    Args:
        vertices: Coordinates.
        cells: The `d + 1` vertices of each simplex.
        boundary: `dirichlet`: vertices on the boundary are zero and no unknowns; `neumann`: all
            vertices are unknowns, and nothing flows through the boundary.

    Raises:
        ValueError: If the shapes do not fit, an index is out of range, a coordinate is not finite,
            or a simplex has no volume.

    Examples:
        >>> mesh = Simplices.box((8, 8))
        >>> mesh.stiffness()
        SparseMatrix(49x49, 289 entries)
        >>> float(mesh.volumes.sum())
        1.0
    """

    vertices: Float[Tensor, "v d"]
    cells: Int[Tensor, "e d1"]
    boundary: Literal["dirichlet", "neumann"] = "dirichlet"

    def __post_init__(self) -> None:
        """Refuse what is no mesh."""
        if not self.vertices.is_floating_point() or self.cells.is_floating_point():
            raise TypeError(
                f"Simplices(vertices, cells): types {self.vertices.dtype}, {self.cells.dtype}.\n"
                "Give real coordinates, and indices: cells.long()."
            )
        d = self.vertices.shape[1]
        if not 1 <= d <= 3 or self.cells.shape[1] != d + 1 or not len(self.cells):
            raise ValueError(
                f"Simplices(vertices, cells): vertices {tuple(self.vertices.shape)}, cells "
                f"{tuple(self.cells.shape)}.\nIn d = 1, 2 or 3 dimensions a simplex has d + 1 "
                "vertices, and there must be at least one.\n"
                "Give vertices (v, d) and cells (e, d + 1)."
            )
        low, high = int(self.cells.min()), int(self.cells.max())
        if low < 0 or high >= len(self.vertices):
            raise ValueError(
                f"Simplices(vertices, cells): a cell names vertex {low if low < 0 else high}.\n"
                f"There are {len(self.vertices)} vertices.\nGive indices from 0."
            )
        if not bool(self.vertices.detach().isfinite().all()):
            raise ValueError(
                "Simplices(vertices, cells): a coordinate is not finite.\nGive finite coordinates."
            )
        volumes, size = self.volumes.detach(), self._edges.detach().abs().amax((-2, -1))
        flat = volumes <= 1e-12 * size**d
        if bool(flat.any()):
            raise ValueError(
                f"Simplices(vertices, cells): {int(flat.sum())} of {len(flat)} simplices have no "
                f"volume, the first is cell {int(flat.nonzero()[0])}.\n"
                "Its vertices lie in one plane, or two of them are one.\n"
                "Remove it, or move a vertex."
            )

    @classmethod
    def box(
        cls,
        sizes: Sequence[int],
        lengths: Sequence[float] | float = 1.0,
        boundary: Literal["dirichlet", "neumann"] = "dirichlet",
        dtype: torch.dtype = torch.float64,
    ) -> "Simplices":
        """A box, divided into cubes, each of them into `d!` simplices (Kuhn's triangulation).

        Args:
            sizes: Cubes along each axis.
            lengths: Sides of the box.
            boundary: As for the class.
            dtype: Type of the coordinates.

        Raises:
            ValueError: If a size is below 1.
        """
        d = len(sizes)
        if not 1 <= d <= 3 or min(sizes) < 1:
            raise ValueError(
                f"Simplices.box({tuple(sizes)}): one to three sizes, each at least 1.\n"
                "For example Simplices.box((16, 16))."
            )
        sides = (lengths,) * d if isinstance(lengths, int | float) else tuple(lengths)
        axes = [
            torch.linspace(0, side, n + 1, dtype=dtype)
            for n, side in zip(sizes, sides, strict=True)
        ]
        vertices = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
        return cls(vertices, _kuhn(sizes), boundary)

    @classmethod
    def read(
        cls, mesh: Any, boundary: Literal["dirichlet", "neumann"] = "dirichlet"
    ) -> "Simplices":
        """A mesh of meshio (points, cells) or of scikit-fem (p, t), or a file that meshio reads.

        Raises:
            ValueError: If it has no lines, triangles or tetrahedra, if these bend through space, or
                the file cannot be read.
            ImportError: If it is a file and meshio is missing.
        """
        if hasattr(mesh, "p") and hasattr(mesh, "t"):
            vertices, cells = (torch.as_tensor(t.T.copy()) for t in (mesh.p, mesh.t))
            return cls(vertices, cells.long(), boundary)
        if not hasattr(mesh, "cells_dict"):
            mesh = _read_file(mesh)
        for kind, d in (("tetra", 3), ("triangle", 2), ("line", 1)):
            if kind in mesh.cells_dict:
                cells = mesh.cells_dict[kind].astype(np.int64)  # files may have other byte orders
                return cls(_flat(mesh.points, d), torch.as_tensor(cells), boundary)
        raise ValueError(
            f"Simplices.read(mesh): it has cells {sorted(mesh.cells_dict)}.\n"
            "Only lines, triangles and tetrahedra are read.\nSplit other cells into these."
        )

    @property
    def _edges(self) -> Float[Tensor, "e d d"]:
        """From the first vertex of each simplex to the others, as columns."""
        corners = self.vertices[self.cells]
        return (corners[:, 1:] - corners[:, :1]).mT

    @property
    def volumes(self) -> Float[Tensor, " e"]:
        """Length, area or volume of each simplex, whatever its orientation."""
        return torch.linalg.det(self._edges).abs() / math.factorial(self.vertices.shape[1])

    @property
    def gradients(self) -> Float[Tensor, "e d1 d"]:
        """Of each basis function on each simplex."""
        others = torch.linalg.inv(self._edges)
        return torch.cat([-others.sum(1, keepdim=True), others], 1)

    @cached_property
    def on_boundary(self) -> Bool[Tensor, " v"]:
        """Whether a vertex is on a face that belongs to one simplex only."""
        d = self.vertices.shape[1]
        sides = [[j for j in range(d + 1) if j != i] for i in range(d + 1)]
        faces = torch.cat([self.cells[:, side] for side in sides]).sort(1).values
        number = faces[:, 0]
        for column in faces.T[1:]:  # whole rows at once would be sorted many times as slowly
            number = torch.unique(number * len(self.vertices) + column, return_inverse=True)[1]
        found = torch.zeros(len(self.vertices), dtype=torch.bool)
        found[faces[number.bincount()[number] == 1].flatten()] = True
        return found

    @cached_property
    def free(self) -> Int[Tensor, " n"]:
        """The vertices that are unknowns."""
        used = torch.zeros(len(self.vertices), dtype=torch.bool)
        used[self.cells.flatten()] = True
        if self.boundary == "dirichlet":
            used &= ~self.on_boundary
        return used.nonzero()[:, 0]

    def stiffness(self, coefficient: Any = 1.0) -> SparseMatrix:
        """The matrix of the integrals of `c grad u . grad v`.

        Args:
            coefficient: A number, a tensor with one for each simplex, or a function of the
                coordinates, taken at the centres.

        Raises:
            ValueError: If it does not fit.
        """
        c, G = self._at_cells(coefficient), self.gradients
        return self._assembled((self.volumes * c)[:, None, None] * (G @ G.mT))

    def mass(self, density: Any = 1.0) -> SparseMatrix:
        """The matrix of the integrals of `c u v`, exact for a density constant on each simplex."""
        k = self.cells.shape[1]
        local = torch.ones(k, k).to(self.vertices) + torch.eye(k).to(self.vertices)
        weight = self.volumes * self._at_cells(density) / (k * (k + 1))
        return self._assembled(weight[:, None, None] * local)

    def load(self, function: Callable[..., Any]) -> Inexact[Tensor, " n"]:
        """The integrals of `f v`, of the piece-wise linear interpolant of `f`."""
        k = self.cells.shape[1]
        f = self.values(function)[self.cells]  # e d1
        local = (f + f.sum(1, keepdim=True)) * (self.volumes / (k * (k + 1)))[:, None]
        zeros = local.new_zeros(len(self.vertices))
        return zeros.index_add(0, self.cells.flatten(), local.flatten())[self.free]

    def gradient(self) -> SparseMatrix:
        """The matrix from the unknowns to the gradient on each simplex, `d` rows for each."""
        e, k, d = self.gradients.shape
        rows = (torch.arange(e)[:, None, None] * d + torch.arange(d)).expand(e, k, d)
        columns = self.cells[..., None].expand(e, k, d)
        return self._on_unknowns(self.gradients, rows, columns, e * d)

    def values(self, function: Callable[..., Any]) -> Inexact[Tensor, " v"]:
        """A function of the coordinates `f(x, y, ...)`, of tensors, at all vertices."""
        return given_at("values(function)", function, self.vertices)

    def extended(self, u: Inexact[Tensor, " n"]) -> Inexact[Tensor, " v"]:
        """The values at all vertices, zero where they are no unknowns."""
        return u.new_zeros(len(self.vertices)).index_add(0, self.free, u)

    def _at_cells(self, coefficient: Any) -> Inexact[Tensor, " e"]:
        """A coefficient on each simplex."""
        c = given_at("a coefficient", coefficient, self.vertices[self.cells].mean(1))
        if c.ndim and c.shape != (len(self.cells),):
            raise ValueError(
                f"a coefficient: its shape is {tuple(c.shape)} for {len(self.cells)} simplices.\n"
                "Give a number, one for each simplex, or a function of the coordinates."
            )
        return c.expand(len(self.cells))

    def _assembled(self, local: Inexact[Tensor, "e d1 d1"]) -> SparseMatrix:
        """Local matrices added up, on the unknowns."""
        k, n, number = self.cells.shape[1], len(self.free), self._numbers[self.cells]
        rows, columns = (t.expand(-1, k, k) for t in (number[:, :, None], number[:, None, :]))
        inside = ((rows >= 0) & (columns >= 0)).flatten().nonzero()[:, 0]
        entries, rows, columns = (t.flatten()[inside] for t in (local, rows, columns))
        return assembled(entries, rows, columns, (n, n))

    def _on_unknowns(
        self, entries: Tensor, rows: Tensor, columns: Tensor, height: int
    ) -> SparseMatrix:
        """Entries whose columns are unknowns."""
        number = self._numbers[columns]
        inside = number >= 0
        return assembled(entries[inside], rows[inside], number[inside], (height, len(self.free)))

    @cached_property
    def _numbers(self) -> Int[Tensor, " v"]:
        """The number of each vertex as an unknown; -1 for the others."""
        numbers = torch.full((len(self.vertices),), -1)
        numbers[self.free] = torch.arange(len(self.free))
        return numbers


def _flat(points: Any, d: int) -> Float[Tensor, "v d"]:
    """The first coordinates of points, the others of which are all the same.

    Raises:
        ValueError: If they are not: a surface, or a curve.
    """
    X = np.asarray(points, dtype=np.float64)
    extent = np.ptp(X, axis=0) if len(X) else np.zeros(X.shape[1])
    if (extent[d:] > 1e-12 * extent.max(initial=0)).any():
        raise ValueError(
            f"Simplices.read(mesh): its cells are of dimension {d}, but its points reach through "
            f"{[float(f'{e:.3g}') for e in extent]}.\n"
            "Surfaces and curves in space are not read.\nGive coordinates of the plane or line."
        )
    return torch.as_tensor(X[:, :d].copy())


def _read_file(path: Any) -> Any:
    """By meshio."""
    try:
        import meshio  # noqa: PLC0415 - an extra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"Simplices.read({str(path)!r}) needs meshio.\nInstall it: pip install meshio."
        ) from error
    try:
        return meshio.read(path)
    except (OSError, SystemExit, meshio.ReadError) as error:
        raise ValueError(
            f"Simplices.read({str(path)!r}): it cannot be read: {error}.\n"
            "Give a file that meshio reads, a mesh of meshio or of scikit-fem."
        ) from error


def _kuhn(sizes: Sequence[int]) -> Int[Tensor, "c v"]:
    """The simplices of a grid of cubes: from corner to corner, one axis after the other."""
    points, d = [n + 1 for n in sizes], len(sizes)
    index = torch.arange(math.prod(points)).reshape(points)
    corner = index[(slice(0, -1),) * d].flatten()
    strides = torch.tensor([math.prod(points[a + 1 :]) for a in range(d)])
    steps = [strides[list(order)].cumsum(0) for order in permutations(range(d))]
    paths = [torch.nn.functional.pad(step, (1, 0)) for step in steps]
    return torch.cat([corner[:, None] + path for path in paths])
