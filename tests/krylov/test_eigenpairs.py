"""Lanczos, and the largest eigenvalues with their multiplicities."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import lanczos, largest_eigenpairs

REAL, COMPLEX = torch.float64, torch.complex128


def hermitian(n: int, dtype: torch.dtype = REAL) -> Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return M + M.mH


def laplacian(n: int, *, periodic: bool = False) -> Tensor:
    P = torch.roll(torch.eye(n), 1, 0) if periodic else torch.diag(torch.ones(n - 1), 1)
    return 2 * torch.eye(n) - P - P.T


def check(A: mg.LinearOperator, k: int, spectrum: Tensor, rtol: float = 1e-10) -> None:
    """Values with multiplicities, orthonormal vectors, small residuals."""
    values, V = largest_eigenpairs(A, k, generator=torch.Generator().manual_seed(0))
    V = V.dense()
    size = float(spectrum.abs().max())
    true = spectrum.abs().sort(descending=True).values[:k].to(values.dtype)
    assert_close(values.abs(), true, rtol=0, atol=rtol * size)
    eps = torch.finfo(values.dtype).eps
    assert_close(V.mH @ V, torch.eye(k, dtype=V.dtype), atol=200 * eps, rtol=0)
    worst = torch.linalg.vector_norm(A.matmat(V) - V * values, dim=0).max()
    assert worst <= (1e-7 if eps < 1e-10 else 1e-3) * size


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_lanczos_recurrence(dtype):
    A = mg.DenseMatrix(hermitian(40, dtype))
    start = torch.randn(40, 2, dtype=dtype)
    run = lanczos(A, start, 6)
    assert run.diagonal.dtype == run.off.dtype == REAL
    for column in range(2):
        Q = run.Q[..., column].mT
        T = Q.mH @ A.entries @ Q
        assert_close(Q.mH @ Q, torch.eye(6, dtype=dtype), atol=1e-12, rtol=0)
        assert_close(T.diagonal(), run.diagonal[column].to(dtype))
        assert_close(T.diagonal(1), run.off[column, :-1].to(dtype))
        assert_close(T, T.triu(-1).tril(1), atol=1e-10, rtol=0)
        assert_close(run.eigh()[0][column], torch.linalg.eigvalsh(T))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX, torch.float32])
@pytest.mark.parametrize("k", [1, 6])
def test_a_random_matrix(dtype, k):
    D = hermitian(300, dtype)
    check(mg.DenseMatrix(D), k, torch.linalg.eigvalsh(D), 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("k", [1, 4, 7, 10])
def test_all_sizes_of_a_small_matrix(k):
    D = hermitian(10)
    check(mg.DenseMatrix(D), k, torch.linalg.eigvalsh(D))


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_pairs_of_a_grid(k):
    L = laplacian(24)
    values = torch.linalg.eigvalsh(L)
    check(mg.kron_sum(L, L), k, (values[:, None] + values).flatten())


def test_pairs_of_a_cycle():
    L = laplacian(300, periodic=True)
    check(mg.DenseMatrix(L), 5, torch.linalg.eigvalsh(L))


@pytest.mark.parametrize("k", [3, 40, 45])
def test_more_equal_values_than_a_block_has_columns(k):
    d = torch.cat([torch.full((40,), 3.0), torch.rand(600)])
    check(mg.DiagonalMatrix(d), k, d)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_multiples_of_the_identity(value):
    check(mg.DiagonalMatrix(torch.full((500,), value)), 20, torch.full((500,), value))


def test_low_rank_with_equal_values_and_then_zeros():
    U = torch.linalg.qr(torch.randn(1000, 5))[0]
    spectrum = torch.cat([torch.ones(5), torch.zeros(995)])
    check(mg.LowRankMatrix(U, U), 5, spectrum)
    check(mg.LowRankMatrix(U, U), 8, spectrum)


def test_clusters_of_both_signs():
    d = torch.cat([3 + 1e-7 * torch.randn(10), -3 + 1e-7 * torch.randn(5), torch.rand(500)])
    check(mg.DiagonalMatrix(d), 12, d)


def test_matrices_of_any_size():
    d = torch.linspace(0, 1, 1000).sqrt()
    values, _ = largest_eigenpairs(mg.DiagonalMatrix(1e-200 * d), 3)
    assert_close(values * 1e200, d.flip(0)[:3])


def test_values_are_differentiable_once():
    U = torch.randn(200, 2).requires_grad_()
    d = torch.linspace(0, 1, 200)

    def values(U):
        A = mg.LowRankMatrix(U, U) + mg.DiagonalMatrix(d)
        return largest_eigenpairs(A, 2, generator=torch.Generator().manual_seed(0)).values

    def exact(U):
        return torch.linalg.eigvalsh(U @ U.mT + torch.diag(d)).flip(0)[:2]

    weights = torch.tensor([1.0, 3.0])
    grads = [torch.autograd.grad(f(U) @ weights, U)[0] for f in (values, exact)]
    assert_close(*grads, atol=1e-6, rtol=0)
    V = torch.randn(200, 2)
    tangents = [torch.func.jvp(f, (U.detach(),), (V,))[1] for f in (values, exact)]
    assert_close(*tangents, atol=1e-6, rtol=0)


def test_a_second_derivative_is_refused():
    D = hermitian(5)
    value = lambda D: largest_eigenpairs(mg.DenseMatrix(D), 1).values[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.hessian(value)(D)
    M = D.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(M), M, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_bad_requests_are_refused():
    A = mg.DenseMatrix(torch.eye(3))
    with pytest.raises(ValueError, match=r"largest_eigenpairs\(A, 4\)"):
        largest_eigenpairs(A, 4)
    with pytest.raises(ValueError, match="one square matrix"):
        largest_eigenpairs(mg.DenseMatrix(torch.ones(2, 3, 3)), 1)
    with pytest.raises(RuntimeError, match="a residual of"):
        largest_eigenpairs(mg.DiagonalMatrix(torch.linspace(0, 1, 2000)), 3, max_steps=2)
