"""The structures that a matrix is compared with, by name."""

import itertools
import math

import torch
from torch import Tensor

from matrigami.operators import factorize
from matrigami.structures import KroneckerSum, TensorTrain
from matrigami.studies.analysis import _partitions
from matrigami.studies.analysis._families import (
    Blocks,
    Candidates,
    Family,
    Masks,
    Nested,
    Place,
    projected,
)
from matrigami.studies.analysis._members import (
    SPARSE_UNITS,
    block_diagonals,
    by_size,
    diagonals,
    sparse_plus_low_rank,
    toeplitz,
)
from matrigami.studies.analysis._partitions import Partition

TRAIN_RANKS = (1, 2, 4, 8, 12, 16)
"""Of tensor trains."""


def _grids(place: Place) -> list[tuple[int, int]]:
    """Numbers of row and of column blocks around the roots of the sizes, powers of two."""
    middle = [round(math.log2(max(size, 2)) / 2) for size in place.size]
    pairs = [(2 ** max(middle[0] + k, 0), 2 ** max(middle[1] + k, 0)) for k in (-1, 0, 1)]
    return [(r, c) for r, c in dict.fromkeys(pairs) if r <= place.size[0] and c <= place.size[1]]


def _train_grids(place: Place) -> list[tuple[int, int]]:
    """These, and those of balanced factors, as trains of two cores have them."""
    rows, columns = (factorize(size, 2) for size in place.size)
    return list(dict.fromkeys([*_grids(place), *itertools.product(rows, columns)]))


def _kronecker_partitions(place: Place) -> list[Partition]:
    """For every size of the left factor between one entry and all."""
    sizes = _partitions.factor_sizes(*place.size) or [(1, 1)]
    return [_partitions.kronecker(*place.size, *pair) for pair in sizes]


def _tensor_trains(A: Tensor) -> list[tuple[float, Tensor]]:
    """Three cores; a size without balanced factors is padded by zeros."""
    m, n = A.shape
    M, N = (math.prod(factorize(size, 3)) for size in (m, n))
    D = torch.nn.functional.pad(A, (0, N - n, 0, M - m))
    found = projected("tt", [TensorTrain(rank=r, cores=3) for r in TRAIN_RANKS]).members(D)
    return [(numbers, B[:m, :n]) for numbers, B in found]


def _square(family: Candidates) -> Candidates:
    """The family for square matrices; others have no member."""
    found = family.members
    return Candidates(
        family.name,
        family.label,
        family.world,
        lambda A: found(A) if A.shape[0] == A.shape[1] else [],
        family.optimal,
    )


_ALL: tuple[Family, ...] = (
    Blocks("low_rank", "low rank", "both", lambda p: [_partitions.whole(*p.size)], ordered=False),
    Masks("sparse", "sparse", "both", by_size, units=SPARSE_UNITS, ordered=False),
    Masks("band", "band", "HPC", diagonals),
    Candidates("block_diagonal", "block diagonal", "both", block_diagonals, optimal=True),
    Candidates("toeplitz", "Toeplitz or circulant", "HPC", toeplitz, optimal=True),
    Blocks("kronecker", "sum of Kronecker products", "AI", _kronecker_partitions),
    _square(
        Candidates(
            "kronecker_sum",
            "Kronecker sum",
            "both",
            projected("kronecker_sum", [KroneckerSum()]).members,
        )
    ),
    Blocks(
        "monarch",
        "Monarch",
        "AI",
        lambda p: [_partitions.shuffled_tiles(*p.size, *k) for k in _train_grids(p)],
        equal=True,
    ),
    Blocks(
        "btt",
        "block tensor train",
        "AI",
        lambda p: [_partitions.tiles(*p.size, *k) for k in _train_grids(p)],
        equal=True,
    ),
    Candidates(
        "tt",
        "tensor train",
        "AI",
        _tensor_trains,
    ),
    Blocks(
        "blr",
        "block low rank",
        "HPC",
        lambda p: [_partitions.tiles(*p.size, *k) for k in _grids(p)],
    ),
    Blocks("hodlr", "HODLR", "HPC", lambda p: [_partitions.weak(*p.size)]),
    Blocks("h", "H matrix", "HPC", lambda p: [_partitions.strong(*p.size, p.admissible())]),
    Nested(),
    Candidates(
        "sparse_low_rank", "sparse plus low rank", "both", sparse_plus_low_rank, ordered=False
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""The families by name; where two serve a matrix equally well, the one named first is meant."""
