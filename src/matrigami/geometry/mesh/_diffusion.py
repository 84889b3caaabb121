"""The matrix of `-div(c grad u)` on a grid with a coefficient for each face.

Storage: a number for each face; cost per vector: two for each. `solve` by conjugate gradients with
a multigrid preconditioner (`_multigrid.py`), small ones by sparse LU.

Shapes: n = unknowns, k = right-hand sides; the faces of an axis have one more along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from matrigami.geometry.mesh._differences import differences
from matrigami.operators import Cost, LinearOperator, cost, diagonal, scale
from matrigami.structures import SparseMatrix
from matrigami.structures._sparse import assembled


@dataclass(frozen=True, eq=False, repr=False)
class DiffusionMatrix(LinearOperator):
    """`A u = - sum over axes of D' (c D u)`, `D` the differences to the neighbours.

    Args:
        faces: For each axis the coefficients over the square of the spacing at the faces: dirichlet
            one more than unknowns, periodic as many (the face before each), neumann one less.
        sizes: Unknowns along each axis.
        ends: The boundary of each axis; see `Grid`.
    """

    faces: tuple[Inexact[Tensor, "..."], ...]
    sizes: tuple[int, ...]
    ends: tuple[str, ...]

    @classmethod
    def of(
        cls, c: Inexact[Tensor, "..."], spacings: Sequence[float], ends: Sequence[str]
    ) -> "DiffusionMatrix":
        """From the coefficient at the unknowns, by harmonic means of neighbours.

        Raises:
            ValueError: If the coefficient, or the real part of a complex one, is not positive.
        """
        real = c.detach().real if c.is_complex() else c.detach()
        if not bool((real > 0).all()):
            raise ValueError(
                f"stiffness(coefficient): the smallest value is {float(real.min()):.3g}.\n"
                "It must be positive at every unknown, and finite."
            )
        return cls(
            tuple(
                _faces(c, axis, end) / h**2
                for axis, (h, end) in enumerate(zip(spacings, ends, strict=True))
            ),
            tuple(c.shape),
            tuple(ends),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns."""
        n = int(torch.Size(self.sizes).numel())
        batch = self.faces[0].shape[: -len(self.sizes)]
        return (*batch, n, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Fluxes through the faces, and what flows out."""
        U = X.unflatten(-2, self.sizes)
        out = torch.zeros_like(U, dtype=torch.promote_types(self.dtype, X.dtype))
        for axis, (c, end) in enumerate(zip(self.faces, self.ends, strict=True)):
            place = axis - len(self.sizes) - 1
            steps = differences(U.movedim(place, -2), end).movedim(-2, place)
            out = out - (_walls(c, place + 1, end)[..., None] * steps).diff(dim=place)
        return out.flatten(-len(self.sizes) - 1, -2)

    @property
    def T(self) -> "DiffusionMatrix":
        """Symmetric."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))

    def sparse(self) -> SparseMatrix:
        """The same in compressed rows."""
        n = self.shape[-1]
        return assembled(*self.triplets(), (n, n))

    def triplets(self) -> tuple[Inexact[Tensor, "*batch e"], Int[Tensor, " e"], Int[Tensor, " e"]]:
        """Entries, their rows and their columns, those of one place to be added."""
        index = torch.arange(self.shape[-1], device=self.device).reshape(self.sizes)
        rows, columns, entries = [index.flatten()], [index.flatten()], [diagonal(self)]
        for axis, (c, end) in enumerate(zip(self.faces, self.ends, strict=True)):
            pairs = self.sizes[axis] - (end != "periodic")
            place = axis - len(self.sizes)
            inner = _walls(c, place, end).narrow(place, 1, pairs)
            before, after = (
                t.narrow(axis, 0, pairs).flatten() for t in (index, index.roll(-1, axis))
            )
            rows += [before, after]
            columns += [after, before]
            entries += [-inner.flatten(-len(self.sizes))] * 2
        return torch.cat(entries, -1), torch.cat(rows), torch.cat(columns)


def _faces(c: Inexact[Tensor, "..."], axis: int, end: str) -> Inexact[Tensor, "..."]:
    """Coefficients at the faces of one axis: those of the boundary are those of the unknown."""
    n = c.shape[axis]
    first, last = c.narrow(axis, 0, 1), c.narrow(axis, n - 1, 1)
    around = {"periodic": (last, None), "dirichlet": (first, last), "neumann": (None, None)}[end]
    padded = torch.cat([t for t in (around[0], c, around[1]) if t is not None], axis)
    faces = padded.shape[axis] - 1
    return 2 / (1 / padded.narrow(axis, 0, faces) + 1 / padded.narrow(axis, 1, faces))


def _walls(c: Inexact[Tensor, "..."], place: int, end: str) -> Inexact[Tensor, "..."]:
    """The faces before, between and behind the unknowns of one axis, counted from the last."""
    if end == "periodic":
        return torch.cat([c, c.narrow(place, 0, 1)], place)
    if end == "neumann":
        return torch.nn.functional.pad(c, (0, 0) * (-place - 1) + (1, 1))
    return c


@diagonal.register
def _(A: DiffusionMatrix) -> Inexact[Tensor, "*batch n"]:
    total = torch.zeros(A.sizes, dtype=A.dtype, device=A.device)
    for axis, (c, n, end) in enumerate(zip(A.faces, A.sizes, A.ends, strict=True)):
        place = axis - len(A.sizes)
        walls = _walls(c, place, end)
        total = total + walls.narrow(place, 0, n) + walls.narrow(place, 1, n)
    return total.flatten(-len(A.sizes))


@scale.register
def _(A: DiffusionMatrix, factor: Tensor) -> DiffusionMatrix:
    ones = (1,) * len(A.sizes)
    faces = tuple(c * factor.reshape(*factor.shape, *ones) for c in A.faces)
    return DiffusionMatrix(faces, A.sizes, A.ends)


@cost.register
def _(A: DiffusionMatrix) -> Cost:
    stored = sum(c.numel() for c in A.faces)
    return Cost(stored, 2 * stored, sum(c.nbytes for c in A.faces))
