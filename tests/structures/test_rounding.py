"""Members of a lower rank from the factors: those of the dense projection, at any size."""

import pytest
import torch
from torch.testing import assert_close

from matrigami import (
    HODLR,
    Banded,
    BlockDiagonal,
    BlockLowRank,
    BlockTensorTrain,
    Circulant,
    DenseMatrix,
    Diagonal,
    Einsum,
    Kronecker,
    KroneckerSum,
    LinearOperator,
    LowRank,
    Monarch,
    MultiLevelLowRank,
    Structure,
    TensorTrain,
    Toeplitz,
    cost,
    kron,
    norm,
    project,
    svdvals,
)
from matrigami.operators import EXAMPLES, named_tensors, round_to

LOWER = {
    "hodlr": (HODLR(leaf=4, rank=2), HODLR(leaf=4, rank=1)),
    "blr": (BlockLowRank(tile=4, rank=3), BlockLowRank(tile=4, rank=1)),
    "monarch": (Monarch(blocks=4, rank=3), Monarch(blocks=4, rank=2)),
    "monarch, blocked": (
        Monarch(blocks=4, rank=3, interleaved=False),
        Monarch(blocks=4, rank=1, interleaved=False),
    ),
    "btt": (BlockTensorTrain(rank=3), BlockTensorTrain(rank=1)),
    "btt, interleaved": (
        BlockTensorTrain(rank=2, interleaved=True),
        BlockTensorTrain(rank=1, interleaved=True),
    ),
    "einsum": (Einsum(dims=(2, 4, 2, 4, 2, 2, 4)), Einsum(dims=(2, 4, 2, 4, 2, 2, 2))),
    "tt": (TensorTrain(rank=4), TensorTrain(rank=2)),
    "low rank": (LowRank(rank=5), LowRank(rank=2)),
}
"""What is there, and what is asked for."""

BY_ERROR = {
    "hodlr, tol": (HODLR(leaf=4, rank=2), HODLR(leaf=4, tol=0.3)),
    "blr, tol": (BlockLowRank(tile=4, rank=3), BlockLowRank(tile=4, tol=0.3)),
    "blr, budget": (BlockLowRank(tile=4, rank=3), BlockLowRank(tile=4, budget=0.5)),
}
"""What is there, and what chooses the ranks."""


def drawn(recipe: Structure, *size: int, seed: int = 0) -> LinearOperator:
    return recipe.init(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [*LOWER, *BY_ERROR])
def test_lower_ranks_are_those_of_the_dense_matrix(name: str):
    wide, narrow = (LOWER | BY_ERROR)[name]
    A = drawn(wide, 16, 16)
    B = A + drawn(wide, 16, 16, seed=1)
    for M in (A, B, 2.0 * A, (1 + 2j) * A + B):
        found, dense = round_to(M, narrow), project(narrow, M.dense())
        assert found is not None
        assert_close(found.dense(), dense.dense())
        shapes = [[t.shape for t in named_tensors(F).values()] for F in (found, dense)]
        assert shapes[0] == shapes[1]
    stack = DenseMatrix(torch.stack([A.dense(), B.dense()]))
    S = project(wide, stack)
    assert_close(project(narrow, S).dense(), project(narrow, S.dense()).dense())


@pytest.mark.parametrize("name", LOWER)
def test_complex_ones_too_and_ranks_that_are_not_there_are_zeros(name: str):
    wide, narrow = LOWER[name]
    A = project(narrow, torch.randn(16, 16, dtype=torch.complex128))
    found = project(wide, A)
    assert_close(found.dense(), A.dense())
    assert_close(project(narrow, (1 + 2j) * A).dense(), (1 + 2j) * A.dense())


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_member_is_its_own_and_shares_nothing(name: str):
    A = drawn(EXAMPLES[name], 12, 12)
    found = project(EXAMPLES[name], A)
    assert_close(found.dense(), A.dense())
    for t, s in zip(named_tensors(found).values(), named_tensors(A).values(), strict=True):
        assert t.data_ptr() != s.data_ptr()


@pytest.mark.parametrize(
    "recipe",
    [Kronecker(), Diagonal(), BlockDiagonal(blocks=3), Circulant(), KroneckerSum()],
    ids=str,
)
def test_low_rank_by_the_vectors_that_a_structure_knows(recipe: Structure):
    A = drawn(recipe, 12, 12)
    found = round_to(A, LowRank(rank=4))
    assert found is not None
    left_out = svdvals(A)[4:].norm()
    assert_close(torch.linalg.matrix_norm(found.dense() - A.dense()), left_out)


def test_derivatives_are_those_of_the_dense_projection():
    U = torch.randn(4, 4, 4, 2, dtype=torch.float64)

    def size(U: torch.Tensor, *, dense: bool) -> torch.Tensor:
        A = drawn(Monarch(blocks=4, rank=2), 16, 16)
        B = type(A)(U, A.right)
        return norm(project(Monarch(blocks=4, rank=1), B.dense() if dense else B))

    grads = [torch.func.grad(lambda U, d=d: size(U, dense=d))(U) for d in (True, False)]
    assert_close(*grads)


@pytest.mark.parametrize(
    ("wide", "narrow", "n"),
    [
        (HODLR(leaf=32, rank=2), HODLR(leaf=32, rank=1), 2**17),
        (BlockTensorTrain(rank=2), BlockTensorTrain(rank=1), 2**14),
        (MultiLevelLowRank(ranks=(1, 1)), MultiLevelLowRank(ranks=(1, 1)), 10**6),
        (KroneckerSum(), KroneckerSum(), 10**6),
        (Toeplitz(), Circulant(), 10**6),
        (Circulant(), LowRank(rank=2), 10**5),
        (Diagonal(), LowRank(rank=2), 10**6),
        (TensorTrain(rank=3), TensorTrain(rank=1), 10**6),
        (Banded(), Banded(), 10**6),
    ],
    ids=str,
)
def test_a_million_rows(wide: Structure, narrow: Structure, n: int):
    A = wide.init(n, n, dtype=torch.float32)
    found = project(narrow, A)
    assert found.shape == (n, n)
    assert cost(found).params <= cost(A).params or isinstance(narrow, LowRank)
    assert float(norm(found)) <= float(norm(A)) * (1 + 1e-4)


def test_what_is_wider_is_made_dense_as_before():
    A = kron(*torch.randn(2, 4, 4, dtype=torch.float64))
    assert round_to(A, Monarch(blocks=4)) is None


def test_tiles_of_differing_ranks_add_up_and_round():
    x = torch.linspace(0, 1, 32, dtype=torch.float64)
    K = torch.exp(-3 * (x[:, None] - x).abs())
    tight, loose = BlockLowRank(tile=8, tol=1e-4), BlockLowRank(tile=8, tol=0.05)
    A, B = project(tight, K), project(tight, K.roll(3, 0))
    even = drawn(BlockLowRank(tile=8, rank=1), 32, 32)
    for M, D in ((A + B, A.dense() + B.dense()), (A + even, A.dense() + even.dense())):
        assert type(M) is type(A)
        assert_close(M.dense(), D)
        assert_close((even + M).T.dense(), (even.dense() + D).mT)
        for recipe in (loose, BlockLowRank(tile=8, rank=2)):
            found, dense = round_to(M, recipe), project(recipe, D)
            assert found is not None
            assert_close(found.dense(), dense.dense())
            assert cost(found) == cost(dense)
