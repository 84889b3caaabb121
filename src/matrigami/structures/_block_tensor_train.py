"""Block tensor train (BTT): a chain of block-diagonal products joined by perfect shuffles.

Input axes `(n_c, ..., n_1)`, output axes `(m_1, ..., m_c)`, the last one fastest. Core `i`
contracts input axis `n_i` (and rank `r_{i-1}`) into output axis `m_i` (and rank `r_i`), with its
own matrix for each value of the inputs still to come, `q = n_{i+1} ... n_c`, and of the outputs
already made, `p = m_1 ... m_{i-1}`. Two cores of rank 1 are Monarch.

Storage and cost per vector: the entries of the cores; for two cores of rank `r`, `r (n m_1 + m
n_2)`. The product keeps the right-hand sides as the fastest axis, so that two cores need no copy
at all. Square blocks make solve and logdet exact and fast, block by block. Projection: sequential
truncated SVD; best for two cores, quasi-best (within `sqrt(c - 1)` of the best) for more. Source:
Qiu et al. (2024), arXiv:2406.06248.

Shapes: m = rows, n = columns, c = cores, r = rank, p, q = block indices, k = right-hand sides.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Fan,
    LinearOperator,
    Structure,
    TwoFactors,
    add,
    as_two_factors,
    chained,
    contraction,
    contractions,
    cropped,
    diagonal,
    diagonal_by_entries,
    entries,
    example,
    factorize,
    fans,
    inverse,
    is_big,
    is_written_in_place,
    lu_inverse,
    lu_slogdet,
    norm,
    project,
    raveled,
    resolve_rank,
    root_of_squares,
    scale,
    slogdet,
    solve,
    truncated_svd,
    two_factors,
)

__all__ = ["BlockTensorTrain", "BlockTensorTrainMatrix"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockTensorTrainMatrix(LinearOperator):
    """A chain of cores; core `i` has axes `(q, p, r_i, m_i, n_i, r_{i-1})`, `r_0 = r_c = 1`.

    With `reversed_rows` the output axes are `(m_c, ..., m_1)` (interleaved) instead of `(m_1, ...,
    m_c)` (blocked), and with `reversed_columns` the input axes `(n_1, ..., n_c)`.
    """

    cores: tuple[Inexact[Tensor, "*batch _ _ _ _ _ _"], ...]
    reversed_rows: bool = False
    reversed_columns: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        m, n = (math.prod([C.shape[axis] for C in self.cores]) for axis in (-3, -2))
        batch = torch.broadcast_shapes(*[C.shape[:-6] for C in self.cores])
        return (*batch, m, n)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """One batched product for each core; the shuffles between two cores are views."""
        if len(self.cores) == 2 and is_written_in_place(X, *self.cores) and self.cores[0].ndim == 6:
            return two_factors(X, **_two_cores(self)._asdict())
        Z = _shuffled(X, [C.shape[-2] for C in self.cores], self.reversed_columns)[..., :, None, :]
        for C in self.cores:
            q, p, r, m, n, s = C.shape[-6:]
            Z = Z.reshape(*Z.shape[:-3], q, n * s, p, Z.shape[-1]).transpose(-3, -2)  # ... q p ns k
            Z = C.flatten(-4, -3).flatten(-2, -1) @ Z  # ... q p rm k
            Z = Z.unflatten(-2, (r, m)).movedim(-3, -4)  # ... q r p m k
            Z = Z.flatten(-5, -4).flatten(-3, -2)
        Z = Z.squeeze(-3)  # not Z[..., 0, :, :], whose gradient is a copy
        return _shuffled(Z, [C.shape[-3] for C in self.cores], self.reversed_rows)

    @property
    def T(self) -> "BlockTensorTrainMatrix":
        """The chain backwards: `q` and `p`, rows and columns, left and right rank change places."""
        cores = tuple(
            C.movedim((-6, -5, -4, -3, -2, -1), (-5, -6, -1, -2, -3, -4))
            for C in reversed(self.cores)
        )
        return BlockTensorTrainMatrix(cores, self.reversed_columns, self.reversed_rows)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself, by one contraction over all ranks."""
        c = len(self.cores)
        outputs, inputs, ranks = (list(range(i * (c + 1), (i + 1) * (c + 1))) for i in range(3))
        operands: list[object] = []
        for i, C in enumerate(self.cores):
            later = [K.shape[-2] for K in reversed(self.cores[i + 1 :])]
            done = [K.shape[-3] for K in self.cores[:i]]
            grid = C.reshape(*C.shape[:-6], *later, *done, *C.shape[-4:])
            axes = [
                *inputs[c - 1 : i : -1],
                *outputs[:i],
                ranks[i + 1],
                outputs[i],
                inputs[i],
                ranks[i],
            ]
            operands += [grid, [..., *axes]]
        row_axes = outputs[:c][::-1] if self.reversed_rows else outputs[:c]
        column_axes = inputs[:c] if self.reversed_columns else inputs[:c][::-1]
        W = torch.einsum(*operands, [..., *row_axes, *column_axes])
        return W.reshape(*W.shape[: W.ndim - 2 * c], *self.shape[-2:])


@example("btt", rank=1)
@dataclass(frozen=True)
class BlockTensorTrain(Structure):
    """Block tensor trains of balanced axes.

    Args:
        rank: The rank between two cores: an int, or a fraction of full (`sqrt(n)`-like for two
            cores of a square matrix).
        cores: The number of cores, at least 2. A size without balanced factors is padded (see
            `CroppedMatrix`).
        interleaved: Output axes in reversed order, as Monarch has them.

    Examples:
        >>> BlockTensorTrain(rank=1).init(16, 16)
        BlockTensorTrainMatrix(16x16, 128 parameters)
    """

    rank: float = 1
    cores: int = 2
    interleaved: bool = False

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If the rank is below 1 or above full, or there are fewer than two cores.
        """
        rows, columns = self._axes(m, n)
        ranks = all_ranks(rows, columns, self.rank, str(self))
        blanks = [empty(*shape) for shape in _shapes(rows, columns, ranks)]
        return cropped(BlockTensorTrainMatrix(tuple(blanks), self.interleaved), m, n)

    def _axes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the output and input axes."""
        if self.cores < 2:
            raise ValueError(
                f"{self}: a block tensor train has at least two cores.\nUse Dense() for one."
            )
        return factorize(m, self.cores), factorize(n, self.cores)


def block_tensor_train_svd(
    W: Inexact[Tensor, "*batch m n"],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    rank: float,
    what: str,
) -> tuple[Tensor, ...]:
    """The cores of the nearest chain, blocked layout, by one truncated SVD after another."""
    c, batch = len(rows), W.shape[:-2]
    ranks = all_ranks(rows, columns, rank, what)
    cores: list[Tensor] = []
    R = W.mT[..., :, None, None, :]  # ... (q n) p s (m rest)
    for i in range(c - 1):
        p, s = R.shape[-3:-1]
        M = R.reshape(*batch, -1, columns[i], p, s, rows[i], math.prod(rows[i + 1 :]))
        M = M.movedim((-4, -2), (-5, -4))  # ... q p m n s rest
        U, R = truncated_svd(M.flatten(-3, -2), ranks[i + 1], balanced=i == c - 2)
        cores.append(U.unflatten(-2, (columns[i], s)).movedim(-1, -4))  # ... q p r m n s
        R = R.flatten(-4, -3)  # ... q (p m) r rest
    core = R.movedim((-4, -3, -2, -1), (-2, -4, -1, -3))  # ... p m n s
    return (*cores, core[..., None, :, None, :, :, :])


def _shuffled(X: Tensor, axes: list[int], reverse: bool) -> Tensor:
    """Reverse the given factors of the second-last axis, or leave it as it is."""
    if not reverse:
        return X
    c = len(axes)
    return (
        X.unflatten(-2, axes)
        .permute(*range(X.ndim - 2), *range(X.ndim + c - 3, X.ndim - 3, -1), X.ndim + c - 2)
        .flatten(-c - 1, -2)
    )


def all_ranks(rows: tuple[int, ...], columns: tuple[int, ...], rank: float, what: str) -> list[int]:
    """Ranks `r_0 = 1, ..., r_c = 1`; an int may exceed the full rank of some cut, not of all."""
    full, ranks = [], [1]
    for i in range(len(rows) - 1):
        full.append(min(columns[i] * ranks[-1], math.prod(rows[i + 1 :])))
        ranks.append(
            resolve_rank(rank, full[-1], what)
            if isinstance(rank, float)
            else max(min(rank, full[-1]), 1)
        )
    if not isinstance(rank, float):
        resolve_rank(rank, max(full), what)
    return [*ranks, 1]


def _shapes(
    rows: tuple[int, ...], columns: tuple[int, ...], ranks: list[int]
) -> list[tuple[int, ...]]:
    """The shape `(q, p, r_i, m_i, n_i, r_{i-1})` of each core."""
    return [
        (
            math.prod(columns[i + 1 :]),
            math.prod(rows[:i]),
            ranks[i + 1],
            rows[i],
            columns[i],
            ranks[i],
        )
        for i in range(len(rows))
    ]


def _square(A: BlockTensorTrainMatrix, *_: Any) -> bool:
    """Whether every block is square, which makes the chain a product of invertible steps."""
    return all(r * m == n * s for r, m, n, s in (C.shape[-4:] for C in A.cores))


@inverse.register(where=_square)
def _(A: BlockTensorTrainMatrix) -> BlockTensorTrainMatrix:
    """The chain of inverse blocks, backwards; it has the layout of the transpose."""
    cores = []
    for C in reversed(A.cores):
        _, _, r, m, n, s = C.shape[-6:]
        blocks = lu_inverse(C.flatten(-4, -3).flatten(-2, -1))  # ... q p ns rm
        grid = blocks.unflatten(-2, (n, s)).unflatten(-1, (r, m))
        cores.append(grid.movedim((-6, -5, -4, -3, -2, -1), (-5, -6, -3, -4, -1, -2)))
    return BlockTensorTrainMatrix(tuple(cores), A.reversed_columns, A.reversed_rows)


@as_two_factors.register(where=lambda A: len(A.cores) == 2)
def _two_cores(A: BlockTensorTrainMatrix) -> TwoFactors:
    R, L = A.cores[0].squeeze((-5, -1)), A.cores[1].squeeze((-6, -4))
    return TwoFactors(R, L, A.reversed_rows, A.reversed_columns)


@fans.register
def _(A: BlockTensorTrainMatrix) -> tuple[Fan, ...]:
    shapes = [C.shape[-4:] for C in A.cores]
    return tuple(
        Fan(n * s, m * r, last=i == len(shapes) - 1) for i, (r, m, n, s) in enumerate(shapes)
    )


def _labels(axis: str, numbers: Iterable[int]) -> list[str]:
    """`n2 n1 n0` and the like."""
    return [f"{axis}{i}" for i in numbers]


@contractions.register
def _(A: BlockTensorTrainMatrix) -> tuple[Contraction, ...]:
    c = len(A.cores)
    sizes = {f"r{c}": 1}
    for i, C in enumerate(A.cores):
        sizes |= zip((f"m{i}", f"n{i}", f"r{i}"), C.shape[-3:], strict=True)
    steps = []
    for i, C in enumerate(A.cores):
        later, made = _labels("n", range(c - 1, i, -1)), _labels("m", range(i))
        taken, given = [*later, f"n{i}", f"r{i}", *made], [*later, f"r{i + 1}", *made, f"m{i}"]
        if i == 0 and A.reversed_columns:
            taken = [*_labels("n", range(c)), "r0"]
        if i == c - 1 and A.reversed_rows:
            given = [*_labels("m", range(c - 1, -1, -1)), f"r{c}"]
        axes = f"({' '.join(later)}) ({' '.join(made)}) r{i + 1} m{i} n{i} r{i}"
        steps.append(contraction(C, axes, " ".join(taken), " ".join(given), **sizes))
    return chained(*steps)


@add.register(where=lambda A, B: len(A.cores) == 2 and layout(A) == layout(B))
def _(A: BlockTensorTrainMatrix, B: BlockTensorTrainMatrix) -> BlockTensorTrainMatrix:
    (A1, A2), (B1, B2) = A.cores, B.cores
    return BlockTensorTrainMatrix(
        (torch.cat([A1, B1], -4), torch.cat([A2, B2], -1)), A.reversed_rows, A.reversed_columns
    )


def layout(A: BlockTensorTrainMatrix) -> tuple[object, ...]:
    """All that two trains must share for their ranks to concatenate."""
    axes = [(*C.shape[:-4], *C.shape[-3:-1]) for C in A.cores]
    return (*axes, A.reversed_rows, A.reversed_columns)


@scale.register
def _(A: BlockTensorTrainMatrix, factor: Tensor) -> BlockTensorTrainMatrix:
    first, *rest = A.cores
    first = first * factor[(..., *[None] * 6)]
    return BlockTensorTrainMatrix((first, *rest), A.reversed_rows, A.reversed_columns)


@solve.register(where=_square)
def _(A: BlockTensorTrainMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return inverse(A).matmat(B)


@slogdet.register(where=_square)
def _(A: BlockTensorTrainMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    signs, logs = zip(
        *[lu_slogdet(C.flatten(-4, -3).flatten(-2, -1)) for C in A.cores], strict=True
    )
    sign = torch.stack([s.flatten(-2, -1).prod(-1) for s in signs]).prod(0)
    return sign * _shuffle_sign(A), torch.stack([log.sum((-2, -1)) for log in logs]).sum(0)


def _shuffle_sign(A: BlockTensorTrainMatrix) -> int:
    """The sign of the permutations between the blocks: of the chain whose blocks are identities."""
    eyes = []
    for C in A.cores:
        *_, q, p, r, m, n, s = C.shape
        eye = torch.eye(r * m).expand(q, p, r * m, n * s)
        eyes.append(eye.unflatten(-2, (r, m)).unflatten(-1, (n, s)))
    columns = torch.arange(A.shape[-1], dtype=torch.get_default_dtype())[:, None]
    order = BlockTensorTrainMatrix(
        tuple(e.to(columns) for e in eyes), A.reversed_rows, A.reversed_columns
    ).matmat(columns)
    return _permutation_sign([int(i) for i in order[:, 0].round()])


def _permutation_sign(order: list[int]) -> int:
    """Minus one to the number of even cycles."""
    sign, seen = 1, [False] * len(order)
    for start in range(len(order)):
        length, i = 0, start
        while not seen[i]:
            seen[i], i, length = True, order[i], length + 1
        sign = -sign if length and length % 2 == 0 else sign
    return sign


@entries.register
def _(A: BlockTensorTrainMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """A product of small matrices, one of each core."""
    m, n = ([C.shape[axis] for C in A.cores] for axis in (-3, -2))
    i, j = _digits(rows, m, A.reversed_rows), _digits(columns, n, not A.reversed_columns)
    product = None
    for a, C in enumerate(A.cores):
        q = raveled(j[:a:-1], n[:a:-1], columns)
        p = raveled(i[:a], m[:a], rows)
        G = C.movedim(-4, -2)[..., q, p, i[a], j[a], :, :]  # ... e r s
        product = G if product is None else G @ product
    return product[..., 0, 0]  # pyright: ignore[reportOptionalSubscript]


def _digits(index: Tensor, sizes: list[int], reverse: bool) -> list[Tensor]:
    """The position on each axis; `reverse` if the last axis is the slowest."""
    digits = torch.unravel_index(index, sizes[::-1] if reverse else sizes)
    return list(digits[::-1] if reverse else digits)


@diagonal.register
def _(A: BlockTensorTrainMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal_by_entries(A)


@norm.register(where=is_big)
def _(A: BlockTensorTrainMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """Gram matrices of the ranks, core by core, for each input to come and output already made."""
    G = A.cores[0].new_ones(*A.shape[:-2], A.shape[-1], 1, 1, 1)  # ... q p s t
    for C in A.cores:
        G = G.unflatten(-4, (C.shape[-6], C.shape[-2]))  # ... q n p s t
        half = torch.einsum("...qprmns,...qnpst->...qprmnt", C, G)
        G = torch.einsum("...qprmnt,...qpumnt->...qpmru", half, C.conj()).flatten(-4, -3)
    squares = G[..., 0, 0].real.sum((-2, -1))
    return root_of_squares(squares)


@project.register
def _(recipe: BlockTensorTrain, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    rows, columns = recipe._axes(m, n)
    M, N = math.prod(rows), math.prod(columns)
    D = torch.nn.functional.pad(W, (0, N - n, 0, M - m))
    if recipe.interleaved:
        D = _shuffled(D, list(reversed(rows)), reverse=True)
    cores = block_tensor_train_svd(D, rows, columns, recipe.rank, str(recipe))
    return cropped(BlockTensorTrainMatrix(cores, recipe.interleaved), m, n)
