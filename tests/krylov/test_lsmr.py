"""Least squares by products against pseudoinverses and normal equations."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import lsmr

SHAPES = [(30, 12), (12, 30), (17, 17), (7, 1), (1, 5)]


def exact(M: Tensor, B: Tensor, damping: float) -> Tensor:
    """The minimiser of least norm."""
    if not damping:
        return torch.linalg.pinv(M) @ B
    eye = torch.eye(M.shape[-1], dtype=M.dtype)
    return torch.linalg.solve(M.mH @ M + damping**2 * eye, M.mH @ B)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_against_dense_least_squares(shape, damping, dtype):
    M, B = torch.randn(*shape, dtype=dtype), torch.randn(shape[0], 3, dtype=dtype)
    B[:, 1] = 0
    found = lsmr(mg.DenseMatrix(M), B, damping=damping)
    assert found.converged.all()
    assert_close(found.X, exact(M, B, damping), rtol=1e-7, atol=1e-8)
    one = lsmr(mg.DenseMatrix(M), B[:, 0], damping=damping)
    assert_close(one.X, found.X[:, 0], rtol=1e-7, atol=1e-8)
    assert (found.X[:, 1] == 0).all()
    R = B - M @ found.X
    normal = torch.linalg.vector_norm(M.mH @ R - damping**2 * found.X, dim=0)
    assert (
        normal <= 1e-9 * torch.linalg.matrix_norm(M, 2) * torch.linalg.vector_norm(B, dim=0)
    ).all()


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_right_hand_sides_of_any_size(size):
    M, B = torch.randn(20, 8), torch.randn(20, 2)
    found = lsmr(mg.DenseMatrix(M), B * size, damping=0.3)
    assert_close(found.X / size, exact(M, B, 0.3), rtol=1e-7, atol=1e-8)


def test_single_precision_and_mixed_types():
    M, B = torch.randn(40, 10).float(), torch.randn(40, 1)
    assert_close(lsmr(mg.DenseMatrix(M), B).X, exact(M.double(), B, 0.0), rtol=1e-7, atol=1e-8)
    single = lsmr(mg.DenseMatrix(M), B.float())
    assert single.X.dtype == torch.float32
    assert_close(single.X.double(), exact(M.double(), B, 0.0), rtol=1e-3, atol=1e-3)
    pair = lsmr(mg.DenseMatrix(M.double()), torch.complex(B, 2 * B))
    assert_close(pair.X, exact(M.double(), B, 0.0) * (1 + 2j), rtol=1e-7, atol=1e-8)


def test_rank_deficient_and_structured():
    A = mg.LowRankMatrix(torch.randn(15, 2), torch.randn(9, 2))
    B = torch.randn(15, 2)
    assert_close(lsmr(A, B).X, torch.linalg.pinv(A.dense()) @ B, rtol=1e-7, atol=1e-8)


def test_a_right_hand_side_outside_the_range_gives_zero():
    A = mg.DenseMatrix(torch.eye(3)[:, :2])
    found = lsmr(A, torch.tensor([[0.0], [0.0], [1.0]]))
    assert_close(found.X, torch.zeros(2, 1))
    assert found.converged.all()


def test_stacks_and_empty_right_hand_sides():
    M, B = torch.randn(2, 9, 4), torch.randn(9, 2)
    assert_close(lsmr(mg.DenseMatrix(M), B).X, exact(M, B.expand(2, 9, 2), 0.0))
    assert lsmr(mg.DenseMatrix(M), B[:, :0]).X.shape == (2, 4, 0)


def test_too_few_steps_are_not_convergence():
    A = mg.DiagonalMatrix(torch.logspace(0, 6, 50))
    assert not lsmr(A, torch.ones(50, 1), max_steps=3).converged.any()
    broken = mg.DiagonalMatrix(torch.full((3,), torch.nan))
    assert not lsmr(broken, torch.ones(3, 1)).converged.any()
    with pytest.raises(ValueError, match=r"lsmr\(A, B\): B is of shape"):
        lsmr(A, torch.ones(49, 1))


def neumann(n):
    """A grid of `n^2` nodes; constants are lost."""
    D = sparse.diags([-np.ones(n - 1), np.ones(n - 1)], [0, 1], shape=(n - 1, n))
    return sparse.kron(D.T @ D, sparse.eye(n)) + sparse.kron(sparse.eye(n), D.T @ D)


def test_large_least_squares_have_a_derivative_in_the_right_hand_side_alone():
    A = mg.from_scipy(neumann(70).tocsr())
    B, w = (torch.randn(4900, dtype=torch.float64) for _ in range(2))
    (g,) = torch.autograd.grad((w * mg.lstsq(A, B.requires_grad_())).sum(), B)
    assert_close(g, mg.lstsq(A, w), rtol=1e-7, atol=1e-9)
    (entries,) = [t for t in mg.operators.named_tensors(A).values() if t.is_floating_point()]
    entries.requires_grad_()
    with pytest.raises(NotImplementedError, match="derivative in its tensors"):
        mg.lstsq(A, B).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_large_singular_hermitian_matrices_take_the_solution_of_least_norm(dtype):
    """A grid with Neumann boundaries; a complex one has phases on both sides."""
    n, L = 70, neumann(70)
    phase = np.exp(1j * np.arange(n * n)) if dtype.is_complex else np.ones(n * n)
    A = mg.from_scipy((sparse.diags(phase) @ L @ sparse.diags(phase.conj())).tocsr()).to(dtype)
    U = torch.randn(n * n, 2, dtype=torch.float64)
    U = U - U.mean(0)  # 1 is lost
    B = torch.as_tensor(L @ U.numpy()) + torch.tensor([3.0, 0.0], dtype=U.dtype)
    turn = torch.as_tensor(phase)[:, None]
    X = mg.lstsq(A, (turn * B).to(dtype))
    error = torch.linalg.norm(X - (turn * U).to(dtype)) / torch.linalg.norm(U)
    assert error < (2e-3 if dtype is torch.float32 else 1e-8)
