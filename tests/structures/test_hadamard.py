"""Hadamard: the Khatri-Rao identity, its rank, and a projection that is at least sensible."""

import pytest
import torch

from matrigami import Hadamard, HadamardMatrix, LowRank, cost, diagonal, norm, project


def test_khatri_rao_identity():
    """`(U1 V1.T) * (U2 V2.T)` is the product of the row-wise Kronecker products."""
    A = Hadamard(rank=2).init(5, 7)
    rows = torch.einsum("ia,ib->iab", A.U1, A.U2).flatten(1)
    columns = torch.einsum("ia,ib->iab", A.V1, A.V2).flatten(1)
    torch.testing.assert_close(A.dense(), rows @ columns.T)
    X = torch.randn(7, 3)
    torch.testing.assert_close(A @ X, A.dense() @ X)


def test_rank_is_the_product_of_the_ranks():
    D = Hadamard(rank=3).init(20, 16).dense()
    assert int(torch.linalg.matrix_rank(D)) == 9


def test_diagonal_and_norm_need_no_dense_matrix():
    A = Hadamard(rank=2).init(6, 9)
    torch.testing.assert_close(diagonal(A), A.dense().diagonal())
    torch.testing.assert_close(norm(A), torch.linalg.matrix_norm(A.dense()))


def test_cost():
    """Parameters `2 r (m + n)`; the two Khatri-Rao products and the two matrix products."""
    assert cost(Hadamard(rank=3).init(10, 20))[:2] == (2 * 3 * 30, 9 * 30)


def test_projection_beats_low_rank_of_the_same_parameters():
    """On a target of high rank that is an elementwise product."""
    generator = torch.Generator().manual_seed(4)
    W = Hadamard(rank=2).init(12, 12, generator=generator).dense()
    errors = [
        float((project(recipe, W).dense() - W).norm() / W.norm())
        for recipe in (Hadamard(rank=2), LowRank(rank=4))
    ]
    assert cost(Hadamard(rank=2).init(12, 12)).params == cost(LowRank(rank=4).init(12, 12)).params
    assert errors[0] <= errors[1] + 1e-9


def test_projection_is_stationary():
    W = torch.randn(5, 6)
    A = project(Hadamard(rank=1), W)
    tensors = [t.clone().requires_grad_() for t in (A.U1, A.V1, A.U2, A.V2)]
    error = (HadamardMatrix(*tensors).dense() - W).square().sum()
    gradients = torch.autograd.grad(error, tensors)
    assert max(float(g.abs().max()) for g in gradients) < 1e-2 * float(W.norm())


@pytest.mark.parametrize("rank", [0, 6, 0.0, 1.5])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank}"):
        Hadamard(rank=rank).init(5, 7)


def test_the_norm_at_the_start_does_not_depend_on_the_rank():
    generator = torch.Generator().manual_seed(0)
    for rank in (4, 16, 48):
        top = torch.linalg.matrix_norm(
            Hadamard(rank=rank).init(64, 64, generator=generator).dense(), 2
        )
        assert 1 < top < 6  # of a square matrix it is of order 1
