"""Tensor train (TT): `A = sum over ranks of A_1 (x) A_2 (x) ... (x) A_c`.

`W[(m_1..m_c), (n_1..n_c)] = sum_r prod_i core_i[r_{i-1}, m_i, n_i, r_i]`. Rank 1 is a Kronecker
product; two cores of rank `r` are a sum of `r` Kronecker products. Storage: the cores; cost per
vector: core `i` is used once for each of the inputs `n_1..n_{i-1}` still to come and each of the
outputs `m_{i+1}..m_c` already made. No copies: the right-hand sides stay the fastest axis.
Projection: TT-SVD (Oseledets 2011), best for two cores, within `sqrt(c - 1)` of the best for more.
Source for layers: Novikov et al. (2015), arXiv:1509.06569.

Shapes: m = rows, n = columns, c = cores, r = rank, k = right-hand sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    Fan,
    LinearOperator,
    Structure,
    add,
    chained,
    compose,
    contraction,
    contractions,
    cost,
    cropped,
    diagonal,
    diagonal_by_entries,
    entries,
    example,
    factorize,
    fans,
    fitted_corner,
    project,
    resolve_rank,
    scale,
    take_rows,
    trace,
    truncated_svd,
)

__all__ = ["TensorTrain", "TensorTrainMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class TensorTrainMatrix(LinearOperator):
    """The matrix of a chain of cores of axes `(r_{i-1}, m_i, n_i, r_i)`, `r_0 = r_c = 1`.

    Examples:
        >>> import torch
        >>> TensorTrainMatrix((torch.ones(1, 2, 2, 3), torch.ones(3, 2, 2, 1))).dense()[0, 0]
        tensor(3.)
    """

    cores: tuple[Inexact[Tensor, "*batch _ _ _ _"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        m, n = (math.prod([C.shape[axis] for C in self.cores]) for axis in (-3, -2))
        batch = torch.broadcast_shapes(*[C.shape[:-4] for C in self.cores])
        return (*batch, m, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """One broadcast product for each core, from the end that makes the product cheaper."""
        last_first, first_first = _orders(self)
        Y = _from_last(self.cores, X) if last_first <= first_first else _from_first(self.cores, X)
        return Y.unflatten(-1, (self.shape[-2], X.shape[-1])).squeeze(-3)

    @property
    def T(self) -> "TensorTrainMatrix":
        """Transpose each core."""
        return TensorTrainMatrix(tuple(C.transpose(-3, -2) for C in self.cores))

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        D = self.cores[0][..., 0, :, :, :]
        for C in self.cores[1:]:
            D = torch.einsum("...mnr,...rpqs->...mpnqs", D, C).flatten(-5, -4).flatten(-3, -2)
        return D[..., 0]


@example("tt", rank=2)
@dataclass(frozen=True)
class TensorTrain(Structure):
    """Tensor trains of balanced axes.

    Args:
        rank: The rank between two cores: an int, or a fraction of full.
        cores: The number of cores, at least 2. A size without balanced factors is padded (see
            `CroppedMatrix`).

    Examples:
        >>> TensorTrain(rank=2).init(16, 16)
        TensorTrainMatrix(16x16, 64 parameters)
    """

    rank: float = 1
    cores: int = 2

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If the rank is below 1 or above full, or there are fewer than two cores.
        """
        rows, columns = self._axes(m, n)
        ranks = self._ranks(rows, columns)
        shapes = zip(ranks, rows, columns, ranks[1:], strict=False)
        blanks = [empty(*shape) for shape in shapes]
        return cropped(TensorTrainMatrix(tuple(blanks)), m, n)

    def _axes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the output and input axes."""
        if self.cores < 2:
            raise ValueError(
                f"{self}: a tensor train has at least two cores.\nUse Dense() for one."
            )
        return factorize(m, self.cores), factorize(n, self.cores)

    def _ranks(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> list[int]:
        """Ranks from `r_0 = 1` to `r_c = 1`; an int may exceed the full rank of some cut."""
        sizes = [a * b for a, b in zip(rows, columns, strict=True)]
        full = [
            min(math.prod(sizes[: i + 1]), math.prod(sizes[i + 1 :])) for i in range(len(sizes) - 1)
        ]
        whole = resolve_rank(self.rank, max(full), str(self))
        if isinstance(self.rank, float):
            return [1, *[resolve_rank(self.rank, f, str(self)) for f in full], 1]
        return [1, *[min(whole, f) for f in full], 1]


def _from_last(cores: tuple[Tensor, ...], Z: Tensor) -> Tensor:
    """Contract the last input axis first; the state is `(inputs to come, r) x (outputs, k)`."""
    for C in reversed(cores):
        s, m, n, r = C.shape[-4:]
        Z = Z.unflatten(-2, (Z.shape[-2] // (n * r), n * r))  # ... inputs (n r) (outputs k)
        Z = _broadcast(C.flatten(-4, -3).flatten(-2, -1), Z).unflatten(-2, (s, m))
        Z = Z.flatten(-2, -1).flatten(-3, -2)  # ... (inputs s) (m outputs k)
    return Z


def _from_first(cores: tuple[Tensor, ...], X: Tensor) -> Tensor:
    """Contract the first input axis first; the state is `(outputs, r) x (inputs to come, k)`."""
    k, Z = X.shape[-1], X.flatten(-2, -1).unsqueeze(-2)  # ... (outputs r)=1 (inputs k)
    for C in cores:
        s, _, n, _ = C.shape[-4:]
        inputs = Z.shape[-1] // (n * max(k, 1))
        Z = Z.unflatten(-2, (Z.shape[-2] // s, s)).unflatten(-1, (n, inputs * k)).flatten(-3, -2)
        M = C.movedim((-4, -3, -2, -1), (-2, -4, -1, -3)).flatten(-4, -3).flatten(-2, -1)
        Z = _broadcast(M, Z).flatten(-3, -2)  # ... (outputs m r) (inputs k)
    return Z.flatten(-2, -1).unsqueeze(-2)


def _broadcast(M: Tensor, Z: Tensor) -> Tensor:
    """`M @ Z` for a stack of `Z`, with `M` expanded: `matmul` alone would copy `Z`."""
    M = M.unsqueeze(-3)
    return M.expand(*M.shape[:-3], Z.shape[-3], *M.shape[-2:]) @ Z


def _orders(A: TensorTrainMatrix) -> tuple[int, int]:
    """Multiply-adds for one matrix of a stack, from the last core and from the first."""
    totals = []
    for cores in (A.cores[::-1], A.cores):
        macs, inputs, outputs = 0, A.shape[-1], 1
        for C in cores:
            inputs //= C.shape[-2]
            macs += math.prod(C.shape[-4:]) * inputs * outputs
            outputs *= C.shape[-3]
        totals.append(macs)
    return totals[0], totals[1]


@fans.register
def _(A: TensorTrainMatrix) -> tuple[Fan, ...]:
    return tuple(
        Fan(n * r, m * s, last=i == 0)
        for i, (s, m, n, r) in enumerate(C.shape[-4:] for C in A.cores)
    )


@contractions.register
def _(A: TensorTrainMatrix) -> tuple[Contraction, ...]:
    c = len(A.cores)
    sizes = {f"m{i}": C.shape[-3] for i, C in enumerate(A.cores)}
    sizes |= {f"n{i}": C.shape[-2] for i, C in enumerate(A.cores)}
    sizes |= {f"r{i}": C.shape[-4] for i, C in enumerate(A.cores)} | {f"r{c}": 1}
    last_first, first_first = _orders(A)
    down = last_first <= first_first

    def state(bond: int) -> str:
        """The axes while the bond `r{bond}` is open: outputs on one side of it, inputs beyond."""
        low, high = "nm" if down else "mn"
        axes = [f"{low if i < bond else high}{i}" for i in range(c)]
        return " ".join([*axes[:bond], f"r{bond}", *axes[bond:]])

    steps = []
    for i, C in enumerate(A.cores):
        states = [state(i), state(i + 1)]
        core = f"r{i} m{i} n{i} r{i + 1}"
        steps.append(contraction(C, core, *(states[::-1] if down else states), **sizes))
    return tuple(reversed(chained(*reversed(steps)))) if down else chained(*steps)


@cost.register
def _(A: TensorTrainMatrix) -> Cost:
    params = sum(C.numel() for C in A.cores)
    macs = min(_orders(A)) * math.prod(A.shape[:-2])
    return Cost(params, macs, params * A.cores[0].itemsize)


@add.register(where=lambda A, B: _axes(A) == _axes(B))
def _(A: TensorTrainMatrix, B: TensorTrainMatrix) -> TensorTrainMatrix:
    first, *middle, last = zip(A.cores, B.cores, strict=True)
    inner = [_block(C, D) for C, D in middle]
    return TensorTrainMatrix((torch.cat(first, -1), *inner, torch.cat(last, -4)))


def _conformal(A: TensorTrainMatrix, B: TensorTrainMatrix) -> bool:
    """Whether the input axes of one are the output axes of the other."""
    return [C.shape[-2] for C in A.cores] == [D.shape[-3] for D in B.cores]


@compose.register(where=_conformal)
def _(A: TensorTrainMatrix, B: TensorTrainMatrix) -> TensorTrainMatrix:
    """Core by core; the ranks multiply."""
    cores = [
        torch.einsum("...amnb,...cnpd->...acmpbd", C, D).flatten(-6, -5).flatten(-2, -1)
        for C, D in zip(A.cores, B.cores, strict=True)
    ]
    return TensorTrainMatrix(tuple(cores))


def _axes(A: TensorTrainMatrix) -> list[tuple[int, ...]]:
    """Batch, row and column axes of each core."""
    return [(*C.shape[:-4], *C.shape[-3:-1]) for C in A.cores]


def _block(C: Tensor, D: Tensor) -> Tensor:
    """Two cores side by side on both ranks."""
    top = torch.nn.functional.pad(C, (0, D.shape[-1]))
    bottom = torch.nn.functional.pad(D, (C.shape[-1], 0))
    return torch.cat([top, bottom], -4)


@scale.register
def _(A: TensorTrainMatrix, factor: Tensor) -> TensorTrainMatrix:
    first, *rest = A.cores
    return TensorTrainMatrix((first * factor[(..., *[None] * 4)], *rest))


@trace.register(where=lambda A: all(C.shape[-3] == C.shape[-2] for C in A.cores))
def _(A: TensorTrainMatrix) -> Inexact[Tensor, "*batch"]:
    product = torch.einsum("...rmms->...rs", A.cores[0])
    for C in A.cores[1:]:
        product = product @ torch.einsum("...rmms->...rs", C)
    return product[..., 0, 0]


@entries.register
def _(A: TensorTrainMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """A product of small matrices, one of each core."""
    i, j = (
        torch.unravel_index(x, [C.shape[axis] for C in A.cores])
        for x, axis in ((rows, -3), (columns, -2))
    )
    product = A.cores[0].movedim(-4, -2)[..., i[0], j[0], :, :]
    for a, C in enumerate(A.cores[1:], 1):
        product = product @ C.movedim(-4, -2)[..., i[a], j[a], :, :]
    return product[..., 0, 0]


@take_rows.register
def _(A: TensorTrainMatrix, index: Tensor) -> Inexact[Tensor, "*batch e n"]:
    """The chosen slice of each core, contracted from the first: an embedding of few numbers."""
    digits = torch.unravel_index(index, [C.shape[-3] for C in A.cores])
    rows = None
    for digit, C in zip(digits, A.cores, strict=True):
        G = C.movedim(-3, -4)[..., digit, :, :, :]  # ... e s n r
        if rows is None:
            rows = G[..., 0, :, :]
            continue
        rows = torch.einsum("...eas,...esnr->...eanr", rows, G).flatten(-3, -2)
    return rows[..., 0]  # pyright: ignore[reportOptionalSubscript]


@diagonal.register
def _(A: TensorTrainMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal_by_entries(A)


@project.register
def _(recipe: TensorTrain, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    rows, columns = recipe._axes(m, n)
    ranks = recipe._ranks(rows, columns)
    c, batch = len(rows), W.shape[:-2]
    padded = (math.prod(rows), math.prod(columns)) != (m, n)
    kind = torch.promote_types(W.dtype, torch.float64) if padded else W.dtype  # it starts a fit
    R = torch.nn.functional.pad(W.to(kind), (0, math.prod(columns) - n, 0, math.prod(rows) - m))
    R = R.unflatten(-2, rows).unflatten(-1, columns)
    R = R.permute(*range(len(batch)), *[len(batch) + i + side for i in range(c) for side in (0, c)])
    cores: list[Tensor] = []
    for i in range(c - 1):
        M = R.reshape(*batch, ranks[i] * rows[i] * columns[i], -1)
        left, R = truncated_svd(M, ranks[i + 1], balanced=i == c - 2)
        cores.append(left.reshape(*batch, ranks[i], rows[i], columns[i], -1))
    cores.append(R.reshape(*batch, ranks[c - 1], rows[-1], columns[-1], 1))
    return fitted_corner(TensorTrainMatrix(tuple(cores)), W)
