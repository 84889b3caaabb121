"""Kernel matrices of points: as accurate as asked, differentiable, and refused with a reason."""

import math

import numpy as np
import pytest
import torch

from matrigami import DenseMatrix, DiagonalMatrix, cholesky, cost, diagonal, logdet, solve
from matrigami.geometry import particles
from matrigami.geometry.particles import (
    KERNELS,
    _fast_multipole as fast_multipole,
    _matrix as matrix,
    error_estimate,
    forces,
    kernel_matrix,
    potential_energy,
)
from matrigami.geometry.particles._kernels import distances, interactions
from matrigami.geometry.particles._octree import decoded, encoded, octree
from matrigami.operators import CroppedMatrix
from matrigami.structures import H2Matrix, HODLRMatrix, PermutedMatrix, nystroem_inverse
from matrigami.testing import check_operator
from matrigami.testing._algebra_laws import ALGEBRA_LAWS
from matrigami.testing._question_laws import QUESTION_LAWS

SCALES = {"helmholtz": 0.2, "gaussian": 0.3, "rbf": 0.3, "yukawa": 0.3}


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def fast_only(monkeypatch: pytest.MonkeyPatch):
    """No dense matrices, however few the points, and cells of few points."""
    monkeypatch.setattr(matrix, "CROSSOVER", {1: 4, 2: 4, 3: 4})
    monkeypatch.setattr(fast_multipole, "CAP", {1: 8, 2: 12, 3: 20})
    monkeypatch.setattr(fast_multipole, "OCCUPANCY", {1: 4, 2: 6, 3: 8})


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_product_is_as_accurate_as_asked(fast_only, name: str, d: int):
    x, scale = cloud((300, 400, 600)[d - 1], d), SCALES.get(name, 1.0)
    for tol in (1e-3, 1e-6) if d < 3 else (1e-2,):
        A = kernel_matrix(x, name, scale=scale, tol=tol)
        assert not isinstance(A, DenseMatrix)
        error = error_estimate(A, x, name, scale=scale)
        assert error < 5 * tol


def test_more_digits_in_space_need_more_points_before_bases_pay(monkeypatch):
    monkeypatch.setattr(matrix, "CROSSOVER", {1: 4, 2: 64, 3: 64})
    kinds = {
        d: [kernel_matrix(cloud(100, d), "matern32", tol=tol) for tol in (1e-2, 1e-6)]
        for d in (2, 3)
    }
    dense = {d: [isinstance(A, DenseMatrix) for A in found] for d, found in kinds.items()}
    assert dense == {2: [False, False], 3: [False, True]}


def test_any_function_of_the_distance_will_do(fast_only):
    x = cloud(200, 2)
    A = kernel_matrix(x, lambda r: 1 / (1 + r) ** 2)
    exact = 1 / (1 + torch.cdist(x, x)) ** 2
    assert float((A.dense() - exact).norm() / exact.norm()) < 1e-6


def test_targets_need_not_be_sources(fast_only):
    for d in (1, 2, 3):
        x, y = cloud(150, d), 1.5 * cloud(90, d, seed=1)
        A = kernel_matrix(x, "laplace", targets=y, tol=1e-3)
        exact = 1 / torch.cdist(y, x)
        assert A.shape == (90, 150)
        assert float((A.dense() - exact).norm() / exact.norm()) < 1e-3
        q = torch.randn(90, 2, dtype=torch.float64)
        torch.testing.assert_close(A.T @ q, A.dense().T @ q)


def small_octree(monkeypatch: pytest.MonkeyPatch, targets: int | None = None) -> H2Matrix:
    monkeypatch.setattr(fast_multipole, "CAP", {1: 2})
    monkeypatch.setattr(fast_multipole, "OCCUPANCY", {1: 1})
    x = cloud(8, 1)
    y = x if targets is None else cloud(targets, 1, seed=1)
    A = fast_multipole.fast_multipole_matrix(y, x, KERNELS["gaussian"], 1.0, 0.1)
    assert len(A.couplings) > 1
    return A


@pytest.mark.slow
def test_octree_of_targets_and_sources_obeys_the_laws(monkeypatch: pytest.MonkeyPatch):
    check_operator(small_octree(monkeypatch, targets=5))


@pytest.mark.slow  # a minute: more questions can be asked of a square
def test_octree_with_a_diagonal_obeys_the_laws(monkeypatch: pytest.MonkeyPatch):
    A = small_octree(monkeypatch)
    check_operator(A + DiagonalMatrix(torch.ones(8, dtype=torch.float64)))


def test_octree_with_a_diagonal_answers_the_questions(monkeypatch: pytest.MonkeyPatch):
    A = small_octree(monkeypatch)
    S = A + DiagonalMatrix(torch.ones(8, dtype=torch.float64))
    check_operator(S, [*ALGEBRA_LAWS, *QUESTION_LAWS])


def test_line_is_hodlr_with_direct_answers():
    x = torch.rand(1500, dtype=torch.float64)
    for name, scale in (("matern12", 0.2), ("matern32", 0.2), ("matern52", 0.2), ("gaussian", 0.1)):
        K = kernel_matrix(x, name, scale=scale, tol=1e-10)
        A = K + DiagonalMatrix(torch.full((1500,), 1e-2, dtype=torch.float64))
        assert isinstance(A, PermutedMatrix)
        inner = A.matrix.padded if isinstance(A.matrix, CroppedMatrix) else A.matrix
        assert isinstance(inner, HODLRMatrix)
        D = interactions(KERNELS[name], x[:, None], x[:, None], scale) + 1e-2 * torch.eye(1500)
        L = torch.linalg.cholesky(D)
        wanted = 2 * L.diagonal().log().sum()
        assert float((logdet(A) - wanted).abs() / wanted.abs()) < 1e-9
        b = torch.randn(1500, dtype=torch.float64)
        assert float((D @ solve(A, b) - b).norm() / b.norm()) < 1e-7


def test_semiseparable_factors_are_exact():
    x = torch.rand(700, dtype=torch.float64)
    for name in ("matern12", "matern32", "matern52"):
        A = kernel_matrix(x, name, scale=0.1)
        D = interactions(KERNELS[name], x[:, None], x[:, None], 0.1)
        torch.testing.assert_close(A.dense(), D, rtol=0, atol=1e-14)


def test_diagonal_stays_hierarchical_and_systems_are_solved(fast_only, monkeypatch):
    x = cloud(300, 2)
    A = kernel_matrix(x, "matern32", scale=0.2, tol=1e-8)
    S = A + DiagonalMatrix(torch.full((300,), 0.5, dtype=torch.float64))
    assert isinstance(S, H2Matrix)
    torch.testing.assert_close(diagonal(S), torch.full((300,), 1.5, dtype=torch.float64))
    torch.testing.assert_close((2.0 * S).dense(), 2 * S.dense())
    monkeypatch.setattr("matrigami.krylov._rules.DENSE_LIMIT", 0)
    b = torch.randn(300, 2, dtype=torch.float64)
    assert float((S @ solve(S, b) - b).norm() / b.norm()) < 1e-9
    indefinite = S + DiagonalMatrix(torch.full((300,), -20.0, dtype=torch.float64))
    assert nystroem_inverse(S) is not None
    assert nystroem_inverse(indefinite) is None
    assert float((indefinite @ solve(indefinite, b) - b).norm() / b.norm()) < 1e-9


@pytest.mark.parametrize(("d", "tol"), [(1, 1e-8), (2, 1e-8), (3, 1e-4)])
@pytest.mark.parametrize("name", ["matern32", "gaussian"])
def test_gradients_in_points_scale_and_vectors(fast_only, name: str, d: int, tol: float):
    x, q = cloud(150, d), torch.randn(150, dtype=torch.float64)

    def energy(A) -> torch.Tensor:
        return (q * (A @ q)).sum()

    found, wanted = [], []
    for into, build in (
        (found, lambda x, s: kernel_matrix(x, name, scale=s, tol=tol)),
        (wanted, lambda x, s: DenseMatrix(interactions(KERNELS[name], x, x, s))),
    ):
        points = x.clone().requires_grad_()
        scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        into.extend(torch.autograd.grad(energy(build(points, scale)), (points, scale)))
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e3 * tol


def test_likelihood_has_the_gradient_of_the_dense_one():
    x = torch.rand(600, dtype=torch.float64)
    y = torch.sin(6 * x)

    def likelihood(A) -> torch.Tensor:
        return -0.5 * (y @ solve(A, y) + logdet(A))

    found = []
    for dense in (False, True):
        scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        noise = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        A = kernel_matrix(x, "matern32", scale=scale) + DiagonalMatrix(noise.expand(600))
        A = DenseMatrix(A.dense()) if dense else A
        found.append(torch.autograd.grad(likelihood(A), (scale, noise)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=0)


def test_forces_are_pairwise_and_add_up_to_nothing(fast_only):
    x, q = cloud(200, 3), torch.randn(200, dtype=torch.float64)
    F = forces(x, q, "laplace", tol=1e-4)
    away = x[:, None] - x
    r = distances(x, x)
    exact = (q[:, None] * q * r.masked_fill(r == 0, math.inf) ** -3)[..., None] * away
    assert float((F - exact.sum(1)).norm() / exact.sum(1).norm()) < 1e-3
    assert float(F.sum(0).norm() / F.norm()) < 1e-3
    assert float(potential_energy(x, q, "laplace")) == pytest.approx(
        float((q * (q / r.masked_fill(r == 0, math.inf)).sum(1)).sum() / 2), rel=1e-3
    )


def test_clusters_and_a_surface_take_no_more_work_for_each_point_than_a_cube(monkeypatch):
    """Multiply-adds of one product, and stored numbers of the near field."""
    generator = torch.Generator().manual_seed(3)
    n = 12000
    a, b, s = (torch.randn(n // 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    shell = 0.5 + 0.5 * s / s.norm(dim=1, keepdim=True)
    uneven = torch.cat([0.03 * a + 0.2, 0.05 * b + 0.8, shell])
    costs = []
    for x in (cloud(n, 3), uneven):
        A = kernel_matrix(x, "laplace", tol=1e-3)
        assert error_estimate(A, x, "laplace") < 1e-3
        costs.append((cost(A).macs, sum(B.blocks.numel() for B in A.near)))
    assert costs[1][0] < 2 * costs[0][0]
    assert costs[1][1] < 3 * costs[0][1]


@pytest.mark.parametrize("d", [2, 3])
def test_a_small_square_or_cube_stores_as_much_for_each_point_as_a_large_one(d: int):
    numbers = []
    for power in (12, 13, 15):
        x = cloud(2**power, d)
        name = "coulomb2d" if d == 2 else "laplace"
        A = fast_multipole.fast_multipole_matrix(x, x, KERNELS[name], 1.0, 1e-2)
        own = [B for level in A.left for B in level] + list(A.near)
        numbers.append(sum(B.blocks.numel() for B in own) / len(x))
    assert max(numbers) < 1.25 * min(numbers)


def test_cells_on_the_curve_are_found_again():
    cells = torch.randint(0, 2**20, (50, 3))
    assert torch.equal(decoded(encoded(cells), 3), cells)
    tree = octree(x := cloud(500, 2), x, 16, 8.0)
    counts = [int(level.sources[1][~level.split].sum()) for level in tree.levels]
    assert sum(counts) == 500


@pytest.mark.parametrize("n", [0, 1])
def test_no_point_and_one_point(n: int):
    A = kernel_matrix(torch.zeros(n, 3, dtype=torch.float64), "matern32")
    assert A.shape == (n, n)
    assert A.dense().tolist() == [[1.0]] * n
    assert kernel_matrix(torch.zeros(n), "laplace").dense().tolist() == [[0.0]] * n


def test_points_far_from_the_origin_are_as_good_as_near_ones(fast_only):
    x = cloud(200, 2)
    near, far = (kernel_matrix(p, "laplace") for p in (x, 1000 * x + 1e6))
    torch.testing.assert_close(near.dense(), 1000 * far.dense(), rtol=1e-4, atol=1e-6)


def test_coincident_points_are_refused_only_where_the_kernel_is_infinite(fast_only):
    x = cloud(100, 2)
    x[3] = x[77]
    with pytest.raises(ValueError, match=r"2 points coincide, for instance \[3, 77\]"):
        kernel_matrix(x, "laplace")
    x = x[:1].expand(100, 2)  # all of them
    assert float((kernel_matrix(x, "gaussian").dense() - 1).abs().max()) < 1e-12


def test_single_precision_has_a_default_that_it_can_reach(fast_only):
    x = cloud(300, 2).float()
    A = kernel_matrix(x, "matern32", scale=0.3)
    assert A.dtype == torch.float32
    assert error_estimate(A, x, "matern32", scale=0.3) < 1e-4


@pytest.mark.usefixtures("unchecked")
def refusal(call) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert 2 <= len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_points_and_charges_come_from_numpy_and_lists():
    x, q = cloud(40, 2).numpy(), np.ones(40)
    wanted = forces(torch.from_numpy(x), torch.ones(40, dtype=torch.float64), "multiquadric")
    np.testing.assert_allclose(forces(x, q, "multiquadric"), wanted.numpy())
    assert kernel_matrix([[0, 0], [3, 4]], "laplace").dense()[0, 1] == pytest.approx(0.2)
    for wrong in (x + 1j, x > 0.5, "points"):
        with pytest.raises(TypeError, match="must be real numbers"):
            kernel_matrix(wrong, "rbf")


@pytest.mark.parametrize(("name", "d"), [("gaussian", 2), ("multiquadric", 2), ("yukawa", 3)])
def test_the_derivative_in_the_scale_is_as_accurate_as_the_kernel(fast_only, name: str, d: int):
    x, y = cloud(400, d), torch.rand(2, 400, dtype=torch.float64)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(
        y[0] @ (kernel_matrix(x, name, scale=scale, tol=1e-4) @ y[1]), scale
    )
    exact = interactions(KERNELS[name], x, x, scale)
    (wanted,) = torch.autograd.grad(y[0] @ (exact @ y[1]), scale)
    assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_a_kernel_that_oscillates_within_a_cell_is_refused(fast_only):
    with pytest.raises(ValueError, match=r"oscillates.*\nUse a larger tol"):
        kernel_matrix(cloud(2000, 2), "helmholtz", scale=2e-3)


def test_bad_input_is_refused_in_three_lines(monkeypatch: pytest.MonkeyPatch):
    x = cloud(10, 2)
    bad = x.clone()
    bad[4, 1] = math.nan
    assert "point 4" in refusal(lambda: kernel_matrix(bad, "laplace"))
    assert "beyond" in refusal(lambda: kernel_matrix(x * 1e300, "laplace"))
    assert "1, 2 or 3 coordinates" in refusal(lambda: kernel_matrix(cloud(10, 4), "laplace"))
    assert "in one space" in refusal(lambda: kernel_matrix(x, "rbf", targets=cloud(3, 3)))
    assert "ten roundings" in refusal(lambda: kernel_matrix(x.float(), "rbf", tol=1e-8))
    assert "Did you mean 'laplace'" in refusal(lambda: kernel_matrix(x, "laplac"))
    for scale in (0.0, -1.0, math.nan, torch.tensor(0.0)):
        assert "distances are divided" in refusal(lambda s=scale: kernel_matrix(x, "rbf", scale=s))
    assert "not positive definite" in refusal(lambda: cholesky(kernel_matrix(x, "laplace")))
    assert "one number for each" in refusal(lambda: potential_energy(x, torch.ones(3), "rbf"))
    assert "real and imaginary" in refusal(lambda: kernel_matrix(x, lambda r: torch.exp(1j * r)))
    monkeypatch.setattr(particles._points, "free_memory", lambda device: 100)
    assert "are free" in refusal(lambda: kernel_matrix(x, "laplace"))
