"""Block-diagonal curvature of a model: one value for each block of parameters.

A block is a stack of matrices in the coordinates of its parameters, row-major: the joint block of a
weight and its bias is that of the matrix `[weight bias]`. As an operator the whole acts on all
trainable parameters as one vector, in the order of the model.

Shapes: p = parameters in all, d = size of one matrix of a stack, k = columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import (
    Cost,
    DenseMatrix,
    Eigh,
    LinearOperator,
    cost,
    diagonal,
    eigh,
    inverse,
    norm,
    power,
    scale,
    shift,
    slogdet,
    solve,
    trace,
)


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureMatrix(LinearOperator):
    """The block-diagonal matrix of `blocks`, over the parameters of a model.

    `F["0.weight"]` is the block that holds a parameter, `F.vector(tensors)` and `F.tensors(v)` turn
    named tensors (gradients, say) into vectors and back.

    Args:
        blocks: A value of shape `(*stack, d, d)` for each block.
        names: The parameters of each block; of two, the second is the bias of the first.
        shapes: Their shapes.
        order: All parameters in the order of the vector.
    """

    blocks: tuple[LinearOperator, ...]
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    order: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, in the order of the vector."""
        known = {
            name: shape
            for names, shapes in zip(self.names, self.shapes, strict=True)
            for name, shape in zip(names, shapes, strict=True)
        }
        return {name: known[name] for name in self.order}

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters in all, twice."""
        p = sum(math.prod(shape) for shape in self.sizes.values())
        return p, p

    def __getitem__(self, name: str) -> LinearOperator:
        """The block that holds a parameter: a stack of matrices.

        Raises:
            ValueError: If there is no such parameter.
        """
        for names, block in zip(self.names, self.blocks, strict=True):
            if name in names:
                return block
        raise ValueError(
            f"F[{name!r}]: no block has this parameter.\n"
            f"Its blocks are {', '.join('+'.join(names) for names in self.names)}."
        )

    def vector(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """Named tensors as one vector.

        Raises:
            ValueError: If a parameter is missing, unknown, or has another shape.
        """
        wanted = self.sizes
        given = {name: tuple(t.shape) for name, t in tensors.items()}
        if given != wanted:
            wrong = sorted(
                name for name in {*given, *wanted} if given.get(name) != wanted.get(name)
            )
            first = wrong[0]
            raise ValueError(
                f"F.vector(tensors): they do not match at {', '.join(wrong[:3])}.\n"
                f"{first} has shape {given.get(first, 'none')}, "
                f"the parameter {wanted.get(first, 'none')}.\n"
                "Give one tensor for each trainable parameter, of its shape."
            )
        return torch.cat([tensors[name].reshape(-1) for name in self.order])

    def tensors(self, v: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """A vector as named tensors of the shapes of the parameters."""
        sizes = self.sizes
        parts = v.split([math.prod(shape) for shape in sizes.values()])
        return {name: t.view(sizes[name]) for name, t in zip(sizes, parts, strict=True)}

    def split(self, X: Float[Tensor, "p k"]) -> list[Tensor]:
        """The rows of each block, `(*stack, d, k)`."""
        sizes, k = self.sizes, X.shape[-1]
        rows = X.split([math.prod(shape) for shape in sizes.values()], -2)
        parts = dict(zip(sizes, rows, strict=True))
        found = []
        for block, names, shapes in zip(self.blocks, self.names, self.shapes, strict=True):
            m = _rows(shapes)
            grid = torch.cat([parts[name].reshape(m, -1, k) for name in names], 1)
            found.append(grid.reshape(*block.shape[:-1], k))
        return found

    def join(self, parts: list[Tensor]) -> Float[Tensor, "p k"]:
        """The inverse of `split`."""
        rows: dict[str, Tensor] = {}
        for part, names, shapes in zip(parts, self.names, self.shapes, strict=True):
            k, m = part.shape[-1], _rows(shapes)
            widths = [math.prod(shape) // m for shape in shapes]
            for name, t in zip(names, part.reshape(m, -1, k).split(widths, 1), strict=True):
                rows[name] = t.reshape(-1, k)
        return torch.cat([rows[name] for name in self.order])

    def matmat(self, X: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        """Each block multiplies its own parameters."""
        return self.join(
            [B.matmat(part) for B, part in zip(self.blocks, self.split(X), strict=True)]
        )

    @property
    def T(self) -> "CurvatureMatrix":
        """Transpose each block."""
        return mapped(self, lambda B: B.T)

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself, for a small model."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


def _rows(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Rows of the matrix `[weight bias]`; a parameter alone is one row."""
    return math.prod(shapes[-1]) if len(shapes) > 1 else 1


def mapped(
    F: CurvatureMatrix, function: Callable[[LinearOperator], LinearOperator]
) -> CurvatureMatrix:
    """The same layout with a function of each block."""
    return CurvatureMatrix(tuple(map(function, F.blocks)), F.names, F.shapes, F.order)


@solve.register
def _(A: CurvatureMatrix, B: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    return A.join([solve(F, part) for F, part in zip(A.blocks, A.split(B), strict=True)])


@inverse.register
def _(A: CurvatureMatrix) -> CurvatureMatrix:
    return mapped(A, inverse)


@shift.register
def _(A: CurvatureMatrix, amount: Tensor) -> CurvatureMatrix:
    return mapped(A, lambda B: shift(B, amount))


@scale.register
def _(A: CurvatureMatrix, factor: Tensor) -> CurvatureMatrix:
    return mapped(A, lambda B: scale(B, factor))


@power.register
def _(A: CurvatureMatrix, p: float) -> CurvatureMatrix:
    return mapped(A, lambda B: power(B, p))


@slogdet.register
def _(A: CurvatureMatrix) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    pairs = [slogdet(B) for B in A.blocks]
    signs, logs = ([pair[i] for pair in pairs] for i in (0, 1))
    return torch.stack([s.prod() for s in signs]).prod(), torch.stack([x.sum() for x in logs]).sum()


@trace.register
def _(A: CurvatureMatrix) -> Float[Tensor, ""]:
    return torch.stack([trace(B).sum() for B in A.blocks]).sum()


@diagonal.register
def _(A: CurvatureMatrix) -> Float[Tensor, " p"]:
    return A.join([diagonal(B)[..., None] for B in A.blocks])[:, 0]


@norm.register
def _(A: CurvatureMatrix, order: float | None = None) -> Float[Tensor, ""]:
    each = torch.cat([norm(B, order).flatten() for B in A.blocks])
    if order is None or order == 2:
        return torch.linalg.vector_norm(each, ord=2 if order is None else torch.inf)
    return torch.linalg.vector_norm(each, ord=order)


@eigh.register
def _(A: CurvatureMatrix, k: int | None = None) -> Eigh:
    """Eigenvalues block by block, not sorted; with `k` the largest of all."""
    pairs = [eigh(B) for B in A.blocks]
    values = A.join([pair.values[..., None] for pair in pairs])[:, 0]
    vectors = CurvatureMatrix(tuple(pair.vectors for pair in pairs), A.names, A.shapes, A.order)
    if k is None:
        return Eigh(values, vectors)
    p = len(values)
    if not 1 <= k <= p:
        raise ValueError(f"eigh(A, k={k}): A has {p} eigenvalues.\nk should be between 1 and {p}.")
    order = values.abs().argsort(descending=True)[:k]
    chosen = values.new_zeros(p, k)
    chosen[order, torch.arange(k)] = 1.0
    return Eigh(values[order], DenseMatrix(vectors.matmat(chosen)))


@cost.register
def _(A: CurvatureMatrix) -> Cost:
    return sum(map(cost, A.blocks), Cost(0, 0, 0))
