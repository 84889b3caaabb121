"""The rules that answer for large matrices by products alone, and the memory that they ask for."""

import math
import resource

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import _rules
from matrigami.operators import _memory, free_memory


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every matrix that is not dense already as too large to be made dense."""
    monkeypatch.setattr(_rules, "DENSE_LIMIT", 1)


def damped(U: torch.Tensor, V: torch.Tensor) -> mg.LinearOperator:
    return mg.LowRankMatrix(U, V) + mg.DiagonalMatrix(torch.full((len(U),), 12.0))


@pytest.mark.usefixtures("by_products")
@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_large_solve_and_its_two_derivatives(symmetric):
    U, B = random(6, 2).requires_grad_(), random(6, 2).flip(0).requires_grad_()

    def solution(U, B):
        return mg.solve(damped(U, U if symmetric else B), B)

    exact = torch.linalg.solve(damped(U, U if symmetric else B).dense(), B)
    assert_close(solution(U, B), exact, atol=1e-8, rtol=0)
    assert torch.autograd.gradcheck(solution, (U, B), check_forward_ad=True)
    options = {"atol": 1e-4, "check_fwd_over_rev": True, "fast_mode": True}
    assert torch.autograd.gradgradcheck(solution, (U, B), **options)


@pytest.mark.usefixtures("by_products")
def test_large_solve_under_torch_func():
    U, b = random(8, 2), random(8)
    A = damped(U, U.flip(0))
    exact = torch.linalg.inv(A.dense())
    assert_close(torch.func.jacrev(lambda b: mg.solve(A, b))(b), exact, atol=1e-9, rtol=0)
    assert_close(torch.func.jacfwd(lambda b: mg.solve(A, b))(b), exact, atol=1e-9, rtol=0)


@pytest.mark.usefixtures("by_products")
def test_large_logdet_is_not_an_estimate():
    A = mg.TensorTrain(rank=2).init(8, 8) + mg.DiagonalMatrix(torch.full((8,), 9.0))
    for question in (mg.logdet, mg.slogdet):
        with pytest.raises(ValueError, match=r"slogdet\(A\).*\n.*stochastic_logdet.*\n") as error:
            question(A)
        assert len(str(error.value).splitlines()) == 3


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
    with pytest.raises(ValueError, match="Give k"):
        mg.eigh(wide)
    low = mg.LowRankMatrix(random(8, 2), random(8, 2))
    singular = mg.hadamard(low, low)  # of rank 3
    with pytest.raises(RuntimeError, match="relative residual"):
        mg.solve(singular, random(8, 1))


def test_free_memory_is_that_of_the_kernel_and_its_limits(monkeypatch: pytest.MonkeyPatch):
    free = free_memory("cpu")
    assert 1 << 20 < free < 1 << 50
    assert free_memory("meta") == _memory.UNKNOWN
    used = int(_memory._read(_memory.Path("/proc/self/statm")).split()[0]) * resource.getpagesize()
    limit = used + (64 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert 0 <= free_memory() <= 64 << 20


def test_what_does_not_fit_into_memory_is_large(monkeypatch: pytest.MonkeyPatch):
    A = mg.LowRankMatrix(torch.zeros(2000, 1), torch.zeros(2000, 1))
    assert not _rules.is_large(A)
    monkeypatch.setattr(_memory, "free_memory", lambda _: 80 << 20)
    assert _rules.is_large(A)  # three copies of 32 MB
    assert not _rules.is_large(mg.LowRankMatrix(torch.zeros(500, 1), torch.zeros(500, 1)))
    assert not _rules.is_large(mg.DenseMatrix(torch.zeros(2000, 2000)))


QUESTIONS = {
    "cg": lambda A: mg.krylov.cg(A, torch.ones(3)).X,
    "gmres": lambda A: mg.krylov.gmres(A, torch.ones(3)).X,
    "lsmr": lambda A: mg.krylov.lsmr(A, torch.ones(3)).X,
    "exp_multiply": lambda A: mg.krylov.exp_multiply(A, torch.ones(3)),
    "lanczos": lambda A: mg.krylov.lanczos(A, np.ones((3, 1)), 2).diagonal,
    "largest_eigenpairs": lambda A: mg.krylov.largest_eigenpairs(A, 1).values,
    "stochastic_trace": lambda A: mg.krylov.stochastic_trace(A, generator=seeded()).value,
    "stochastic_logdet": lambda A: mg.krylov.stochastic_logdet(A, generator=seeded()).value,
    "is_hermitian": lambda A: torch.tensor(mg.krylov.is_hermitian(A)),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_matrices_of_numbers_are_taken_and_other_things_refused(ask):
    S = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) + 0.5
    wanted = ask(mg.DenseMatrix(S))
    for same in (S, S.numpy(), S.tolist()):
        assert_close(ask(same), wanted)
    with pytest.raises(TypeError, match="Give a tensor"):
        ask(None)


def test_starts_that_do_not_fit_are_refused():
    S = torch.eye(3)
    for V in (torch.ones(3), torch.ones(4, 1), torch.full((3, 1), torch.nan)):
        with pytest.raises(ValueError, match="lanczos"):
            mg.krylov.lanczos(S, V, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        mg.krylov.largest_eigenpairs(S * torch.nan, 1)


COUNTS = [
    *((name, "max_steps", -1) for name in ("cg", "minres", "gmres", "lsmr", "exp_multiply")),
    *(("gmres", "restart", 0), ("exp_multiply", "space", 0), ("lanczos", "steps", 0)),
    *(("largest_eigenpairs", "k", 0), ("largest_eigenpairs", "max_steps", -1)),
    *((name, "max_steps", 0) for name in ("stochastic_trace", "stochastic_logdet")),
    *((f"stochastic_{name}", "probes", 1) for name in ("trace", "logdet", "diagonal")),
]


@pytest.mark.parametrize(("name", "count", "few"), COUNTS)
def test_what_is_no_count_is_refused(name, count, few):
    ask = getattr(mg.krylov, name)
    start = () if name.startswith(("stochastic", "largest")) else (torch.ones(3, 1),)
    for value in (few, 2.5, 3.0, "3", math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}\(\.\.\., {count}={value!r}\).*\n.*\n"):
            ask(torch.eye(3), *start, **{count: value})
    with pytest.raises(ValueError, match=r"lanczos\(\.\.\., steps=2.5\)"):
        mg.krylov.lanczos(torch.eye(3), torch.ones(3, 1), 2.5)  # pyright: ignore[reportArgumentType]


ANSWERS = {
    "cg": lambda A, B: mg.krylov.cg(A, B).X,
    "minres": lambda A, B: mg.krylov.minres(A, B).X,
    "gmres": lambda A, B: mg.krylov.gmres(A, B).X,
    "lsmr": lambda A, B: mg.krylov.lsmr(A, B).X,
    "exp_multiply": mg.krylov.exp_multiply,
    "solve_iteratively": lambda A, B: mg.krylov.solve_iteratively(mg.DenseMatrix(A), B),
    "lanczos": lambda A, B: mg.krylov.lanczos(A, B, 2).eigh()[0],
    "trace": lambda A, B: mg.krylov.stochastic_trace(A, generator=seeded()).value,
    "exp": lambda A, B: mg.krylov.stochastic_trace(A, torch.exp, generator=seeded()).value,
    "logdet": lambda A, B: mg.krylov.stochastic_logdet(A, generator=seeded()).value,
    "diagonal": lambda A, B: mg.krylov.stochastic_diagonal(A, generator=seeded()).value,
}


@pytest.mark.parametrize("ask", ANSWERS.values(), ids=ANSWERS)
def test_empty_matrices_and_stacks_have_an_answer(ask):
    none, stack = (
        ask(torch.ones(0, 0), torch.ones(0, 2)),
        ask(torch.ones(0, 3, 3), torch.ones(3, 2)),
    )
    assert not none.any()  # no entries, or a sum of none
    assert stack.shape[0] == 0


def test_an_empty_matrix_has_no_eigenvalues():
    with pytest.raises(ValueError, match=r"largest_eigenpairs\(A, 1\)"):
        mg.krylov.largest_eigenpairs(torch.ones(0, 0), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "ask",
    [
        *ANSWERS.values(),
        lambda A, B: mg.krylov.largest_eigenpairs(A, 1).values,  # by LAPACK
        lambda A, B: mg.krylov.largest_eigenpairs(mg.direct_sum(*[mg.DenseMatrix(A)] * 80), 2)[0],
    ],
    ids=[*ANSWERS, "exact", "largest"],
)
def test_half_precision_is_computed_in_single(ask, dtype):
    A = torch.tensor([[2, 0.5, 0], [0.5, 2, 1], [0, 1, 3]], dtype=dtype)
    B = torch.ones(3, 2, dtype=dtype)
    found, single = ask(A, B), ask(A.float(), B.float())
    assert found.dtype == dtype
    assert_close(found.float(), single, rtol=float(4 * torch.finfo(dtype).eps), atol=1e-3)
