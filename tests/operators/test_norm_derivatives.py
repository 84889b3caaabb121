"""Derivatives of norms, first and second, where singular values repeat and where all are zero."""

import pytest
import torch

from matrigami import DenseMatrix, DiagonalMatrix, LowRankMatrix, direct_sum, kron, norm
from matrigami.structures import BlockDiagonalMatrix
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


def test_norms_of_low_rank_have_a_derivative_where_a_factor_is_zero():
    U = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    for order in (None, 1, 3):
        (g,) = torch.autograd.grad(norm(LowRankMatrix(U, random(5, 2)), order), U)
        assert not g.any()


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_norms_do_not_leave_the_range(size):
    D = size * torch.eye(3, dtype=torch.float64)
    for A in (DenseMatrix(D), DiagonalMatrix(D.diagonal()), kron(D, torch.eye(2, dtype=D.dtype))):
        torch.testing.assert_close(norm(A) / size, torch.tensor(len(A.dense()) ** 0.5).double())
    (g,) = torch.autograd.grad(norm(DenseMatrix(D.requires_grad_())), D)
    torch.testing.assert_close(g, torch.eye(3, dtype=torch.float64) / 3**0.5)
