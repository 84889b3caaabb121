"""Diagonal: `A = diag(d)`. Storage and cost per vector: `n`. Projection: the diagonal.

Shapes: n = rows = columns, k = right-hand sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    DenseMatrix,
    Eigh,
    Fan,
    LinearOperator,
    Structure,
    add as add_rule,
    chained,
    compose,
    contraction,
    contractions,
    diagonal,
    draw,
    eigh,
    fans,
    hadamard,
    inverse,
    largest,
    operator,
    positive,
    power,
    project,
    scale,
    shift,
    slogdet,
    solve,
    svdvals,
)


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalMatrix(LinearOperator):
    """The matrix `diag(d)`.

    Examples:
        >>> import torch
        >>> DiagonalMatrix(torch.tensor([1.0, 2.0])) @ torch.ones(2, dtype=torch.float32)
        tensor([1., 2.])
    """

    diagonal: Inexact[Tensor, "*batch n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        return (*self.diagonal.shape, self.diagonal.shape[-1])

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
        """Scale the rows."""
        return self.diagonal[..., None] * X

    @property
    def T(self) -> "DiagonalMatrix":
        """Itself."""
        return self

    def dense(self) -> Inexact[Tensor, "*batch n n"]:
        """The matrix itself."""
        return torch.diag_embed(self.diagonal)


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices.

    Examples:
        >>> Diagonal().init(3, 3)
        DiagonalMatrix(3x3, 3 parameters)
    """

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DiagonalMatrix:
        """Draw a Gaussian diagonal of variance one.

        Raises:
            ValueError: If `m != n`.
        """
        _require_square(m, n)
        return draw(DiagonalMatrix(torch.empty(n, dtype=dtype, device=device)), generator)


def _require_square(m: int, n: int) -> None:
    """Refuse a rectangle."""
    if m != n:
        raise ValueError(
            f"Diagonal() was asked for a {m}x{n} matrix.\n"
            "A diagonal matrix is square.\n"
            "Use LowRank or Monarch for rectangles."
        )


@hadamard.register
def _(A: DiagonalMatrix, B: LinearOperator | Tensor) -> LinearOperator:
    if A.shape[-2:] != B.shape[-2:]:
        return hadamard.dispatch(object)(A, B)
    return DiagonalMatrix(A.diagonal * diagonal(operator(B)))


@fans.register
def _(A: DiagonalMatrix) -> tuple[Fan, ...]:
    return (Fan(1, 1, last=True),)


@contractions.register
def _(A: DiagonalMatrix) -> tuple[Contraction, ...]:
    return chained(contraction(A.diagonal, "n", "n", "n", n=A.shape[-1]))


@add_rule.register
def _(A: DiagonalMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, DiagonalMatrix):
        return DiagonalMatrix(A.diagonal + B.diagonal)
    return add_rule.dispatch(LinearOperator)(A, B)


@compose.register
def _(A: DiagonalMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, DiagonalMatrix):
        return DiagonalMatrix(A.diagonal * B.diagonal)
    return compose.dispatch(LinearOperator)(A, B)


@scale.register
def _(A: DiagonalMatrix, factor: float | Tensor) -> DiagonalMatrix:
    return DiagonalMatrix(
        A.diagonal * (factor[..., None] if isinstance(factor, Tensor) else factor)
    )


@shift.register
def _(A: DiagonalMatrix, amount: float | Tensor) -> DiagonalMatrix:
    return DiagonalMatrix(
        A.diagonal + (amount[..., None] if isinstance(amount, Tensor) else amount)
    )


@solve.register
def _(A: DiagonalMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return B / A.diagonal[..., None]


@inverse.register
def _(A: DiagonalMatrix) -> DiagonalMatrix:
    return DiagonalMatrix(1 / A.diagonal)


@slogdet.register
def _(A: DiagonalMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return A.diagonal.sgn().prod(-1), A.diagonal.abs().log().sum(-1)


@diagonal.register
def _(A: DiagonalMatrix) -> Inexact[Tensor, "*batch n"]:
    return A.diagonal


@eigh.register
def _(A: DiagonalMatrix, k: int | None = None) -> Eigh:
    ones = torch.ones_like(A.diagonal)
    if k is None:
        return Eigh(A.diagonal, DiagonalMatrix(ones))
    return largest(Eigh(A.diagonal, DenseMatrix(torch.diag_embed(ones))), k)


@svdvals.register
def _(A: DiagonalMatrix) -> Float[Tensor, "*batch n"]:
    return A.diagonal.abs().sort(-1, descending=True).values


@power.register
def _(A: DiagonalMatrix, p: float) -> DiagonalMatrix:
    values = A.diagonal if float(p).is_integer() else positive(A.diagonal, p)
    return DiagonalMatrix(values.pow(p))


@project.register
def _(recipe: Diagonal, W: Inexact[Tensor, "*batch m n"]) -> DiagonalMatrix:
    _require_square(*W.shape[-2:])
    return DiagonalMatrix(torch.diagonal(W, dim1=-2, dim2=-1).clone())
