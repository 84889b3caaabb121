"""Derivatives of norms, first and second, where singular values repeat and where all are zero."""

import pytest
import torch

from matrigami import (
    DenseMatrix,
    DiagonalMatrix,
    LowRank,
    LowRankMatrix,
    direct_sum,
    kron,
    kron_sum,
    norm,
    pinv,
    project,
    svdvals,
)
from matrigami.operators import Places, round_to
from matrigami.structures import BlockDiagonalMatrix, PermutedMatrix
from matrigami.testing._derivative_laws import along_a_line, expect_derivatives


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


REPEATED = torch.tensor([3.0, 1, 1, 2], dtype=torch.float64).diag()


@pytest.mark.parametrize("order", [1, 1.5, 2, 3])
@pytest.mark.parametrize(
    "D", [REPEATED, random(3, 5), random(5, 3), random(3, 3, dtype=torch.complex128)]
)
def test_schatten_norms_have_two_derivatives(D, order):
    blocks = torch.stack([D, D + 1])
    for A in (DenseMatrix(D), direct_sum(D, 2 * D), BlockDiagonalMatrix(blocks)):
        expect_derivatives(along_a_line(A, lambda M: norm(M, order)), f"norm(A, {order})")


def test_norms_at_the_identity():
    eye = DenseMatrix(torch.eye(4, dtype=torch.float64))
    for order in (1, 4):
        expect_derivatives(along_a_line(eye, lambda M, p=order: norm(M, p)), f"norm(I, {order})")


def test_norms_map_and_broadcast():
    D = random(4, 3, 3)
    mapped = torch.vmap(lambda d: norm(DenseMatrix(d), 1))(D)
    torch.testing.assert_close(mapped, torch.linalg.matrix_norm(D, "nuc"))
    (g,) = torch.autograd.grad(norm(DenseMatrix(D.requires_grad_()), 1).sum(), D)
    U, _, Vh = torch.linalg.svd(D.detach())
    torch.testing.assert_close(g, U @ Vh)


def low_rank(m, n, zeros, dtype=torch.float64):
    """Of two columns; `zeros` says which of them are zero in `U`."""
    U, V = random(m, 2, dtype=dtype), random(n, 2, dtype=dtype)
    return LowRankMatrix(torch.where(torch.tensor(zeros), 0, U), V)


@pytest.mark.parametrize("order", [None, 1, 2, 3])
@pytest.mark.parametrize("size", [(6, 5), (700, 600)])
def test_norms_of_low_rank_have_a_derivative_where_a_factor_is_zero(order, size):
    A = low_rank(*size, [True, True])
    U = A.U.requires_grad_()
    (g,) = torch.autograd.grad(norm(A, order), U, create_graph=True)
    assert not g.any()
    (h,) = torch.autograd.grad(g.sum(), U)
    assert not h.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("order", [2, 4])
def test_norms_of_low_rank_have_two_derivatives_where_rank_is_lost(order, dtype):
    A = low_rank(700, 600, [False, True], dtype)
    expect_derivatives(along_a_line(A, lambda M: norm(M, order) / len(A.U)), f"norm(A, {order})")
    B = LowRankMatrix(torch.cat([A.U, A.U[:, :1]], -1), torch.cat([A.V, A.V[:, :1]], -1))
    expect_derivatives(along_a_line(B, lambda M: norm(M, order) / len(A.U)), f"norm(B, {order})")


def test_singular_values_of_low_rank_have_two_derivatives_at_any_size():
    A = low_rank(700, 600, [False, False])
    expect_derivatives(along_a_line(A, lambda M: svdvals(M)[1] / len(A.U)), "the second value")
    zero = low_rank(700, 600, [True, True])
    V = zero.V.requires_grad_()
    (g,) = torch.autograd.grad(svdvals(zero).sum(), V)
    assert not g.any()


@pytest.mark.parametrize("zeros", [[False, True], [True, True]])
def test_roundings_and_pseudoinverses_of_low_rank_have_a_derivative_where_rank_is_lost(zeros):
    A = low_rank(6, 5, zeros)
    V = A.V.requires_grad_()
    for f, truth in {
        lambda M: round_to(M + M, LowRank(rank=1)): lambda D: project(LowRank(rank=1), 2 * D),
        pinv: lambda D: DenseMatrix(torch.linalg.pinv(D)),
    }.items():
        found, wanted = (
            torch.autograd.grad(M.dense()[0, 0], V)[0] for M in (f(A), truth(A.dense()))
        )
        torch.testing.assert_close(found, wanted)


def test_norms_of_sums_and_permutations_have_two_derivatives_where_values_repeat():
    for A in (
        kron_sum(REPEATED, torch.eye(2, dtype=REPEATED.dtype)),
        PermutedMatrix(DenseMatrix(REPEATED), Places(torch.tensor([1, 0, 3, 2]))),
    ):
        expect_derivatives(along_a_line(A, lambda M: norm(M, 3)), "norm(A, 3)")


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_norms_do_not_leave_the_range(size):
    D = size * torch.eye(3, dtype=torch.float64)
    for A in (DenseMatrix(D), DiagonalMatrix(D.diagonal()), kron(D, torch.eye(2, dtype=D.dtype))):
        torch.testing.assert_close(norm(A) / size, torch.tensor(len(A.dense()) ** 0.5).double())
    (g,) = torch.autograd.grad(norm(DenseMatrix(D.requires_grad_())), D)
    torch.testing.assert_close(g, torch.eye(3, dtype=torch.float64) / 3**0.5)
