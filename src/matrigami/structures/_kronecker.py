"""Kronecker product: `A = L (x) R`, of two or more factors, each a tensor or any other value.

Storage `m1 n1 + m2 n2`; cost per vector `min(m2 n2 n1 + m1 n1 m2, m1 n1 n2 + m2 n2 m1)`, the
cheaper order is taken. Projection onto two factors: the rank-one SVD of the rearranged matrix (Van
Loan and Pitsianis 1993), the best; onto more: one factor after the other (quasi-best). Row-major
`vec`: `(L (x) R) vec(X) = vec(L X R.T)`.

Shapes: m1 x n1 = left factor, m2 x n2 = right factor, k = right-hand sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    DiagonalMatrix,
    Eigh,
    Fan,
    LinearOperator,
    SpectralMatrix,
    Structure,
    Svd,
    cholesky,
    compose,
    composed,
    contractions,
    cost,
    cropped,
    descending,
    diagonal,
    differentiated,
    eigh,
    entries,
    example,
    factorize,
    fans,
    fitted_corner,
    hadamard,
    hermitian,
    inverse,
    kron,
    largest,
    norm,
    operator,
    pinv,
    power,
    project,
    scale,
    shift,
    slogdet,
    solve,
    svd,
    svdvals,
    times,
    trace,
    truncated_svd,
)

__all__ = ["Kronecker", "KroneckerMatrix"]


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


@example("kronecker")
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

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If given factors do not multiply to the size of the matrix.
        """
        blanks = [empty(*shape) for shape in self._shapes(m, n)]
        return cropped(_nested(blanks), m, n)

    def _shapes(self, m: int, n: int) -> list[tuple[int, int]]:
        """The shape of each factor."""
        if self.factors is None or isinstance(self.factors, int):
            count = self.factors or 2
            if count < 2:
                raise ValueError(
                    f"{self}: a Kronecker product has at least two factors.\nUse Dense() for one."
                )
            return list(zip(factorize(m, count), factorize(n, count), strict=True))
        shapes = [(int(a), int(b)) for a, b in self.factors]
        rows, columns = (math.prod(shape[i] for shape in shapes) for i in (0, 1))
        if (rows, columns) != (m, n):
            raise ValueError(
                f"{self} cannot be {m}x{n}: its factors multiply to {rows}x{columns}.\n"
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
        return times(F, G)
    return operator(F) @ operator(G)


def _square(A: KroneckerMatrix, *_: Any, **__: Any) -> bool:
    """Whether both factors are square, without which few rules hold factor by factor."""
    return all(F.shape[-2] == F.shape[-1] for F in A.factors)


@hermitian.register
def _hermitian(A: KroneckerMatrix, *_: Any, **__: Any) -> bool:
    """Whether both factors equal their adjoints: a product of skew ones may, without them."""
    return _square(A) and all(map(hermitian, A.factors))


@kron.register
def _(*factors: LinearOperator | Tensor) -> KroneckerMatrix:
    return _nested(factors)


@hadamard.register(
    where=lambda A, B: all(F.shape == G.shape for F, G in zip(A.factors, B.factors, strict=True))
)
def _(A: KroneckerMatrix, B: KroneckerMatrix) -> LinearOperator:
    return KroneckerMatrix(*map(hadamard, A.factors, B.factors))


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


def _conformal(A: KroneckerMatrix, B: KroneckerMatrix) -> bool:
    """Whether factor fits factor, so that the product is one of the products."""
    return all(F.shape[-1] == G.shape[-2] for F, G in zip(A.factors, B.factors, strict=True))


@compose.register(where=_conformal)
def _(A: KroneckerMatrix, B: KroneckerMatrix) -> KroneckerMatrix:
    return KroneckerMatrix(_times(A.left, B.left), _times(A.right, B.right))


@scale.register
def _(A: KroneckerMatrix, factor: Tensor) -> KroneckerMatrix:
    if isinstance(A.left, LinearOperator):
        return KroneckerMatrix(scale(A.left, factor), A.right)
    return KroneckerMatrix(A.left * factor[..., None, None], A.right)


@shift.register(where=lambda A, amount: _hermitian(A) and not differentiated(A))
def _(A: KroneckerMatrix, amount: Tensor) -> LinearOperator:
    """By eigenpairs (Martens and Grosse 2015, arXiv:1503.05671), while nobody differentiates."""
    return shift(SpectralMatrix(*eigh(A)), amount)


@solve.register(where=_square)
def _(A: KroneckerMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return inverse(A).matmat(B)


@inverse.register(where=_square)
def _(A: KroneckerMatrix) -> KroneckerMatrix:
    return KroneckerMatrix(*map(inverse, A.factors))


@pinv.register
def _(A: KroneckerMatrix) -> KroneckerMatrix:
    return KroneckerMatrix(*map(pinv, A.factors))


@slogdet.register(where=_square)
def _(A: KroneckerMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    (s1, l1), (s2, l2) = map(slogdet, A.factors)
    n1, n2 = (F.shape[-1] for F in A.factors)
    return s1**n2 * s2**n1, n2 * l1 + n1 * l2


@diagonal.register(where=_square)
def _(A: KroneckerMatrix) -> Inexact[Tensor, "*batch d"]:
    d1, d2 = map(diagonal, A.factors)
    return (d1[..., :, None] * d2[..., None, :]).flatten(-2, -1)


@entries.register
def _(A: KroneckerMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    m2, n2 = A.right.shape[-2:]
    L, R = A.factors
    return entries(L, rows // m2, columns // n2) * entries(R, rows % m2, columns % n2)


@trace.register(where=_square)
def _(A: KroneckerMatrix) -> Inexact[Tensor, "*batch"]:
    return trace(A.factors[0]) * trace(A.factors[1])


@eigh.register(where=_hermitian)
def _(A: KroneckerMatrix, k: int | None = None) -> Eigh:
    (v1, Q1), (v2, Q2) = map(eigh, A.factors)
    pairs = Eigh((v1[..., :, None] * v2[..., None, :]).flatten(-2, -1), KroneckerMatrix(Q1, Q2))
    return pairs if k is None else largest(pairs, k)


@svdvals.register
def _(A: KroneckerMatrix) -> Float[Tensor, "*batch d"]:
    s1, s2 = map(svdvals, A.factors)
    return descending((s1[..., :, None] * s2[..., None, :]).flatten(-2, -1), A)


@svd.register
def _(A: KroneckerMatrix) -> Svd:
    (U1, s1, V1), (U2, s2, V2) = map(svd, A.factors)
    values = (s1[..., :, None] * s2[..., None, :]).flatten(-2, -1)
    return Svd(KroneckerMatrix(U1, U2), values, KroneckerMatrix(V1, V2))


@power.register(where=lambda A, p: _square(A) and float(p).is_integer())
def _(A: KroneckerMatrix, p: float) -> KroneckerMatrix:
    L, R = A.factors
    return KroneckerMatrix(power(L, p), power(R, p))


def _positive_factors(A: KroneckerMatrix) -> list[LinearOperator]:
    """Two negative definite factors make a positive definite product: their signs are turned."""
    sign = torch.where(trace(A.factors[0]).detach().real < 0, -1.0, 1.0).to(A.dtype)
    return [scale(F, sign) for F in A.factors]


@power.register(where=lambda A, p: not float(p).is_integer() and _hermitian(A))
def _(A: KroneckerMatrix, p: float) -> KroneckerMatrix:
    return KroneckerMatrix(*[power(F, p) for F in _positive_factors(A)])


@cholesky.register(where=_hermitian)
def _(A: KroneckerMatrix) -> KroneckerMatrix:
    return KroneckerMatrix(*map(cholesky, _positive_factors(A)))


@norm.register
def _(A: KroneckerMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    return norm(A.factors[0], order) * norm(A.factors[1], order)


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
