"""The exponential times vectors against the dense one, and closed forms."""

import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import exp_multiply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_against_the_dense_exponential(dtype, size):
    M = torch.randn(50, 50, dtype=dtype) * size / 7
    X = torch.randn(50, 3, dtype=dtype)
    X[:, 1] = 0
    found, exact = exp_multiply(mg.DenseMatrix(M), X), torch.linalg.matrix_exp(M) @ X
    error = torch.linalg.norm(found - exact) / torch.linalg.norm(exact)
    assert found.dtype == dtype
    assert error < (1e-4 if dtype == torch.float32 else 1e-9)
    assert (found[:, 1] == 0).all()
    one = exp_multiply(mg.DenseMatrix(M), X[:, 0])
    assert_close(one, exp_multiply(mg.DenseMatrix(M), X[:, :1])[:, 0], rtol=0, atol=0)


def test_heat_flows_as_its_sines_decay():
    n = 60
    P = torch.diag(torch.ones(n - 1), 1)
    L = 2 * torch.eye(n) - P - P.T
    sines = torch.sin(
        torch.pi * torch.arange(1, n + 1)[:, None] * torch.tensor([1.0, 3.0]) / (n + 1)
    )
    rates = 2 - 2 * torch.cos(torch.pi * torch.tensor([1.0, 3.0]) / (n + 1))
    found = exp_multiply(mg.DenseMatrix(L), sines, time=-100.0)
    assert_close(found, sines * torch.exp(-100 * rates), rtol=1e-9, atol=1e-12)
    X = torch.randn(n, 2)
    assert_close(
        exp_multiply(mg.DenseMatrix(L), X, time=-100.0),
        torch.linalg.matrix_exp(-100 * L) @ X,
        rtol=1e-8,
        atol=1e-10,
    )


def test_a_schroedinger_flow_keeps_the_norm():
    H = torch.randn(40, 40)
    A = mg.DenseMatrix(1j * (H + H.mT))
    X = torch.randn(40, 1)
    found = exp_multiply(A, X, time=5.0)
    assert found.is_complex()
    assert_close(torch.linalg.norm(found), torch.linalg.norm(X), rtol=1e-9, atol=0)
    assert_close(exp_multiply(A, found, time=-5.0).real, X, rtol=1e-7, atol=1e-8)


def test_a_jordan_block_is_a_polynomial():
    A = mg.DenseMatrix(torch.diag(torch.ones(3), 1))
    e = torch.eye(4)[:, 3:]
    assert_close(exp_multiply(A, e, time=2.0), torch.tensor([[8 / 6], [2.0], [2.0], [1.0]]))


def test_stacks_and_complex_vectors_of_a_real_matrix():
    M = torch.randn(2, 6, 6)
    X = torch.randn(6, 2, dtype=torch.complex128)
    exact = torch.linalg.matrix_exp(M).to(X.dtype) @ X
    assert_close(exp_multiply(mg.DenseMatrix(M), X), exact)
    assert exp_multiply(mg.DenseMatrix(M), X[:, :0]).shape == (2, 6, 0)


def test_derivatives():
    M = torch.randn(5, 5, requires_grad=True)
    X = torch.randn(5, 2, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda M, X: exp_multiply(mg.DenseMatrix(M), X), (M, X), atol=1e-6
    )


def test_what_cannot_be_reached_is_an_error():
    stiff = mg.DiagonalMatrix(torch.linspace(-1e5, 0, 200))
    with pytest.raises(RuntimeError, match="of the way"):
        exp_multiply(stiff, torch.ones(200, 1), max_steps=100)
    with pytest.raises(RuntimeError, match="of the way"):
        exp_multiply(mg.DiagonalMatrix(torch.full((3,), torch.nan)), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"exp_multiply\(A, B\): A is 2x3"):
        exp_multiply(mg.DenseMatrix(torch.ones(2, 3)), torch.ones(2, 1))
