"""How a stored tensor enters a product: an einsum over labelled axes, a batch of small matrices.

Write the part that one tensor plays as `outputs = core . inputs` and classify the labels. A label
in all three is a *batch* label (independent blocks); in core and inputs it is contracted (*in*);
in core and outputs it is made (*out*); in inputs and outputs only it is *shared*: the same blocks
act on each of its positions. So every tensor of every structure is a stack of `out x in` matrices.
Curvature, preconditioners and learning rates follow from that view alone.

Shapes: b = blocks, o = rows of a block, i = columns of a block, s = shared positions, n, m = size
of the input and output state, k = right-hand sides.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._algebra import CroppedMatrix, ProductMatrix
from matrigami.operators._base import LinearOperator, compose, question
from matrigami.operators._blocks import BlockView, block_view
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._diagonal import identity
from matrigami.operators._functions import Cost, cost

GROUP = re.compile(r"\([^)]*\)|[^\s()]+")
"""One axis of a core: a label, or several in parentheses."""


@dataclass(frozen=True, eq=False, repr=False)
class ContractionMatrix(LinearOperator):
    """The matrix from `inputs` to `outputs` that contracts with `core`; axes are named by labels.

    Args:
        core: The tensor.
        axes: Labels of its last axes, separated by spaces; `(a b)` is one axis of two labels.
        inputs: Labels of the state that goes in, slowest first.
        outputs: Labels of the state that comes out.
        sizes: Each label with its size.

    Examples:
        >>> blocks = contraction(torch.ones(2, 1, 3), "c p q", "c q", "c p", c=2, p=1, q=3)
        >>> blocks.dense(), tuple(blocks.blocks().shape)
        (tensor([[1., 1., 1., 0., 0., 0.],
                [0., 0., 0., 1., 1., 1.]]), (2, 1, 3))
    """

    core: Inexact[Tensor, "..."]
    axes: str
    inputs: str
    outputs: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def batch(self) -> list[str]:
        """Labels of independent blocks, in the order of the core."""
        return [x for x in self.labels if x in self._inputs and x in self._outputs]

    @property
    def rows(self) -> list[str]:
        """Labels of the rows of a block."""
        return [x for x in self.labels if x not in self._inputs]

    @property
    def columns(self) -> list[str]:
        """Labels of the columns of a block."""
        return [x for x in self.labels if x not in self._outputs]

    @property
    def shared(self) -> list[str]:
        """Labels of the positions on which the same blocks act."""
        return [x for x in self._inputs if x not in self.labels]

    @property
    def row_major(self) -> bool:
        """Whether the core stores its blocks one after the other, each row by row."""
        return self.labels == [*self.batch, *self.rows, *self.columns]

    @property
    def column_major(self) -> bool:
        """Whether the core stores its blocks one after the other, each column by column."""
        return self.labels == [*self.batch, *self.columns, *self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.stack, self._size(self._outputs), self._size(self._inputs))

    @property
    def view(self) -> BlockView:
        """How the core is a stack of blocks."""
        grid, first = (*self.stack, *self._lengths(self.labels)), len(self.stack)
        kinds = (self.batch, self.rows, self.columns)
        order = [first + self.labels.index(x) for kind in kinds for x in kind]
        counts = (first + len(self.batch), len(self.rows))
        return block_view(tuple(self.core.shape), grid, (*range(first), *order), counts)

    def blocks(self) -> Inexact[Tensor, "*stack b o i"]:
        """The core as a stack of matrices; a view where its layout allows."""
        view = self.view
        return view.split(self.core).reshape(
            *self.stack, self._size(self.batch), view.rows, view.columns
        )

    def with_blocks(self, M: Inexact[Tensor, "*stack b o i"]) -> Inexact[Tensor, "..."]:
        """The inverse of `blocks`: a tensor of the shape of the core."""
        return self.view.merge(M.flatten(0, -3))

    def split_inputs(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... b s i k"]:
        """A state that goes in, as the columns that the blocks see."""
        return self._split(X, self._inputs, self.columns)

    def split_outputs(self, Y: Inexact[Tensor, "... m k"]) -> Inexact[Tensor, "... b s o k"]:
        """A state that comes out (or its gradient), as the rows that the blocks make."""
        return self._split(Y, self._outputs, self.rows)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """One batched product between two permutations."""
        Z = self.split_inputs(X).movedim(-3, -2)  # ... b i s k
        s, k = Z.shape[-2:]
        Z = (self.blocks() @ Z.flatten(-2, -1)).unflatten(-1, (s, k))  # ... b o s k
        made = [*self.batch, *self.rows, *self.shared]
        grid = Z.reshape(*Z.shape[:-4], *self._lengths(made), k)
        lengths = [*self._lengths(self._outputs), k]
        grid = _grouped(grid, [*made, "k "], [[x] for x in (*self._outputs, "k ")], lengths)
        return grid.reshape(*Z.shape[:-4], self.shape[-2], k)

    @property
    def T(self) -> "ContractionMatrix":
        """Inputs and outputs change places."""
        return ContractionMatrix(self.core, self.axes, self.outputs, self.inputs, self.sizes)

    def dense(self) -> Inexact[Tensor, "*stack m n"]:
        """The matrix itself."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))

    def beside(self, size: int, *, left: bool) -> "ContractionMatrix":
        """The same contraction on each of `size` more positions: `A (x) I`, or `I (x) A`."""
        label = "." * (1 + sum(name.startswith(".") for name, _ in self.sizes))
        inputs, outputs = (
            f"{axes} {label}" if left else f"{label} {axes}" for axes in (self.inputs, self.outputs)
        )
        return ContractionMatrix(
            self.core, self.axes, inputs, outputs, (*self.sizes, (label, size))
        )

    @property
    def labels(self) -> list[str]:
        """Labels of the core."""
        return self.axes.replace("(", " ").replace(")", " ").split()

    @property
    def _inputs(self) -> list[str]:
        """Labels of the state that goes in."""
        return self.inputs.split()

    @property
    def _outputs(self) -> list[str]:
        """Labels of the state that comes out."""
        return self.outputs.split()

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the core, without a label: a stack of matrices."""
        labelled = len(GROUP.findall(self.axes))
        return tuple(self.core.shape[: self.core.ndim - labelled])

    def _lengths(self, labels: list[str]) -> list[int]:
        """The size of each label."""
        known = dict(self.sizes)
        return [known[x] for x in labels]

    def _size(self, labels: list[str]) -> int:
        """The product of the sizes."""
        return math.prod(self._lengths(labels))

    def _split(self, X: Tensor, labels: list[str], own: list[str]) -> Tensor:
        """A state as `(..., batch, shared, own, k)`."""
        k = X.shape[-1]
        grid = X.reshape(*X.shape[:-2], *self._lengths(labels), k)
        groups = (self.batch, self.shared, own, ["k "])
        lengths = [*(self._size(g) for g in groups[:3]), k]
        return _grouped(grid, [*labels, "k "], groups, lengths)


def contraction(
    core: Inexact[Tensor, "..."], axes: str, inputs: str, outputs: str, **sizes: int
) -> ContractionMatrix:
    """`ContractionMatrix`, with the sizes of the labels as keywords."""
    return ContractionMatrix(core, axes, inputs, outputs, tuple(sizes.items()))


class Contraction(NamedTuple):
    """The part of one tensor in a product: `after @ matrix @ before`; None is the identity.

    The product is linear in the tensor, and this is the term that holds it.
    """

    matrix: ContractionMatrix
    before: LinearOperator | None = None
    after: LinearOperator | None = None


@question
def contractions(A: LinearOperator) -> tuple[Contraction, ...]:
    """The part of each tensor of `named_tensors(A)` in the product `A @ X`.

    Raises:
        TypeError: If the value is not a layer's weight, such as a sum or an inverse.

    Examples:
        >>> (part,) = contractions(DenseMatrix(torch.ones(2, 3)))
        >>> part.matrix.rows, part.matrix.columns, part.matrix.shape
        (['m'], ['n'], (2, 3))
    """
    raise TypeError(
        f"contractions(A): how the tensors of a {type(A).__name__} enter a product is not known.\n"
        "Register a rule with @contractions.register in the file that defines it."
    )


def chained(*matrices: ContractionMatrix) -> tuple[Contraction, ...]:
    """The parts of a product of contractions, the one that is applied first in front."""
    return tuple(
        Contraction(matrix, _product(matrices[:i]), _product(matrices[i + 1 :]))
        for i, matrix in enumerate(matrices)
    )


def composed(
    part: Contraction, before: LinearOperator | None = None, after: LinearOperator | None = None
) -> Contraction:
    """The part in a longer product, with more before and after it."""
    return Contraction(part.matrix, _times(part.before, before), _times(after, part.after))


def _product(matrices: tuple[ContractionMatrix, ...]) -> LinearOperator | None:
    """One operator of matrices in the order of their application; None for none."""
    if not matrices:
        return None
    return matrices[0] if len(matrices) == 1 else ProductMatrix(tuple(reversed(matrices)))


def _times(A: LinearOperator | None, B: LinearOperator | None) -> LinearOperator | None:
    """`A @ B`, where None is the identity."""
    if A is None or B is None:
        return B if A is None else A
    return compose(A, B)


def _grouped(
    grid: Tensor, labels: list[str], groups: Sequence[Sequence[str]], lengths: list[int]
) -> Tensor:
    """Permute the last, labelled axes into groups and merge each group into one axis."""
    stack = grid.ndim - len(labels)
    order = [stack + labels.index(x) for group in groups for x in group]
    return grid.permute(*range(stack), *order).reshape(*grid.shape[:stack], *lengths)


@cost.register
def _(A: ContractionMatrix) -> Cost:
    size = A.core.numel()
    return Cost(size, size * math.prod(dict(A.sizes)[x] for x in A.shared), A.core.nbytes)


@contractions.register
def _(A: DenseMatrix) -> tuple[Contraction, ...]:
    m, n = A.shape[-2:]
    return chained(contraction(A.entries, "m n", "n", "m", m=m, n=n))


@contractions.register
def _(A: CroppedMatrix) -> tuple[Contraction, ...]:
    """The parts in the larger matrix, between appended zeros and a cut."""
    M, N = A.padded.shape[-2:]
    cut = None if A.rows == M else CroppedMatrix(_eye(A, M), A.rows, M)
    pad = None if A.columns == N else CroppedMatrix(_eye(A, N), N, A.columns)
    return tuple(composed(part, pad, cut) for part in contractions(A.padded))


def _eye(A: LinearOperator, n: int) -> LinearOperator:
    """The identity in the type of a value."""
    return identity(n, dtype=A.dtype, device=A.device)
