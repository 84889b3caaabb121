"""HODLR from products or entries alone: accuracy, order, Schur complements, and what is refused."""

import pytest
import torch

from matrigami import (
    DenseMatrix,
    LinearOperator,
    cost,
    diagonal,
    identity,
    inverse,
    kron,
    logdet,
    solve,
)
from matrigami.curvature import hessian
from matrigami.geometry import hierarchical, relative_error
from matrigami.geometry._ordered import bisected
from matrigami.geometry.mesh import Grid
from matrigami.structures import LowRank


def exponential(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-2 * torch.cdist(x[:, None], x[:, None])) + 0.1 * torch.eye(len(x)).to(x)


def schur_complement(k: int, m: int) -> tuple[LinearOperator, LinearOperator]:
    """Of the line between two halves of a Poisson problem, and the matrix of one half."""
    h = 1 / (m + 1)
    half = Grid((k, m), lengths=((k + 1) * h, 1.0)).stiffness()
    last = torch.zeros(k, 1, dtype=torch.float64)
    last[-1] = -1 / h**2
    C = kron(DenseMatrix(last), identity(m, dtype=torch.float64))
    line = Grid((m,)).stiffness() + (2 / h**2) * identity(m, dtype=torch.float64)
    return line - 2.0 * (C.T @ inverse(half) @ C), half


@pytest.mark.parametrize("n", [0, 1, 5, 130, 300])
def test_products_and_entries_give_the_matrix_in_any_order(n: int):
    x = torch.rand(n, dtype=torch.float64)
    D = exponential(x)
    for A in (DenseMatrix(D), lambda i, j: D[i, j]):
        H = hierarchical(A, x, tol=1e-10, leaf=16)
        torch.testing.assert_close(H.dense(), D, rtol=0, atol=1e-9)
    if n == 300:
        assert cost(H).params < 0.3 * n**2
        b = torch.randn(n, dtype=torch.float64)
        torch.testing.assert_close(D @ solve(H, b), b, rtol=0, atol=1e-7)
        torch.testing.assert_close(logdet(H), torch.logdet(D), rtol=1e-8, atol=0)


def test_unsymmetric_and_complex_matrices():
    x = torch.rand(200, dtype=torch.float64).sort().values
    D = torch.exp(-2 * (x[:, None] - x).abs()) * (1 + x) * (1 + 0.5j * x[:, None])
    H = hierarchical(DenseMatrix(D), tol=1e-9, leaf=16)
    torch.testing.assert_close(H.dense(), D, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_the_error_is_about_the_tolerance(tol: float):
    x = torch.rand(400, 2, dtype=torch.float64)
    D = torch.exp(-torch.cdist(x, x))
    H = hierarchical(DenseMatrix(D), x, tol=tol, leaf=32)
    true = float((H.dense() - D).norm() / D.norm())
    assert true < 2 * tol
    assert relative_error(DenseMatrix(D), H, probes=100) == pytest.approx(true, rel=0.3)


def test_the_determinant_of_poisson_from_a_schur_complement():
    S, half = schur_complement(63, 127)
    H = hierarchical(S, tol=1e-9, leaf=32)
    assert cost(H).params < 0.6 * 127**2
    whole = logdet(Grid((127, 127)).stiffness())
    torch.testing.assert_close(2 * logdet(half) + logdet(H), whole, rtol=1e-11, atol=0)


def test_a_hessian_is_known_by_its_products():
    """Of a chain of springs, whose stiffnesses depend on all elongations together."""
    x = torch.linspace(0, 1, 120, dtype=torch.float64)
    u = torch.nn.Parameter(torch.sin(3 * x))
    K = exponential(x)

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.u = u

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 0.5 * (self.u @ K @ self.u + (weight * self.u.diff().square()).sum())[None]

    data = [(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))]
    A = hessian(Chain(), lambda out, _: out.sum(), data)
    H = hierarchical(A, tol=1e-8, leaf=16)
    wanted = torch.func.hessian(lambda v: 0.5 * (v @ K @ v + v.diff().square().sum()))(u.detach())
    torch.testing.assert_close(H.dense(), wanted, rtol=0, atol=1e-6)


def test_neighbours_are_together_in_a_balanced_order():
    x = torch.rand(1000, 2, dtype=torch.float64)
    order = bisected(x, 4)
    assert torch.equal(order.sort().values, torch.arange(1000))
    boxes = x[order][: 63 * 15].reshape(15, 63, 2)
    assert float((boxes.amax(1) - boxes.amin(1)).max()) < 0.35


def refusal(call) -> str:
    with pytest.raises(ValueError, match=r"hierarchical\(") as caught:
        call()
    assert 2 <= len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_what_does_not_compress_is_refused_in_three_lines():
    x = torch.rand(300, dtype=torch.float64)
    shuffled = DenseMatrix(torch.randn(300, 300, dtype=torch.float64))
    assert "does not compress" in refusal(lambda: hierarchical(shuffled, leaf=16))
    assert "there are 299 points" in refusal(lambda: hierarchical(shuffled, x[1:]))
    assert "no points" in refusal(lambda: hierarchical(lambda i, j: i - j))
    assert "single square matrix" in refusal(lambda: hierarchical(LowRank(rank=1).init(4, 5)))

    class Wrong(DenseMatrix):
        """A matrix whose transpose is that of another."""

        @property
        def T(self) -> "Wrong":
            return Wrong(2 * self.entries.mT)

    D = exponential(x.sort().values)
    assert "not its transpose" in refusal(lambda: hierarchical(Wrong(D), leaf=16))
    assert float((diagonal(hierarchical(DenseMatrix(D))) - 1.1).abs().max()) < 1e-9


@pytest.mark.usefixtures("unchecked")
def test_bad_numbers_are_refused_in_three_lines():
    A, x = DenseMatrix(torch.eye(40, dtype=torch.float32)), torch.zeros(40, 4)
    assert "ten roundings" in refusal(lambda: hierarchical(A, tol=1e-12))
    assert "out of range" in refusal(lambda: hierarchical(A, tol=0))
    assert "out of range" in refusal(lambda: hierarchical(A, leaf=0))
    assert "out of range" in refusal(lambda: hierarchical(lambda i, j: i, size=-1))
    nan = torch.full((200, 200), torch.nan, dtype=torch.float64)
    assert "not finite" in refusal(lambda: hierarchical(DenseMatrix(nan)))
    assert "not finite" in refusal(lambda: hierarchical(lambda i, j: nan[i, j], size=200))
    with pytest.raises(TypeError, match="hierarchical"):
        hierarchical(torch.eye(3))
    with pytest.raises(ValueError, match="1, 2 or 3 coordinates"):
        hierarchical(A, x)


def test_points_in_one_place_are_in_some_order():
    D = exponential(torch.zeros(100, dtype=torch.float64))
    H = hierarchical(lambda i, j: D[i, j], torch.zeros(100, 2), leaf=16)
    torch.testing.assert_close(H.dense(), D, rtol=0, atol=1e-12)
