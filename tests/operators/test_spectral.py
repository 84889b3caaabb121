"""A matrix by its eigenpairs answers every question as its dense matrix does."""

import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.operators import SpectralMatrix


@pytest.fixture(params=[(), (3,)], ids=["one", "stack"])
def A(request: pytest.FixtureRequest) -> SpectralMatrix:  # noqa: N802
    batch = request.param
    left, right = (torch.linalg.qr(torch.randn(*batch, n, n)).Q for n in (2, 3))
    return SpectralMatrix(torch.rand(*batch, 6) + 0.5, mg.KroneckerMatrix(left, right))


def test_it_answers_as_its_dense_matrix(A):
    D, B = A.dense(), torch.randn(6, 2)
    assert_close(A @ B, D @ B)
    assert_close(mg.solve(A, B), torch.linalg.solve(D, B.expand(*D.shape[:-2], 6, 2)))
    assert_close(mg.inverse(A).dense(), torch.linalg.inv(D))
    assert_close(mg.logdet(A), torch.logdet(D))
    assert_close(mg.trace(A), D.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert_close(mg.diagonal(A), D.diagonal(dim1=-2, dim2=-1))
    assert_close(mg.norm(A), torch.linalg.matrix_norm(D))
    assert_close(mg.norm(A, 2), torch.linalg.matrix_norm(D, 2))
    assert_close(mg.power(A, -0.5).dense() @ mg.power(A, -0.5).dense(), torch.linalg.inv(D))
    assert_close(mg.eigh(A, 2).values, torch.linalg.eigvalsh(D).flip(-1)[..., :2])
    assert_close((A + A).dense(), 2 * D)
    assert_close((3.0 * A).dense(), 3 * D)
    assert_close(mg.shift(A, 0.5).dense(), D + 0.5 * torch.eye(6))
    assert type(mg.shift(A, 0.5)) is SpectralMatrix


def test_one_shift_for_each_matrix_of_a_stack():
    A = mg.DenseMatrix(torch.randn(3, 2, 2))
    amounts = torch.tensor([0.0, 1.0, 2.0])
    assert_close(mg.shift(A, amounts).dense(), A.dense() + amounts[:, None, None] * torch.eye(2))


def test_a_negative_eigenvalue_has_no_root():
    with pytest.raises(ValueError, match="positive"):
        mg.sqrt(SpectralMatrix(torch.tensor([1.0, -1.0]), mg.DenseMatrix(torch.eye(2))))


def test_a_damped_kronecker_product_keeps_its_factors():
    left, right = (F @ F.mT for F in (torch.randn(2, 3, 3), torch.randn(2, 4, 4)))
    K = mg.KroneckerMatrix(left, right)
    damped = mg.shift(K, 0.1)
    assert isinstance(damped, SpectralMatrix)
    assert_close(damped.dense(), K.dense() + 0.1 * torch.eye(12))
