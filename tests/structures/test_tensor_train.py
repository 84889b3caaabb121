"""Tensor trains: entries, TT-SVD, ranks under sum and product."""

import pytest
import torch

from matrigami import Kronecker, TensorTrain, TensorTrainMatrix, cost, norm, project, trace


def test_entries_are_products_of_slices():
    A = TensorTrain(rank=2, cores=3).init(12, 8)
    assert isinstance(A, TensorTrainMatrix)
    one, two, three = A.cores
    D = A.dense().reshape(*[C.shape[-3] for C in A.cores], *[C.shape[-2] for C in A.cores])
    for i, j, k, a, b, c in ((0, 1, 2, 1, 0, 1), (1, 1, 0, 0, 1, 1)):
        entry = one[:, i, a] @ two[:, j, b] @ three[:, k, c]
        torch.testing.assert_close(D[i, j, k, a, b, c], entry[0, 0])


def test_rank_one_is_a_kronecker_product():
    A = TensorTrain(rank=1).init(12, 20)
    found = project(Kronecker(), A.dense())
    torch.testing.assert_close(found.dense(), A.dense())


def test_two_cores_of_rank_r_are_the_best_sum_of_kronecker_products():
    W = torch.randn(16, 16)
    S = torch.linalg.svdvals(W.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 16))
    error = (project(TensorTrain(rank=5), W).dense() - W).square().sum()
    torch.testing.assert_close(error, S[5:].square().sum())


def test_three_cores_are_found_exactly():
    recipe = TensorTrain(rank=3, cores=3)
    D = recipe.init(64, 27).dense()
    torch.testing.assert_close(project(recipe, D).dense(), D)


def test_error_of_tt_svd_is_bounded_by_the_unfoldings():
    """`error^2 <= sum over cuts of the discarded squares` (Oseledets 2011)."""
    W, r = torch.randn(8, 8), 2
    T = W.reshape(2, 2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2, 5)
    cuts = [T.reshape(4, 16), T.reshape(16, 4)]
    bound = sum(torch.linalg.svdvals(cut)[r:].square().sum() for cut in cuts)
    error = (project(TensorTrain(rank=r, cores=3), W).dense() - W).square().sum()
    largest = max(torch.linalg.svdvals(cut)[r:].square().sum() for cut in cuts)
    assert float(largest) * (1 - 1e-12) <= float(error) <= float(bound) * (1 + 1e-12)


@pytest.mark.parametrize("cores", [2, 3])
def test_ranks_add_under_sum_and_multiply_under_product(cores):
    A = TensorTrain(rank=2, cores=cores).init(27, 27)
    B = TensorTrain(rank=3, cores=cores).init(27, 27)
    total, product = A + B, A @ B
    assert isinstance(total, TensorTrainMatrix)
    assert isinstance(product, TensorTrainMatrix)
    assert [C.shape[-1] for C in total.cores] == [5] * (cores - 1) + [1]
    assert [C.shape[-1] for C in product.cores] == [6] * (cores - 1) + [1]
    torch.testing.assert_close(total.dense(), A.dense() + B.dense())
    torch.testing.assert_close(product.dense(), A.dense() @ B.dense())


def test_trace_never_forms_the_matrix():
    A = TensorTrain(rank=2, cores=3).init(27, 27)
    torch.testing.assert_close(trace(A), A.dense().trace())


def test_cost_counts_each_core_once_for_each_block():
    """(32, 32) -> (32, 32), rank 8: `32*32*8*32` for each of two cores."""
    A = TensorTrain(rank=8).init(1024, 1024, device="meta")
    assert cost(A)[:2] == (2 * 32 * 32 * 8, 2 * 32 * 32 * 8 * 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_a_sum_is_rounded_as_its_dense_matrix_is_projected(rank: int, dtype: torch.dtype):
    recipe = TensorTrain(rank=rank, cores=3)
    A, B = (TensorTrain(rank=r, cores=3).init(64, 27, dtype=dtype) for r in (3, 2))
    found, wanted = project(recipe, A + B), project(recipe, (A + B).dense())
    torch.testing.assert_close(found.dense(), wanted.dense())
    assert [C.shape for C in found.cores] == [C.shape for C in wanted.cores]


def test_a_large_train_is_rounded_and_differences_have_norms():
    n, recipe = 2**20, TensorTrain(rank=4, cores=5)
    A = recipe.init(n, n, dtype=torch.float64)
    P = project(recipe, A + A)
    assert [C.shape for C in P.cores] == [C.shape for C in A.cores]
    assert float(norm(P - 2 * A) / norm(A)) < 1e-13
    few = project(TensorTrain(rank=1, cores=5), A @ A)
    assert float(norm(few - A @ A)) < float(norm(A @ A))
