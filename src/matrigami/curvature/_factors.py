"""Running sums of the second moments of blocks of parameters.

Shapes: b = blocks, i = inputs, o = outputs of a block.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from matrigami.curvature._blocks import Key
from matrigami.curvature._moments import gradient_moment, input_moment, input_rows
from matrigami.nn import Use
from matrigami.operators import (
    DenseMatrix,
    LinearOperator,
    named_tensors,
    scale,
    with_tensors,
)
from matrigami.structures import KroneckerMatrix

BALANCING = 60
"""Power iterations on the Gram matrices of a sum of Kronecker products; each is a few numbers."""


class MomentCache:
    """Additions of one batch: what is the same sum of the same operators is one operator.

    So layers that read the same inputs (queries, keys and values) share one second moment, which is
    computed, added and stored once.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.moments: dict[int, tuple[object, LinearOperator]] = {}
        self.sums: dict[tuple[int, int], tuple[LinearOperator, LinearOperator]] = {}

    def moment(self, use: Use) -> LinearOperator:
        """The second moment of the inputs of a use."""
        key = id(use.inputs)
        if key not in self.moments:  # holding the inputs keeps their id from being given again
            self.moments[key] = (use.inputs, self.cast(input_moment(use.inputs), use))
        return self.moments[key][1]

    def cast(self, A: LinearOperator, use: Use) -> LinearOperator:
        """A moment in the type of the sums: by default that of the gradients or inputs."""
        known = use.inputs if use.gradients is None else use.gradients
        dtype = self.dtype or (known.dtype if isinstance(known, Tensor) else A.dtype)
        return with_tensors(A, iter([t.to(dtype) for t in named_tensors(A).values()]))

    def plus(self, total: LinearOperator | None, A: LinearOperator) -> LinearOperator:
        """`total + A` for a moment of inputs."""
        if total is None:
            return A
        key = (id(total), id(A))  # both are held, so that no other object has their ids
        if key not in self.sums:
            self.sums[key] = (total, total + A)
        return self.sums[key][1]


@dataclass(eq=False)
class Factors:
    """Sums for one block.

    Args:
        transposed: Whether the parameter stores `(i, o)` matrices.
        A: Sum over inputs.
        rows: Number of inputs.
        B: Sum over gradients.
    """

    transposed: bool
    A: LinearOperator | None = None
    rows: float = 0.0
    B: LinearOperator | None = None

    def add(self, use: Use, cache: MomentCache, weight: float = 1.0) -> None:
        """Add one use; `weight` counts for the gradients."""
        self.A = cache.plus(self.A, cache.moment(use))
        self.rows += input_rows(use.inputs) if use.rows is None else use.rows
        if use.gradients is not None:
            B = cache.cast(gradient_moment(use.gradients), use)
            B = B if weight == 1.0 else scale(B, weight)
            self.B = B if self.B is None else self.B + B

    def product(self) -> KroneckerMatrix:
        """`B (x) A` with `A` the mean over inputs, in the coordinates of the parameter."""
        A, B = scale(_known(self.A), 1 / (self.rows or 1)), _known(self.B)
        left, right = (A, B) if self.transposed else (B, A)
        return KroneckerMatrix(plain(left), plain(right))


class SecondMoments:
    """The sums of every block, over any number of batches: `A`, `B` and how many inputs there were.

    A block has several where layers use it differently (a table that is also the output matrix).

    Args:
        dtype: Type of the sums; by default that of the gradients or inputs.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._factors: dict[Key, dict[tuple[bool, type], Factors]] = {}

    def add(
        self,
        blocks: Mapping[Key, list[Use]],
        weight: float = 1.0,
        cache: MomentCache | None = None,
    ) -> None:
        """Add what blocks saw in some calls.

        Args:
            blocks: What they saw.
            weight: Of the moments of gradients.
            cache: Of the batch, if it comes in several parts.
        """
        cache = MomentCache(self.dtype) if cache is None else cache
        for key, parts in blocks.items():
            known = self._factors.setdefault(key, {})
            for use in parts:
                kind = (use.transposed, type(use.inputs))
                known.setdefault(kind, Factors(use.transposed)).add(use, cache, weight)

    def __iter__(self) -> Iterator[Key]:
        """The blocks that were seen."""
        return iter(self._factors)

    def __getitem__(self, key: Key) -> list[Factors]:
        """The sums of a block, for each way in which it is used."""
        return list(self._factors[key].values())

    def products(self) -> dict[Key, KroneckerMatrix]:
        """`B (x) A` for each block, with `A` the mean over inputs; the nearest one to several."""
        return {key: nearest_product([F.product() for F in self[key]]) for key in self}

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of all processes, in place; a tensor that several share, once."""
        every = list(self._in_one_order())
        sums = [M for F in every for M in (F.A, F.B) if M is not None]
        tensors = itertools.chain.from_iterable(named_tensors(M).values() for M in sums)
        for t in {id(t): t for t in tensors}.values():
            dist.all_reduce(t, group=group)
        for F in every:
            F.rows = total(F.rows, _known(F.A).device, group)

    def _in_one_order(self) -> Iterator[Factors]:
        """All sums, in the order that they have on every process."""
        for key in sorted(self._factors):
            known = self._factors[key]
            yield from (known[kind] for kind in sorted(known, key=str))


def total(count: float, device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """The sum of a number over all processes."""
    t = torch.tensor(count, dtype=torch.float64, device=device)
    dist.all_reduce(t, group=group)
    return float(t)


def nearest_product(terms: list[KroneckerMatrix]) -> KroneckerMatrix:
    """The Kronecker product nearest to a sum of a few, in the Frobenius norm.

    The factors of the best product are combinations of those of the terms, so that the singular
    vectors of the rearranged sum are found among as many numbers as there are terms.
    """
    if len(terms) == 1:
        return terms[0]
    lefts, rights = (
        torch.stack([K.factors[side].dense() for K in terms], 1) for side in (0, 1)
    )  # b terms n n
    P, Q = (F.flatten(2) @ F.flatten(2).mT for F in (lefts, rights))
    x, tiny = P.new_ones(*P.shape[:-1], 1), torch.finfo(P.dtype).tiny
    for _ in range(BALANCING):
        x = Q @ P @ x
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(
            torch.finfo(x.dtype).tiny
        )
    y = P @ x / (x.mT @ P @ x).clamp_min(tiny)
    left, right = ((w[..., None] * F).sum(1) for w, F in ((x, lefts), (y, rights)))
    return KroneckerMatrix(left, right)


def _known(A: LinearOperator | None) -> LinearOperator:
    """A sum that has been added to.

    Raises:
        ValueError: If it has not.
    """
    if A is None:
        raise ValueError(
            "Kronecker product of moments: they have no gradients.\n"
            "Only inputs were seen.\nRun backward passes while the capture is open."
        )
    return A


def plain(A: LinearOperator) -> Tensor | LinearOperator:
    """A dense factor as a tensor."""
    return A.entries if isinstance(A, DenseMatrix) else A
