"""What is refused, early and in the same words, whatever the structure; and what is not."""

import math
import subprocess
import sys

import pytest
import scipy.sparse
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.geometry.mesh import Grid
from matrigami.operators import EXAMPLES, add, compose

I4 = torch.eye(4)
A = mg.DenseMatrix(2 * I4)
b = torch.ones(4)


def few_lines(call, kinds=(TypeError, ValueError, IndexError, torch.linalg.LinAlgError)) -> None:
    with pytest.raises(kinds) as caught:
        call()
    assert 2 <= len(str(caught.value).splitlines()) <= 3, str(caught.value)


WRONG = {
    "a word as a factor": lambda: A * "x",
    "nothing as a factor": lambda: A * None,
    "a word as a divisor": lambda: A / "x",
    "a number by a matrix": lambda: 2 / A,
    "nothing subtracted": lambda: A - None,
    "a complex exponent": lambda: mg.power(A, 1j),
    "a word as a shift": lambda: mg.shift(A, "x"),
    "a word as damping": lambda: mg.solve(A, b, "x"),
    "no right-hand side": lambda: mg.solve(A),
    "a negative residual": lambda: mg.solve(A, b, tol=-1),
    "a number as a preconditioner": lambda: mg.solve(A, b, preconditioner=3),
    "a first guess that is too short": lambda: mg.solve(A, b, x0=torch.ones(3)),
    "a norm that is none": lambda: mg.norm(A, -1),
    "nothing as indices": lambda: mg.entries(A, None, None),
    "indices beyond": lambda: mg.take_rows(A, [4]),
    "fractions as indices": lambda: mg.take_rows(A, torch.tensor([0.5])),
    "indices of two lengths": lambda: mg.entries(A, [0, 1, 2], [0, 1]),
    "a word as an index": lambda: A["x"],
    "a fraction as an index": lambda: A[1.5],
    "too many indices": lambda: A[0, 0, 0],
    "flags that are too few": lambda: A[torch.tensor([True, False])],
    "numbers for vectors": lambda: mg.outer(1.0, 2.0),
    "stacks that do not fit, added": lambda: stack(2) + stack(3),
    "stacks that do not fit, multiplied": lambda: stack(2) @ stack(3),
    "a stack and vectors": lambda: stack(2) @ torch.ones(3, 4, 1),
    "a stack and factors": lambda: stack(2) * torch.ones(3),
    "a stack and right-hand sides": lambda: mg.solve(stack(2), torch.ones(3, 4, 1)),
}


def stack(size: int) -> mg.DenseMatrix:
    return mg.DenseMatrix(I4.expand(size, 4, 4))


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_in_two_or_three_lines(call):
    few_lines(call)


@pytest.mark.parametrize("ask", [mg.eigh, mg.svd, mg.svdvals, mg.sqrt, mg.cholesky, mg.pinv])
def test_factors_of_what_is_not_finite(ask):
    bad = mg.DenseMatrix(torch.diag(torch.tensor([1.0, math.nan])))
    few_lines(lambda: ask(bad), ValueError)


SKEWED = torch.tensor([[4.0, 1.0], [2.0, 3.0]])


SKEW = {
    "dense": mg.DenseMatrix(SKEWED),
    "half": mg.DenseMatrix(SKEWED).to(torch.bfloat16),
    "blocks": mg.BlockDiagonalMatrix(torch.stack([torch.eye(2), SKEWED])),
    "kron": mg.kron(SKEWED, torch.eye(2)),
    "kron_sum": mg.kron_sum(torch.eye(2), SKEWED),
    "direct_sum": mg.direct_sum(mg.DenseMatrix(torch.eye(2)), mg.DenseMatrix(SKEWED)),
    "diagonal": mg.DiagonalMatrix(torch.tensor([2.0 + 1j, 3.0])),
    "update": mg.identity(3) + mg.LowRankMatrix(torch.ones(3, 1), torch.arange(3.0)[:, None]),
    "mesh": (1 + 1j) * Grid((3,)).stiffness(),
}


@pytest.mark.parametrize("ask", [mg.eigh, mg.cholesky, mg.sqrt], ids=["eigh", "cholesky", "sqrt"])
@pytest.mark.parametrize("M", SKEW.values(), ids=SKEW)
def test_factors_of_what_is_not_hermitian(ask, M):
    few_lines(lambda: ask(M), ValueError)


def test_a_few_eigenvalues_of_what_is_not_hermitian():
    M = mg.from_scipy(scipy.sparse.random(5000, 5000, 1e-3, random_state=0))
    few_lines(lambda: mg.eigh(M, 2), ValueError)
    rounded = torch.randn(40, 60).bfloat16() @ torch.randn(60, 40).bfloat16()
    for S in (rounded + rounded.T, torch.randn(40, 7).bfloat16()):
        G = mg.DenseMatrix(S @ S.T)  # equal to its adjoint up to the rounding of its entries
        assert mg.eigh(G).values.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EXAMPLES)
def test_zero_is_singular_in_every_structure(name):
    try:
        zero = 0.0 * EXAMPLES[name].init(4, 4)
    except ValueError:
        pytest.skip("no square members")
    calls = (
        lambda: mg.solve(zero, b),
        lambda: mg.inverse(zero) @ b,
        lambda: mg.power(zero, -1) @ b,
        lambda: mg.power(zero, -2) @ b,
    )
    for call in calls:
        few_lines(call, torch.linalg.LinAlgError)
    assert [float(x) for x in mg.slogdet(zero)] == [0.0, -math.inf]


def test_low_ranks_are_singular_without_rounding():
    L = mg.LowRankMatrix(torch.randn(4, 2), torch.randn(4, 2))
    few_lines(lambda: mg.solve(L, b), torch.linalg.LinAlgError)
    assert float(mg.logdet(L)) == -math.inf


def test_arguments_by_name():
    assert_close(mg.solve(B=b, A=A), b / 2)
    assert mg.project(recipe=mg.LowRank(rank=1), W=I4, right=I4).shape == (4, 4)
    for f in (add, compose):
        assert_close(f(A=A, B=A).dense(), 4 * I4)


def test_norms_beyond_the_range_of_squares():
    for size in (1e25, 1e-30):
        for name in EXAMPLES:
            M = EXAMPLES[name].init(8, 8) * size
            found = mg.norm(M.to(torch.float32))
            assert found.dtype == torch.float32
            assert float(found) == pytest.approx(float(mg.norm(M / size)) * size, rel=1e-4)


def test_metrics_that_are_none():
    for M in (-I4, I4 + torch.eye(4).roll(1, 0), 2 - I4, I4 * math.nan):
        few_lines(lambda M=M: mg.project(mg.LowRank(rank=1), I4, right=M), ValueError)
    for recipe in (mg.LowRank(rank=1), mg.Kronecker(), mg.Monarch(blocks=2)):
        M = torch.eye(4) * (2 + 0j)
        steered, plain = (mg.project(recipe, torch.ones(4, 4), right=R) for R in (M, None))
        assert steered.dtype.is_complex
        assert_close(steered.dense().real, plain.dense(), check_dtype=False)


ALONE = """
import torch
from matrigami.operators import {name}
print(type({call}).__name__)
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kron", "kron(torch.eye(2), torch.eye(2))"),
        ("kron_sum", "kron_sum(torch.eye(2), torch.eye(2))"),
        ("outer", "outer(torch.ones(2), torch.ones(2))"),
        ("DenseMatrix, fans", "fans(DenseMatrix(torch.eye(2)))"),
        ("DenseMatrix, iterate", "iterate(DenseMatrix(torch.eye(2)), torch.ones(2, 1))"),
    ],
)
def test_functions_without_a_default_that_are_imported_alone(name, call):
    program = ALONE.format(name=name, call=call)
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)


FIRST = """
import numpy as np, torch, matrigami as mg
assert mg.kron(torch.eye(2), torch.eye(3)).shape == (6, 6)  # the first name that is used
assert mg.DiagonalMatrix(torch.tensor([1, 2])).dtype == torch.float32
X, frozen = np.arange(6.0).reshape(3, 2), np.ones(3)
frozen.setflags(write=False)
for x in (frozen, np.ones(3, dtype=">f8")):
    assert np.allclose(mg.LowRankMatrix(X, X) @ x, X @ X.T @ x)
assert mg.outer(X[:, 0], [1, 2]).dense()[2].tolist() == [4, 8]
assert mg.khatri_rao(X, X).dense()[8].tolist() == [16, 25]
A = mg.DenseMatrix(torch.eye(2))
calls = (
    lambda: A ** "x",
    lambda: mg.norm(A, "nuc"),
    lambda: mg.eigh(A, 1.5),
    lambda: mg.project(torch.eye(2), mg.LowRank(rank=1)),
    lambda: mg.project(mg.LowRank(rank=1), torch.eye(2), tol="x"),
)
for call in calls:
    try:
        call()
    except (TypeError, ValueError) as error:
        assert 2 <= len(str(error).splitlines()) <= 3, error
    else:
        raise AssertionError
"""


def test_what_is_taken_and_refused_where_no_types_are_checked():
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST], check=True)


def test_powers_and_norms_of_a_million_rows():
    n = 10**6
    L = torch.diag(torch.full((100,), 2.0)) - torch.diag(torch.ones(99), 1)
    K = mg.kron_sum(L, L, L - torch.diag(torch.ones(99), -1))
    x = torch.linspace(-1, 1, n)
    assert_close(mg.power(K, 2) @ x, K @ (K @ x))
    assert_close(mg.power(K, 0) @ x, x)
    U, d = torch.linspace(0, 1e-3, 2 * n).reshape(n, 2), torch.linspace(1, 2, n)
    low = mg.LowRankMatrix(U, U)
    assert isinstance(mg.power(low, 3), mg.LowRankMatrix)
    assert_close(mg.power(low, 3) @ x, low @ (low @ (low @ x)))
    squares = d.square().sum() + 2 * (d[:, None] * U * U).sum() + (U.T @ U).square().sum()
    assert_close(mg.norm(mg.DiagonalMatrix(d) + low), squares.sqrt())


def test_grids_in_three_dimensions_have_eigenvalues_of_their_lines():
    L = torch.diag(torch.full((40,), 2.0)) - torch.diag(torch.ones(39), 1)
    L = L - torch.diag(torch.ones(39), -1)
    K, v = mg.kron_sum(L, L, L), torch.linalg.eigvalsh(L)
    sums = (v[:, None, None] + v[:, None] + v).flatten()
    assert_close(mg.logdet(K), sums.log().sum())
    assert_close(mg.eigh(K).values.sort().values, sums.sort().values)
    x = torch.linspace(-1, 1, 40**3)
    assert_close(K @ mg.solve(K, x), x)
    one_way = mg.kron_sum(L.triu(), L.triu(), L.triu())
    assert_close(mg.logdet(one_way), torch.tensor(40**3 * math.log(6.0)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_complex_matrices_are_projected(name):
    W = torch.randn(8, 8, dtype=torch.complex128)
    found = mg.project(EXAMPLES[name], W)
    assert found.dtype == W.dtype
    assert float((found.dense() - W).norm()) < float(W.norm())
    zero = mg.project(EXAMPLES[name], 0 * W)
    assert float(zero.dense().abs().max()) == 0.0


def test_factors_of_sparse_matrices_follow_changes_behind_the_back_of_autograd():
    S = mg.from_scipy(pytest.importorskip("scipy.sparse").eye_array(2, format="csr") * 2.0)
    S = mg.SparseMatrix(S.entries, S.columns, S.pointers, S.size)
    assert_close(mg.solve(S, torch.ones(2)), torch.full((2,), 0.5))
    S.entries.data.mul_(2)
    assert_close(mg.solve(S, torch.ones(2)), torch.full((2,), 0.25))


def test_nothing_to_solve_for_on_the_meta_device():
    for name in ("banded", "kronecker_sum"):
        M = EXAMPLES[name].init(4, 4).to("meta")
        assert mg.solve(M, torch.empty(4, device="meta")).shape == (4,)
