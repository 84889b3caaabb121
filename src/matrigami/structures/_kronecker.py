"""Kronecker product: `A = L (x) R`, of two or more factors, each a tensor or any other value.

Storage `m1 n1 + m2 n2`; cost per vector `min(m2 n2 n1 + m1 n1 m2, m1 n1 n2 + m2 n2 m1)`, the
cheaper order is taken. Projection onto two factors: the rank-one SVD of the rearranged matrix (Van
Loan and Pitsianis 1993), the best; onto
more: one factor after the other (quasi-best). Row-major `vec`: `(L (x) R) vec(X) = vec(L X R.T)`.

Shapes: m1 x n1 = left factor, m2 x n2 = right factor, k = right-hand sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    Eigh,
    Fan,
    LinearOperator,
    SpectralMatrix,
    Structure,
    compose,
    composed,
    contractions,
    cost,
    cropped,
    diagonal,
    draw,
    eigh,
    factorize,
    fans,
    fitted_corner,
    hadamard,
    inverse,
    kron,
    largest,
    norm,
    operator,
    power,
    project,
    scale,
    shift,
    slogdet,
    solve,
    svdvals,
    symmetric,
    trace,
    truncated_svd,
)
from matrigami.structures._diagonal import DiagonalMatrix


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerMatrix(LinearOperator):
    """The matrix `left (x) right`; each factor is a tensor or a value.

    Examples:
        >>> import torch
        >>> KroneckerMatrix(torch.tensor([[1.0, 2.0]]), torch.eye(2)).dense()
        tensor([[1., 0., 2., 0.],
                [0., 1., 0., 2.]])
    """

    left: Inexact[Tensor, "*batch m1 n1"] | LinearOperator
    right: Inexact[Tensor, "*batch m2 n2"] | LinearOperator

    @property
    def factors(self) -> tuple[LinearOperator, LinearOperator]:
        """Both factors as operators."""
        return operator(self.left), operator(self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        (*a, m1, n1), (*b, m2, n2) = self.left.shape, self.right.shape
        return (*torch.broadcast_shapes(a, b), m1 * m2, n1 * n2)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Multiply along one axis, then the other, the cheaper first; no copies for tensors."""
        n1, n2 = self.left.shape[-1], self.right.shape[-1]
        Y = X.unflatten(-2, (n1, n2))
        right_first, left_first = _orders(self.left, self.right)
        if right_first <= left_first:
            return _along_rows(self.left, _along_columns(self.right, Y)).flatten(-3, -2)
        return _along_columns(self.right, _along_rows(self.left, Y)).flatten(-3, -2)

    @property
    def T(self) -> "KroneckerMatrix":
        """Transpose each factor."""
        return KroneckerMatrix(
            *[F.mT if isinstance(F, Tensor) else F.T for F in (self.left, self.right)]
        )

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        L, R = (F.dense() for F in self.factors)
        return torch.einsum("...ab,...cd->...acbd", L, R).flatten(-4, -3).flatten(-2, -1)


@dataclass(frozen=True)
class Kronecker(Structure):
    """Kronecker products.

    Args:
        factors: The number of factors of balanced sizes (default 2), or their shapes `((m1, n1),
            (m2, n2), ...)`. A size without balanced factors is padded (see `CroppedMatrix`).

    Examples:
        >>> Kronecker().init(16, 64)
        KroneckerMatrix(16x64, 64 parameters)
    """

    factors: int | Sequence[Sequence[int]] | None = None

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LinearOperator:
        """Draw Gaussian factors.

        Raises:
            ValueError: If given factors do not multiply to the size of the matrix.
        """
        blanks = [torch.empty(*shape, dtype=dtype, device=device) for shape in self._shapes(m, n)]
        return cropped(draw(_nested(blanks), generator), m, n)

    def _shapes(self, m: int, n: int) -> list[tuple[int, int]]:
        """The shape of each factor."""
        if self.factors is None or isinstance(self.factors, int):
            count = self.factors or 2
            if count < 2:
                raise ValueError(
                    f"{self} was asked for.\n"
                    "A Kronecker product has at least two factors.\n"
                    "Use Dense() for one."
                )
            return list(zip(factorize(m, count), factorize(n, count), strict=True))
        shapes = [(int(a), int(b)) for a, b in self.factors]
        rows, columns = (math.prod(shape[i] for shape in shapes) for i in (0, 1))
        if (rows, columns) != (m, n):
            raise ValueError(
                f"{self} was asked for a {m}x{n} matrix.\n"
                f"Its factors multiply to {rows}x{columns}.\n"
                "Give factors that multiply to the size, or a number of factors."
            )
        return shapes


def _nested(factors: Sequence[Tensor | LinearOperator]) -> KroneckerMatrix:
    """`A (x) B (x) ...` as pairs, nested to the right."""
    left, *rest = factors
    return KroneckerMatrix(left, rest[0] if len(rest) == 1 else _nested(rest))


def _orders(L: Tensor | LinearOperator, R: Tensor | LinearOperator) -> tuple[int, int]:
    """Multiply-adds with the right factor first, and with the left factor first."""
    (m1, n1), (m2, n2) = L.shape[-2:], R.shape[-2:]
    l, r = _macs(L), _macs(R)
    return r * n1 + l * m2, l * n2 + r * m1


def _macs(F: Tensor | LinearOperator) -> int:
    """Multiply-adds of one product with one matrix of a stack."""
    if isinstance(F, KroneckerMatrix):
        return min(_orders(F.left, F.right))
    if isinstance(F, Tensor):  # without a dispatch, which torch.compile cannot trace
        return F.shape[-2] * F.shape[-1]
    return cost(F).macs // max(math.prod(F.shape[:-2]), 1)


def _along_rows(F: Tensor | LinearOperator, X: Tensor) -> Tensor:
    """Contract the axis `n1` of `(..., n1, n2, k)`."""
    return (F @ X.flatten(-2, -1)).unflatten(-1, X.shape[-2:])


def _along_columns(F: Tensor | LinearOperator, X: Tensor) -> Tensor:
    """Contract the axis `n2` of `(..., n1, n2, k)`."""
    if isinstance(F, Tensor):
        F = F.unsqueeze(-3)  # expanded, for matmul copies X to broadcast a matrix
        return F.expand(*F.shape[:-3], X.shape[-3], *F.shape[-2:]) @ X
    tall = X.movedim(-3, -2)
    return (F @ tall.flatten(-2, -1)).unflatten(-1, tall.shape[-2:]).movedim(-2, -3)


def _times(F: Tensor | LinearOperator, G: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """The product of two factors; of two tensors, a tensor."""
    if isinstance(F, Tensor) and isinstance(G, Tensor):
        return F @ G
    return operator(F) @ operator(G)


def _square(A: KroneckerMatrix) -> bool:
    """Whether both factors are square, without which no factorwise rule holds."""
    return all(F.shape[-2] == F.shape[-1] for F in A.factors)


@kron.register(Tensor)
@kron.register(LinearOperator)
def _(
    A: LinearOperator | Tensor, B: LinearOperator | Tensor, *more: LinearOperator | Tensor
) -> KroneckerMatrix:
    for F in (A, B, *more):
        if not isinstance(F, Tensor | LinearOperator) or len(F.shape) < 2:
            raise TypeError(
                f"kron was asked for a factor {F!r:.60}.\n"
                "Its factors are matrices: tensors with two axes or more, or linear operators."
            )
    return _nested([A, B, *more])


@hadamard.register
def _(A: KroneckerMatrix, B: LinearOperator | Tensor) -> LinearOperator:
    if isinstance(B, KroneckerMatrix) and all(
        F.shape == G.shape for F, G in zip(A.factors, B.factors, strict=True)
    ):
        return KroneckerMatrix(*map(hadamard, A.factors, B.factors))
    return hadamard.dispatch(object)(A, B)


@fans.register
def _(A: KroneckerMatrix) -> tuple[Fan, ...]:
    left, right = map(fans, A.factors)
    return (*left, *[fan._replace(last=False) for fan in right])


@contractions.register
def _(A: KroneckerMatrix) -> tuple[Contraction, ...]:
    (m1, n1), (m2, n2) = A.left.shape[-2:], A.right.shape[-2:]
    right_first, left_first = _orders(A.left, A.right)
    if right_first <= left_first:
        (lefts, L), (rights, R) = beside(A.left, m2, left=True), beside(A.right, n1, left=False)
        sides = [composed(p, before=R) for p in lefts], [composed(p, after=L) for p in rights]
    else:
        (lefts, L), (rights, R) = beside(A.left, n2, left=True), beside(A.right, m1, left=False)
        sides = [composed(p, after=R) for p in lefts], [composed(p, before=L) for p in rights]
    return (*sides[0], *sides[1])


def beside(
    F: Tensor | LinearOperator, size: int, *, left: bool
) -> tuple[list[Contraction], LinearOperator]:
    """The parts of `F (x) I` (or `I (x) F`), and that matrix."""
    eye = DiagonalMatrix(torch.ones(size, dtype=F.dtype, device=F.device))

    def widened(G: LinearOperator | None) -> LinearOperator | None:
        """The same, beside an identity; None is the identity already."""
        return G and (KroneckerMatrix(G, eye) if left else KroneckerMatrix(eye, G))

    parts = [
        Contraction(C.beside(size, left=left), widened(before), widened(after))
        for C, before, after in contractions(operator(F))
    ]
    whole = parts[0].matrix if isinstance(F, Tensor) else widened(F)
    return parts, whole  # pyright: ignore[reportReturnType]


@cost.register
def _(A: KroneckerMatrix) -> Cost:
    L, R = A.factors
    whole = cost(L) + cost(R)
    return Cost(whole.params, min(_orders(L, R)) * math.prod(A.shape[:-2]), whole.bytes)


@compose.register
def _(A: KroneckerMatrix, B: LinearOperator) -> LinearOperator:
    if isinstance(B, KroneckerMatrix) and all(
        F.shape[-1] == G.shape[-2] for F, G in zip(A.factors, B.factors, strict=True)
    ):
        return KroneckerMatrix(
            _times(A.left, B.left),
            _times(A.right, B.right),
        )
    return compose.dispatch(LinearOperator)(A, B)


@scale.register
def _(A: KroneckerMatrix, factor: float | Tensor) -> KroneckerMatrix:
    if isinstance(A.left, LinearOperator):
        return KroneckerMatrix(scale(A.left, factor), A.right)
    factor = factor[..., None, None] if isinstance(factor, Tensor) else factor
    return KroneckerMatrix(A.left * factor, A.right)


@shift.register
def _(A: KroneckerMatrix, amount: float | Tensor) -> LinearOperator:
    """Of symmetric factors, by their eigenpairs (Martens and Grosse 2015, arXiv:1503.05671)."""
    if not _square(A) or not all(map(symmetric, A.factors)):
        return shift.dispatch(LinearOperator)(A, amount)
    return shift(SpectralMatrix(*eigh(A)), amount)


@solve.register
def _(A: KroneckerMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    if not _square(A):
        return solve.dispatch(LinearOperator)(A, B)
    return KroneckerMatrix(*map(inverse, A.factors)).matmat(B)


@inverse.register
def _(A: KroneckerMatrix) -> LinearOperator:
    return (
        KroneckerMatrix(*map(inverse, A.factors))
        if _square(A)
        else inverse.dispatch(LinearOperator)(A)
    )


@slogdet.register
def _(A: KroneckerMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    if not _square(A):
        return slogdet.dispatch(LinearOperator)(A)
    (s1, l1), (s2, l2) = map(slogdet, A.factors)
    n1, n2 = (F.shape[-1] for F in A.factors)
    return s1**n2 * s2**n1, n2 * l1 + n1 * l2


@diagonal.register
def _(A: KroneckerMatrix) -> Inexact[Tensor, "*batch d"]:
    if not _square(A):
        return diagonal.dispatch(LinearOperator)(A)
    d1, d2 = map(diagonal, A.factors)
    return (d1[..., :, None] * d2[..., None, :]).flatten(-2, -1)


@trace.register
def _(A: KroneckerMatrix) -> Inexact[Tensor, "*batch"]:
    if not _square(A):
        return diagonal(A).sum(-1)
    t1, t2 = map(trace, A.factors)
    return t1 * t2


@eigh.register
def _(A: KroneckerMatrix, k: int | None = None) -> Eigh:
    if not _square(A):
        return eigh.dispatch(LinearOperator)(A, k)
    (v1, Q1), (v2, Q2) = map(eigh, A.factors)
    pairs = Eigh((v1[..., :, None] * v2[..., None, :]).flatten(-2, -1), KroneckerMatrix(Q1, Q2))
    return pairs if k is None else largest(pairs, k)


@svdvals.register
def _(A: KroneckerMatrix) -> Float[Tensor, "*batch d"]:
    s1, s2 = map(svdvals, A.factors)
    values = (s1[..., :, None] * s2[..., None, :]).flatten(-2, -1).sort(-1, descending=True).values
    return torch.nn.functional.pad(values, (0, min(A.shape[-2:]) - values.shape[-1]))


@power.register
def _(A: KroneckerMatrix, p: float) -> LinearOperator:
    if not _square(A):
        return power.dispatch(LinearOperator)(A, p)
    L, R = A.factors
    if not float(p).is_integer():  # two negative definite factors make a positive definite product
        sign = torch.where(trace(L).detach() < 0, -1.0, 1.0).to(A.dtype)
        L, R = scale(L, sign), scale(R, sign)
    return KroneckerMatrix(power(L, p), power(R, p))


@norm.register
def _(A: KroneckerMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    l, r = (norm(F, order) for F in A.factors)
    return l * r


@project.register
def _(recipe: Kronecker, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    shapes = recipe._shapes(m, n)
    M, N = (math.prod(shape[i] for shape in shapes) for i in (0, 1))
    rest = torch.nn.functional.pad(W, (0, N - n, 0, M - m))
    found: list[Tensor | LinearOperator] = []
    for m1, n1 in shapes[:-1]:
        L, rest = _nearest(rest, m1, n1)
        found.append(L)
    return fitted_corner(_nested([*found, rest]), W)


def _nearest(W: Inexact[Tensor, "*batch m n"], m1: int, n1: int) -> tuple[Tensor, Tensor]:
    """The best two factors (Van Loan and Pitsianis 1993)."""
    m2, n2 = W.shape[-2] // m1, W.shape[-1] // n1
    tiles = W.unflatten(-2, (m1, m2)).unflatten(-1, (n1, n2)).transpose(-3, -2)
    left, right = truncated_svd(tiles.flatten(-4, -3).flatten(-2, -1), 1)
    return left[..., 0].unflatten(-1, (m1, n1)), right[..., 0, :].unflatten(-1, (m2, n2))
