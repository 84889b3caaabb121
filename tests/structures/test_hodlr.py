"""HODLR: direct solutions and determinants, odd sizes, the best ranks, almost linear work."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matrigami import (
    DiagonalMatrix,
    cholesky,
    cost,
    diagonal,
    logdet,
    norm,
    project,
    slogdet,
    solve,
)
from matrigami.geometry.particles import kernel_matrix
from matrigami.operators import CroppedMatrix, inverse, named_tensors, shift, with_tensors
from matrigami.structures import HODLR, HODLRMatrix, HODLRRootMatrix
from matrigami.testing import LAWS, check_operator, check_structure
from matrigami.testing._algebra_laws import ALGEBRA_LAWS
from matrigami.testing._derivative_laws import DERIVATIVE_LAWS


def matern(n: int, nugget: float = 1e-2) -> torch.Tensor:
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    r = math.sqrt(3) * (x[:, None] - x).abs() / 0.2
    return (1 + r) * torch.exp(-r) + nugget * torch.eye(n, dtype=torch.float64)


@pytest.mark.slow
def test_smallest_leaves_obey_the_laws_of_values():
    laws = [law for law in LAWS if law not in DERIVATIVE_LAWS]
    check_structure(HODLR(leaf=2, rank=1), [(1, 1), (4, 4), (7, 3)], laws)


@pytest.mark.slow  # minutes
def test_smallest_leaves_obey_the_laws():
    check_structure(HODLR(leaf=2, rank=1), [(2, 3), (4, 4), (7, 7)])


@pytest.mark.parametrize("n", [64, 193, 1000])
def test_solution_and_determinant_are_those_of_cholesky(n: int):
    D = matern(n)
    A = project(HODLR(leaf=16, rank=2), D)  # Matern-3/2 is semiseparable of rank 2
    assert float(norm(A - D) / D.norm()) < 1e-12
    L = torch.linalg.cholesky(D)
    wanted = 2 * L.diagonal().log().sum()
    assert float((logdet(A) - wanted).abs() / wanted.abs()) < 1e-10
    b = torch.randn(n, 3, dtype=torch.float64)
    assert float((D @ solve(A, b) - b).norm() / b.norm()) < 1e-11


@pytest.mark.parametrize("n", [64, 193])
def test_symmetric_factor_is_one_and_solves(n: int):
    D = matern(n)
    A = project(HODLR(leaf=16, rank=2), D)
    W = cholesky(A)
    b = torch.randn(n, 2, dtype=torch.float64)
    torch.testing.assert_close(W @ (W.H @ b), D @ b)
    torch.testing.assert_close(W.T.dense(), W.dense().T)
    torch.testing.assert_close(solve(W, W @ b), b)
    torch.testing.assert_close(2 * logdet(W), torch.logdet(D))


def test_symmetric_factor_of_a_hermitian_matrix_and_of_stacks():
    X = torch.randn(2, 16, 16, dtype=torch.complex128)
    A = project(HODLR(leaf=4, rank=2), X @ X.mH + 20 * torch.eye(16))
    W, D = cholesky(A), A.dense()
    assert isinstance(W, HODLRRootMatrix)
    torch.testing.assert_close(W.dense() @ W.dense().mH, D)
    b = torch.randn(2, 16, 3, dtype=torch.complex128)
    torch.testing.assert_close(solve(W.H, solve(W, b)), torch.linalg.solve(D, b))
    levels = (tuple([t[0] for t in tensors]) for tensors in (W.bases, W.joints))
    check_operator(HODLRRootMatrix(W.leaves[0], *levels), ALGEBRA_LAWS)


def test_samples_of_a_large_gaussian_process_take_the_symmetric_factor():
    x = torch.rand(30_000, dtype=torch.float64)
    A = kernel_matrix(x, "matern32", scale=0.2) + DiagonalMatrix(torch.full_like(x, 0.1))
    W, z = cholesky(A), torch.randn(30_000, dtype=torch.float64)
    assert float((W @ (W.T @ z) - A @ z).norm() / z.norm()) < 1e-11
    assert float((logdet(A) - 2 * logdet(W)).abs()) < 1e-7


def test_what_is_not_positive_definite_has_no_symmetric_factor():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    for A in (HODLRMatrix(one, (one,), (2 * one,)), HODLRMatrix(-one), HODLRMatrix(0 * one)):
        with pytest.raises(ValueError, match="is not positive definite"):
            cholesky(A)
    sign, log = slogdet(HODLRMatrix(one, (one,), (2 * one,)))
    assert sign == -1
    assert float(log) == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match="is not positive definite"):  # not symmetric
        cholesky(HODLRMatrix(one, (torch.stack([one[0], 0 * one[0]]),), (0.5 * one,)))


@pytest.mark.parametrize("n", [16, 13])
def test_diagonal_stays_in_the_leaves(n: int):
    A = project(HODLR(leaf=4, rank=2), matern(n))
    d = torch.rand(n, dtype=torch.float64)
    for B in (A + DiagonalMatrix(d), DiagonalMatrix(d) + A):
        assert isinstance(B, type(A))
        torch.testing.assert_close(B.dense(), A.dense() + d.diag())
    torch.testing.assert_close(diagonal(shift(A, 2.0)), torch.full((n,), 3.01, dtype=d.dtype))
    assert isinstance(2.0 * A, CroppedMatrix if n == 13 else HODLRMatrix)


@pytest.mark.slow
def test_corner_of_a_padded_matrix_obeys_the_laws():
    A = HODLR(leaf=2, rank=1).init(5, 5, dtype=torch.float64)
    assert isinstance(A, CroppedMatrix)
    check_operator(A)
    check_operator(shift(A, 5.0))


def test_singular_leaf_of_a_regular_matrix():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    A = HODLRMatrix(0 * one, (one,), (one,))  # [0 1; 1 0]
    assert slogdet(A) == (-1.0, 0.0)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert solve(A, b).tolist() == [2.0, 1.0]
    with pytest.raises(torch.linalg.LinAlgError, match="is singular"):
        solve(0.0 * A, b)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_tolerance_is_met_with_fewer_numbers_than_equal_ranks_need(tol: float):
    x = torch.linspace(0, 1, 256, dtype=torch.float64)
    D = 1 / (0.01 + (x[:, None] - x).abs())
    A = project(HODLR(leaf=16, tol=tol), D)
    assert isinstance(A, HODLRMatrix)
    assert float((A.dense() - D).norm() / D.norm()) <= tol
    fewer = project(HODLR(leaf=16, rank=max(U.shape[-1] for U in A.left) - 1), D)
    assert float((fewer.dense() - D).norm() / D.norm()) > tol or cost(fewer).params > cost(A).params


def test_greedy_ranks_are_the_best_for_their_partition():
    """Against all choices of ranks of the two blocks of one level and the four of the next."""
    D = torch.randn(8, 8, dtype=torch.float64) * torch.linspace(1, 9, 8, dtype=torch.float64)
    A = project(HODLR(leaf=4, tol=0.5), D)
    values = [torch.linalg.svdvals(B) for B in (D[:4, 4:], D[4:, :4])]
    kept = sum(int((U.abs().sum(-2) > 0).sum()) for U in A.left)
    tails = torch.cat(values).sort().values.square().cumsum(0).sqrt() / D.norm()
    assert kept == 8 - int((tails <= 0.5).sum())
    assert float((A.dense() - D).norm() / D.norm()) <= 0.5


def test_work_grows_almost_linearly():
    counts = []
    for n in (2**10, 2**12):
        A = HODLR(leaf=32, rank=2).init(n, n, dtype=torch.float64) + DiagonalMatrix(
            torch.full((n,), 9.0, dtype=torch.float64)
        )
        with FlopCounterMode(display=False) as counter:
            A.matmat(torch.ones(n, 1, dtype=torch.float64))
        counts.append(counter.get_total_flops() / n)
        levels = len(A.left)
        assert cost(A).params == n * 32 + 2 * levels * n * 2
    assert counts[1] / counts[0] < 1.25


def test_gradient_of_a_likelihood_is_that_of_the_dense_matrix():
    A = HODLR(leaf=4, rank=2).init(11, 11, dtype=torch.float64)
    A = A @ A.T + DiagonalMatrix(torch.ones(11, dtype=torch.float64))
    A = project(HODLR(leaf=4, rank=1), A.dense())
    b = torch.randn(11, dtype=torch.float64)
    tensors = [t.clone().requires_grad_() for t in named_tensors(A).values()]
    S = with_tensors(A, iter(tensors))
    found = torch.autograd.grad(b @ solve(S, b) + slogdet(S)[1], tensors)
    D = S.dense()
    wanted = torch.autograd.grad(b @ torch.linalg.solve(D, b) + torch.slogdet(D)[1], tensors)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_large_norm_is_that_of_the_dense_matrix():
    A = HODLR(leaf=32, rank=2).init(2100, 2100, dtype=torch.float64)
    assert float(norm(A)) == pytest.approx(float(A.dense().norm()), rel=1e-12)


def test_complex_matrix_is_solved_directly():
    A = HODLR(leaf=4, rank=1).init(16, 16, dtype=torch.complex128)
    b = torch.randn(16, dtype=torch.complex128)
    torch.testing.assert_close(A.dense() @ solve(A, b), b)
    torch.testing.assert_close(inverse(A) @ b, solve(A, b))


def test_incomplete_recipes_are_refused():
    for recipe in (HODLR(leaf=0, rank=1), HODLR(leaf=2), HODLR(leaf=2, rank=1, tol=0.1)):
        with pytest.raises(ValueError, match="either rank or tol"):
            project(recipe, torch.ones(4, 4))
    with pytest.raises(ValueError, match="the ranks follow from a matrix"):
        HODLR(leaf=2, tol=0.1).init(4, 4)
