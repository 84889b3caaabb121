"""Estimates of traces: unbiased, and with an error that covers the truth."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import stochastic_diagonal, stochastic_logdet, stochastic_trace


def spread(low: float, high: float, n: int) -> tuple[mg.DenseMatrix, Tensor]:
    """A matrix with logarithmically spaced eigenvalues, and its log-determinant."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(5)))[0]
    d = torch.logspace(low, high, n)
    return mg.DenseMatrix((Q * d) @ Q.mT), d.log().sum()


def low_rank_plus_diagonal(n: int, rank: int = 20) -> tuple[mg.LinearOperator, Tensor]:
    generator = torch.Generator().manual_seed(0)
    d, U = torch.logspace(-4, 2, n), torch.randn(n, rank, generator=generator) / n**0.5
    capacitance = torch.eye(rank) + U.mT @ (U / d[:, None])
    exact = d.log().sum() + torch.logdet(capacitance)
    return mg.DiagonalMatrix(d) + mg.LowRankMatrix(U, U), exact


def coverage(A: mg.LinearOperator, exact: Tensor, seeds: int, **options: int) -> float:
    """In which part of the runs the truth is within two errors."""
    inside = 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        found = stochastic_logdet(A, generator=generator, **options)
        inside += bool((found.value - exact).abs() <= 2 * found.error)
    return inside / seeds


@pytest.mark.parametrize("probes", [3, 12])
@pytest.mark.parametrize("steps", [64, 512])
@pytest.mark.parametrize("exponents", [(-4, 2), (-8, 0)])
def test_the_error_covers_the_truth(exponents, steps, probes):
    A, exact = spread(*exponents, 40)
    assert coverage(A, exact, 20, probes=probes, max_steps=steps) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(-4, 2), (-8, 0)])
@pytest.mark.parametrize("probes", [3, 8, 32])
def test_coverage_over_many_seeds(exponents, probes):
    A, exact = spread(*exponents, 100)
    assert coverage(A, exact, 60, probes=probes, max_steps=1024) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("steps", [256, 2048])
def test_coverage_of_a_large_matrix(steps):
    A, exact = low_rank_plus_diagonal(4200)
    assert_close(exact, torch.tensor(-9539.0), atol=200, rtol=0)
    assert coverage(A, exact, 60, probes=8, max_steps=steps) >= 0.9


def test_an_unconverged_quadrature_says_so():
    A, exact = low_rank_plus_diagonal(600)
    coarse, fine = (stochastic_logdet(A, probes=16, max_steps=m) for m in (32, 1024))
    assert (coarse.value - exact).abs() > 4 * fine.error  # the mean of the probes is not far off
    assert coarse.error > 4 * fine.error
    for found in (coarse, fine):
        assert (found.value - exact).abs() <= 2 * found.error
    assert stochastic_logdet(A, probes=4, max_steps=1).error == torch.inf


def test_the_error_falls_as_the_square_root_of_the_probes():
    A, exact = spread(-1, 1, 100)
    few, many = (stochastic_logdet(A, probes=p) for p in (25, 400))
    assert 2.5 < few.error / many.error < 6.5
    assert (many.value - exact).abs() < 3 * many.error


def test_signs_are_exact_for_a_diagonal():
    A = mg.DiagonalMatrix(torch.rand(12) + 1)
    for found, exact in (
        (stochastic_logdet(A, probes=3), mg.logdet(A)),
        (stochastic_trace(A, probes=3), mg.trace(A)),
        (stochastic_trace(A, torch.exp, probes=3), A.diagonal.exp().sum()),
    ):
        assert_close(found.value, exact)
        assert found.error < 1e-3
    assert_close(stochastic_diagonal(A).value, A.diagonal)


def test_an_exhausted_space_is_exact():
    A = mg.DiagonalMatrix(torch.tensor([1.0, 2.0, 5.0]).repeat(10))
    found = stochastic_logdet(A, probes=2)
    assert_close(found.value, mg.logdet(A))
    assert found.error < 1e-10
    assert_close(
        stochastic_trace(mg.DiagonalMatrix(torch.zeros(7)), torch.exp).value, torch.tensor(7.0)
    )


def test_complex_and_single_precision_and_stacks():
    M = torch.randn(2, 30, 30, dtype=torch.complex128)
    A = M @ M.mH / 30 + torch.eye(30)
    exact = torch.linalg.slogdet(A)[1]
    found = stochastic_logdet(mg.DenseMatrix(A), probes=200)
    assert found.value.shape == found.error.shape == (2,)
    assert found.value.dtype == torch.float64
    assert ((found.value - exact).abs() < 3 * found.error).all()
    single = stochastic_logdet(mg.DenseMatrix(A[0].real.float()), probes=100)
    assert single.value.dtype == torch.float32
    general = stochastic_trace(mg.DenseMatrix(M), probes=400)
    true = M.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((general.value - true).abs() < 3 * general.error).all()


def test_diagonals_within_their_errors():
    M = torch.randn(50, 50)
    found = stochastic_diagonal(mg.DenseMatrix(M), probes=100)
    inside = (found.value - M.diagonal()).abs() <= 2 * found.error
    assert inside.double().mean() > 0.85


@pytest.mark.parametrize("function", [torch.log, torch.exp, torch.sqrt])
def test_the_gradient_is_that_of_the_same_probes(function):
    """It is the derivative of the estimate, to the accuracy of the quadrature."""
    d = torch.linspace(1, 3, 12).requires_grad_()
    exact = torch.autograd.grad(function(d).sum(), d)[0]
    found = stochastic_trace(mg.DiagonalMatrix(d) + mg.DiagonalMatrix(0 * d), function, probes=2)
    assert_close(torch.autograd.grad(found.value, d)[0], exact, rtol=1e-6, atol=0)
    factor = torch.tensor(1.0, requires_grad=True)
    M = torch.randn(20, 20)
    D = M @ M.mT / 20 + torch.eye(20)

    def estimate(factor):
        generator = torch.Generator().manual_seed(0)
        options = {"probes": 3, "tol": 1e-12, "generator": generator}
        return stochastic_trace(mg.DenseMatrix(D * factor), function, **options).value

    (gradient,) = torch.autograd.grad(estimate(factor), factor)
    step = 1e-5
    difference = (estimate(factor.detach() + step) - estimate(factor.detach() - step)) / (2 * step)
    assert_close(gradient, difference, rtol=1e-6, atol=0)
    assert_close(torch.func.grad(estimate)(factor.detach()), difference, rtol=1e-6, atol=0)


def test_the_gradient_of_a_complex_matrix():
    M = torch.randn(6, 6, dtype=torch.complex128)
    D = M @ M.mH + torch.eye(6)
    E = torch.randn(6, 6, dtype=torch.complex128)
    E = E + E.mH

    def estimate(t):
        generator = torch.Generator().manual_seed(0)
        return stochastic_logdet(mg.DenseMatrix(D + t * E), probes=1000, generator=generator).value

    t = torch.tensor(0.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(estimate(t), t)
    true = torch.trace(torch.linalg.solve(D, E)).real
    assert_close(
        gradient, true, rtol=0, atol=float(0.2 * torch.linalg.norm(torch.linalg.solve(D, E)))
    )


def test_a_second_derivative_is_refused():
    factor = torch.tensor(2.0)
    value = lambda f: stochastic_logdet(mg.DenseMatrix(f * torch.eye(4))).value  # noqa: E731
    assert_close(torch.func.grad(value)(factor), torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(torch.func.grad(value))(factor)


def test_what_has_no_estimate_is_refused():
    A = mg.DenseMatrix(torch.randn(5, 5))
    with pytest.raises(ValueError, match="does not equal its adjoint"):
        stochastic_logdet(A)
    with pytest.raises(ValueError, match="not positive definite"):
        stochastic_logdet(mg.DenseMatrix(-torch.eye(3)))
    with pytest.raises(ValueError, match="must be square"):
        stochastic_diagonal(mg.DenseMatrix(torch.ones(2, 3)))
