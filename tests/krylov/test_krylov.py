"""Krylov methods against dense linear algebra, and the rules that use them for large matrices."""

import math

import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import (
    _rules,
    cg,
    gmres,
    is_symmetric,
    lanczos,
    largest_eigenpairs,
    minres,
    stochastic_lanczos,
)

N = 40


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def definite() -> mg.DenseMatrix:
    M = random(N, N)
    return mg.DenseMatrix(M @ M.mT + N * torch.eye(N))


@pytest.fixture
def indefinite() -> mg.DenseMatrix:
    M = random(N, N)
    return mg.DenseMatrix(M + M.mT)


@pytest.fixture
def general() -> mg.DenseMatrix:
    return mg.DenseMatrix(random(N, N) + 3 * N**0.5 * torch.eye(N))


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every matrix that is not dense already as too large to be made dense."""
    monkeypatch.setattr(_rules, "DENSE_LIMIT", 1)


@pytest.mark.parametrize(
    ("method", "matrix"),
    [(cg, "definite"), (minres, "definite"), (minres, "indefinite"), (gmres, "general")],
)
def test_a_solver_reaches_its_tolerance(method, matrix, request):
    A, B = request.getfixturevalue(matrix), random(N, 3)
    found = method(A, B)
    assert found.converged.all()
    assert_close(A @ found.X, B, atol=1e-8, rtol=0)
    true = torch.linalg.vector_norm(A @ found.X - B, dim=-2) / torch.linalg.vector_norm(B, dim=-2)
    assert_close(found.residuals[-1], true, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", [cg, minres, gmres])
def test_columns_are_solved_independently(method, definite):
    B = torch.cat([random(N, 1), torch.zeros(N, 1), 1e6 * random(N, 1)], 1)
    together = method(definite, B)
    alone = method(definite, B[:, :1])
    assert_close(together.X[:, :1], alone.X, atol=1e-10, rtol=1e-8)
    assert_close(together.X[:, 1], torch.zeros(N))


@pytest.mark.parametrize("method", [cg, minres, gmres])
def test_a_stack_is_solved_at_once(method, definite):
    A = mg.DenseMatrix(torch.stack([definite.entries, 2 * definite.entries]))
    B = random(N, 2)
    X = method(A, B.expand(2, N, 2)).X
    assert_close(X[0], 2 * X[1], atol=1e-8, rtol=0)
    assert_close(A @ X, B.expand(2, N, 2), atol=1e-8, rtol=0)


def test_cg_ends_after_as_many_steps_as_distinct_eigenvalues():
    values = torch.tensor([1.0, 2.0, 5.0]).repeat(10)
    assert cg(mg.DiagonalMatrix(values), random(30, 1), tol=1e-12).steps == 3


def test_cg_obeys_the_condition_number_bound():
    c = 100.0
    A = mg.DiagonalMatrix(torch.linspace(1, c, N))
    B = random(N, 1)
    X = B / A.diagonal[:, None]
    rate = (math.sqrt(c) - 1) / (math.sqrt(c) + 1)
    for steps in (5, 10, 20):
        E = cg(A, B, tol=0, max_steps=steps).X - X
        bound = 2 * rate**steps * (X * (A @ X)).sum().sqrt()
        assert (E * (A @ E)).sum().sqrt() <= bound


def test_a_preconditioner_saves_steps():
    A = mg.DiagonalMatrix(torch.logspace(0, 4, N))
    B = random(N, 1)
    jacobi = lambda R: R / A.diagonal[:, None]  # noqa: E731
    assert cg(A, B, preconditioner=jacobi).steps == 1 < cg(A, B).steps
    assert gmres(A, B, preconditioner=jacobi).steps == 1


def test_restarted_gmres_agrees_with_full(general):
    B = random(N, 2)
    assert_close(gmres(general, B, restart=7).X, gmres(general, B).X, atol=1e-8, rtol=0)


def test_gmres_says_that_it_failed():
    shift = mg.DenseMatrix(torch.roll(torch.eye(20), 1, 0))  # no progress before step n
    found = gmres(shift, torch.eye(20)[:, :1], restart=5, max_steps=40)
    assert not found.converged.any()
    assert_close(found.residuals[-1], torch.ones(1))


def test_lanczos_recurrence(indefinite):
    run = lanczos(indefinite, random(N, 2), 6)
    for column in range(2):
        Q = run.Q[..., column].mT
        T = Q.mT @ indefinite.entries @ Q
        assert_close(Q.mT @ Q, torch.eye(6), atol=1e-12, rtol=0)
        assert_close(T.diagonal(), run.diagonal[column])
        assert_close(T.diagonal(1), run.off[column, :-1])
        assert_close(T, T.triu(-1).tril(1), atol=1e-10, rtol=0)


def test_largest_eigenpairs(indefinite):
    values, V = largest_eigenpairs(indefinite, 3)
    exact = torch.linalg.eigvalsh(indefinite.entries)
    assert_close(values, exact[exact.abs().argsort(descending=True)[:3]])
    assert_close(indefinite @ V.dense(), V.dense() * values, atol=1e-6, rtol=0)


def test_stochastic_lanczos_covers_the_truth(definite):
    generator = torch.Generator().manual_seed(0)
    found = stochastic_lanczos(definite, torch.log, probes=400, generator=generator)
    exact = torch.logdet(definite.entries)
    assert (found.value - exact).abs() < 3 * found.error
    assert found.error < 0.01 * exact


def test_stochastic_lanczos_is_exact_for_a_diagonal():
    A = mg.DiagonalMatrix(torch.rand(12) + 1)
    found = stochastic_lanczos(A, torch.log, probes=3)
    assert_close(found.value, mg.logdet(A))
    assert found.error < 1e-10


def test_symmetry_is_recognised(definite, general):
    assert is_symmetric(definite)
    assert not is_symmetric(general)


def damped(U: torch.Tensor, V: torch.Tensor) -> mg.LinearOperator:
    return mg.LowRankMatrix(U, V) + mg.DiagonalMatrix(torch.full((len(U),), 12.0))


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("symmetric", [True, False])
def test_large_solve_and_its_two_derivatives(symmetric):
    U, B = random(8, 2).requires_grad_(), random(8, 2).flip(0).requires_grad_()

    def solution(U, B):
        return mg.solve(damped(U, U if symmetric else B), B)

    exact = torch.linalg.solve(damped(U, U if symmetric else B).dense(), B)
    assert_close(solution(U, B), exact, atol=1e-8, rtol=0)
    assert torch.autograd.gradcheck(solution, (U, B))
    assert torch.autograd.gradgradcheck(solution, (U, B), atol=1e-4)


@pytest.mark.usefixtures("by_products")
def test_large_logdet_estimates_value_and_gradient():
    U, d = random(30, 3).requires_grad_(), torch.full((30,), 12.0, requires_grad=True)
    A = mg.LowRankMatrix(U, U) + mg.DiagonalMatrix(d)
    value = mg.logdet(A)
    exact = torch.logdet(A.dense())
    assert_close(value, exact, rtol=0.02, atol=0)
    found, true = (torch.autograd.grad(v, d)[0] for v in (value, exact))
    assert_close(found.mean(), true.mean(), rtol=0.05, atol=0)
    assert_close(found, true, rtol=0.5, atol=0)


@pytest.mark.usefixtures("by_products")
def test_large_logdet_knows_how_it_scales():
    factor = torch.tensor(2.0, requires_grad=True)
    A = mg.DiagonalMatrix(torch.rand(30) + 1) + mg.LowRankMatrix(random(30, 1), random(30, 1))
    value = mg.logdet(factor * (A @ mg.DiagonalMatrix(torch.ones(30))))
    (gradient,) = torch.autograd.grad(value, factor)
    assert_close(gradient, torch.tensor(15.0))  # n / factor, by every probe


@pytest.mark.usefixtures("by_products")
def test_large_eigenvalues_are_differentiable():
    U = random(12, 2).requires_grad_()
    values, _ = mg.eigh(damped(U, U), k=2)
    exact = torch.linalg.eigvalsh(damped(U, U).dense()).flip(0)[:2]
    assert_close(values, exact)
    grads = [torch.autograd.grad(v.sum(), U)[0] for v in (values, exact)]
    assert_close(*grads, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("by_products")
def test_large_diagonal_and_trace_are_exact():
    A = damped(random(300, 2), random(300, 2).flip(1))
    S = mg.kron(torch.rand(3, 4), torch.rand(4, 3)) @ mg.DiagonalMatrix(torch.rand(12))
    assert_close(mg.diagonal(S), S.dense().diagonal())
    assert_close(mg.trace(A), A.dense().trace())


@pytest.mark.usefixtures("by_products")
def test_what_a_large_matrix_cannot_answer_is_an_error():
    U, u = random(8, 2), random(8, 1)
    A = mg.LowRankMatrix(U, U) + mg.LowRankMatrix(u, u.flip(0))
    wide = A @ mg.DiagonalMatrix(torch.arange(1.0, 9.0))
    with pytest.raises(ValueError, match="not symmetric"):
        mg.logdet(wide)
    with pytest.raises(ValueError, match="Give k"):
        mg.eigh(wide)
    negative = damped(random(8, 2), random(8, 2)) * -1.0
    with pytest.raises(ValueError, match="not positive"):
        mg.slogdet(negative + mg.DiagonalMatrix(torch.zeros(8)))
    singular = mg.LowRankMatrix(random(8, 2), random(8, 2)) @ mg.DiagonalMatrix(torch.ones(8))
    with pytest.raises(RuntimeError, match="relative residual"):
        mg.solve(singular, random(8, 1))


@pytest.mark.parametrize("method", [cg, minres, gmres])
def test_bad_systems_are_refused(method, definite):
    with pytest.raises(ValueError, match="of shape"):
        method(definite, random(N - 1, 1))
    with pytest.raises(ValueError, match="NaN"):
        method(definite, torch.full((N, 1), torch.nan))
