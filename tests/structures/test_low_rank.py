"""Low rank: the best approximation in both metrics, and ranks out of range."""

import math

import pytest
import torch

from matrigami import DenseMatrix, LowRank, LowRankMatrix, hadamard, norm, project, svdvals


def test_squared_error_is_the_sum_of_the_discarded_squares():
    W = torch.randn(7, 11)
    S = torch.linalg.svdvals(W)
    error = (project(LowRank(rank=3), W).dense() - W).square().sum()
    torch.testing.assert_close(error, S[3:].square().sum())


def test_default_rank_is_the_root():
    assert LowRank().init(100, 400).U.shape == (100, 10)


@pytest.mark.parametrize(("rank", "wanted"), [(0.25, 3), (1.0, 10), (1e-9, 1), (10, 10)])
def test_fractions_are_rounded_up(rank, wanted):
    assert LowRank(rank=rank).init(10, 12).U.shape[-1] == wanted


def test_ranks_concatenate_in_a_sum_and_shrink_in_a_product():
    A, B = LowRank(rank=2).init(6, 5), LowRank(rank=3).init(6, 5)
    total = A + B
    assert isinstance(total, LowRankMatrix)
    assert total.U.shape[-1] == 5
    product = A @ B.T
    assert isinstance(product, LowRankMatrix)
    assert product.U.shape[-1] == 2
    torch.testing.assert_close(product.dense(), A.dense() @ B.dense().T)


def test_singular_values_need_no_dense_matrix():
    A = LowRank(rank=2).init(300, 200)
    torch.testing.assert_close(svdvals(A)[:2], torch.linalg.svdvals(A.dense())[:2])
    torch.testing.assert_close(norm(A), torch.linalg.matrix_norm(A.dense()))


def test_projection_in_a_metric_is_the_best():
    """Whiten, truncate, unwhiten: no other matrix of the rank is nearer in the metric."""
    W, F, G = torch.randn(6, 5), torch.randn(6, 6), torch.randn(5, 5)
    left, right = F @ F.T + torch.eye(6), G @ G.T + torch.eye(5)
    A = project(LowRank(rank=2), W, left=DenseMatrix(left), right=DenseMatrix(right))
    E = A.dense() - W
    error = torch.trace(E.T @ left @ E @ right)
    L, R = torch.linalg.cholesky(left), torch.linalg.cholesky(right)
    bound = torch.linalg.svdvals(L.T @ W @ R)[2:].square().sum()
    torch.testing.assert_close(error, bound)


def test_calibration_moment_as_metric_minimises_the_output_error():
    """With `right = X X.T` the error is that of the layer's outputs on the samples `X`."""
    W, X = torch.randn(6, 5), torch.randn(5, 40)
    best = project(LowRank(rank=2), W, right=DenseMatrix(X @ X.T))
    plain = project(LowRank(rank=2), W)
    errors = [float(((A.dense() - W) @ X).norm()) for A in (best, plain)]
    bound = float(torch.linalg.svdvals(W @ X)[2:].norm())
    assert errors[0] == pytest.approx(bound, rel=1e-6)
    assert errors[0] < errors[1]


def test_hadamard_product_of_low_ranks_has_the_product_of_the_ranks():
    A, B = LowRank(rank=2).init(9, 8), LowRank(rank=3).init(9, 8)
    C = hadamard(A, B)
    torch.testing.assert_close(C.dense(), A.dense() * B.dense())
    assert int(torch.linalg.matrix_rank(C.dense())) == 6


@pytest.mark.parametrize("rank", [0, -2, 6, 0.0, 1.5, -0.5, math.nan, math.inf])
def test_ranks_out_of_range(rank):
    for call in (
        lambda: LowRank(rank=rank).init(5, 7),
        lambda: project(LowRank(rank=rank), torch.ones(5, 7)),
    ):
        with pytest.raises(ValueError, match=f"rank {rank}") as caught:
            call()
        fault, to_do = str(caught.value).splitlines()
        assert "LowRank" in fault
        assert "full rank of this shape is 5" in fault
        assert "from 1 to 5" in to_do


def test_metric_of_the_wrong_size():
    with pytest.raises(ValueError, match="5"):
        project(LowRank(rank=1), torch.ones(5, 7), left=DenseMatrix(torch.eye(4)))
