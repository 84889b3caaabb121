"""Block tensor trains: entries, exact recovery, the error of sequential SVDs, exact solves."""

import math

import pytest
import torch

from matrigami import (
    BlockTensorTrain,
    BlockTensorTrainMatrix,
    LinearOperator,
    Monarch,
    cost,
    inverse,
    project,
    slogdet,
    solve,
)
from matrigami.structures import TensorTrain


def test_entries_of_three_cores_are_a_product_of_slices():
    """`W[m, n] = core3[m3, n3] @ core2[m2, n2] @ core1[m1, n1]`, each in its own block."""
    A = BlockTensorTrain(rank=2, cores=3).init(12, 8)  # rows 2 x 2 x 3, columns (n3, n2, n1) of 2
    assert isinstance(A, BlockTensorTrainMatrix)
    one, two, three = A.cores
    rows, columns = [C.shape[-3] for C in A.cores], [C.shape[-2] for C in A.cores]
    D = A.dense().reshape(*rows, *reversed(columns))
    for m1, m2, m3, n1, n2, n3 in ((0, 1, 2, 1, 0, 1), (1, 0, 0, 0, 1, 1), (1, 1, 1, 1, 1, 0)):
        first = one[n3 * columns[1] + n2, 0, :, m1, n1]  # r1 x 1
        second = two[n3, m1, :, m2, n2]  # r2 x r1
        third = three[0, m1 * rows[1] + m2, :, m3, n3]  # 1 x r2
        entry = third @ second @ first
        torch.testing.assert_close(D[m1, m2, m3, n3, n2, n1], entry[0, 0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 27), (24, 36)])
def test_three_cores_are_found_exactly(m, n, interleaved):
    recipe = BlockTensorTrain(rank=2, cores=3, interleaved=interleaved)
    D = recipe.init(m, n).dense()
    torch.testing.assert_close(project(recipe, D).dense(), D, atol=1e-10, rtol=1e-10)


def test_squared_error_is_the_sum_of_the_steps():
    """Each step drops singular values; the cores before it are orthonormal, so the squares add."""
    W, rank = torch.randn(8, 8), 1
    grid = W.reshape(2, 2, 2, 2, 2, 2)  # m1 m2 m3 n3 n2 n1
    first = grid.permute(3, 4, 5, 0, 1, 2).reshape(2, 2, 2, 2, 4)  # n3 n2 n1 m1 (m2 m3)
    U, S, V = torch.linalg.svd(first.movedim(-2, -3), full_matrices=False)  # n3 n2 m1 | n1 | rest
    error = S[..., rank:].square().sum()
    rest = (S[..., :rank, None] * V[..., :rank, :]).reshape(2, 2, 2, rank, 2, 2)
    second = rest.permute(0, 2, 4, 1, 3, 5).reshape(2, 2, 2, 2 * rank, 2)  # n3 m1 m2 | n2 r | m3
    error = error + torch.linalg.svdvals(second)[..., rank:].square().sum()
    found = project(BlockTensorTrain(rank=rank, cores=3), W)
    torch.testing.assert_close((found.dense() - W).square().sum(), error)
    assert U.shape[-1] == 2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n", [36, 64])
def test_square_blocks_are_solved_exactly(n, interleaved):
    A = BlockTensorTrain(rank=1, interleaved=interleaved).init(n, n)
    D, B = A.dense(), torch.randn(n, 2)
    torch.testing.assert_close(solve(A, B), torch.linalg.solve(D, B), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(solve(A.T, B), torch.linalg.solve(D.T, B), atol=1e-7, rtol=1e-7)
    for got, wanted in zip(slogdet(A), torch.linalg.slogdet(D), strict=True):
        torch.testing.assert_close(got, wanted)
    assert isinstance(inverse(A), BlockTensorTrainMatrix)


def test_three_square_cores_are_solved_exactly():
    A = BlockTensorTrain(rank=1, cores=3).init(64, 64)
    D, B = A.dense(), torch.randn(64, 2)
    torch.testing.assert_close(solve(A, B), torch.linalg.solve(D, B), atol=1e-7, rtol=1e-7)
    for got, wanted in zip(slogdet(A), torch.linalg.slogdet(D), strict=True):
        torch.testing.assert_close(got, wanted)


def test_determinant_is_that_of_the_blocks():
    A = BlockTensorTrain(rank=1).init(36, 36)
    assert isinstance(A, BlockTensorTrainMatrix)
    logs = [torch.linalg.slogdet(C.flatten(-4, -3).flatten(-2, -1))[1].sum() for C in A.cores]
    torch.testing.assert_close(slogdet(A)[1], logs[0] + logs[1])


def test_blocks_that_are_not_square_fall_back_to_the_dense_solve():
    A = BlockTensorTrain(rank=2).init(16, 16)
    b = torch.randn(16)
    torch.testing.assert_close(solve(A, b), torch.linalg.solve(A.dense(), b))


def test_ranks_concatenate_in_a_sum():
    A, B = BlockTensorTrain(rank=1).init(16, 16), BlockTensorTrain(rank=2).init(16, 16)
    total = A + B
    assert isinstance(total, BlockTensorTrainMatrix)
    assert [C.shape[-4] for C in total.cores] == [3, 1]
    torch.testing.assert_close(total.dense(), A.dense() + B.dense())


def test_products_leave_the_family():
    """The product of two block tensor trains is in general none of rank 1."""
    A, B = BlockTensorTrain(rank=1).init(16, 16), BlockTensorTrain(rank=1).init(16, 16)
    W = (A @ B).dense()
    found = project(BlockTensorTrain(rank=1), W)
    assert float((found.dense() - W).norm() / W.norm()) > 0.05


@pytest.mark.parametrize(("n", "rank"), [(1024, 1), (1024, 4), (4096, 2)])
def test_cost_of_square_matrices(n, rank):
    """`2 r n^1.5` multiply-adds and as many parameters."""
    A = BlockTensorTrain(rank=rank).init(n, n, device="meta")
    assert cost(A)[:2] == (2 * rank * round(n**1.5),) * 2


def test_cost_of_rectangles():
    """`r (n m1 + m n2)` for m = (16, 32) and n = (32, 96)."""
    A = BlockTensorTrain(rank=3).init(512, 3072, device="meta")
    assert cost(A)[:2] == (3 * (3072 * 16 + 512 * 96),) * 2


def test_rank_above_that_of_monarch_is_nearer():
    W = torch.randn(16, 16)
    errors = [
        float((project(BlockTensorTrain(rank=r), W).dense() - W).norm()) for r in (1, 2, 3, 4)
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-3
    assert errors[3] < 1e-12
    monarch = project(Monarch(blocks=4, interleaved=False), W)
    assert float((monarch.dense() - W).norm()) == pytest.approx(errors[0])


@pytest.mark.parametrize("family", [BlockTensorTrain, TensorTrain])
@pytest.mark.parametrize("rank", [0, -1, 1000, 0.0, 1.5, math.nan])
def test_ranks_out_of_range(family, rank):
    for call in (lambda: family(rank=rank).init(16, 16), lambda: refuse(family(rank=rank))):
        with pytest.raises(ValueError, match=f"rank {rank}") as caught:
            call()
        assert len(str(caught.value).splitlines()) <= 3


def refuse(recipe: BlockTensorTrain | TensorTrain) -> LinearOperator:
    return project(recipe, torch.ones(16, 16))


@pytest.mark.parametrize("family", [BlockTensorTrain, TensorTrain])
def test_one_core_is_refused(family):
    with pytest.raises(ValueError, match="at least two cores"):
        family(rank=1, cores=1).init(16, 16)
