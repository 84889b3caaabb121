"""Projection: bad targets, metrics, and the least-squares fit behind what has no closed form."""

import pytest
import torch

from matrigami import DenseMatrix, DiagonalMatrix, LinearOperator, Structure, project
from matrigami.operators import (
    Metric,
    least_squares_fit,
    named_tensors,
    truncated_svd,
    with_tensors,
)
from matrigami.structures import EXAMPLES, Dense, Kronecker, LowRank, Monarch, TensorTrain

each_structure = pytest.mark.parametrize("name", EXAMPLES)


@each_structure
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_targets_that_are_not_finite(name, bad):
    W = torch.ones(12, 12)
    W[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        project(EXAMPLES[name], W)
    assert len(str(caught.value).splitlines()) in {2, 3}


@pytest.mark.parametrize("shape", [(), (4,)])
def test_targets_without_two_axes(shape):
    with pytest.raises(ValueError, match="a matrix has two axes"):
        project(Dense(), torch.ones(shape))


def test_structure_without_a_projection():
    class Unknown(Structure):
        """No rule is registered for it."""

        def blank(self, m, n, empty) -> LinearOperator:
            return DenseMatrix(empty(m, n))

    with pytest.raises(TypeError, match="Unknown") as caught:
        project(Unknown(), torch.eye(2))
    assert "project.register" in str(caught.value)


@each_structure
def test_target_is_neither_changed_nor_kept(name):
    """The projection is a value of its own: writing to the target does not change it."""
    W = torch.randn(6, 6)
    before = W.clone()
    A = project(EXAMPLES[name], W)
    D = A.dense().clone()
    assert torch.equal(W, before)
    W.zero_()
    torch.testing.assert_close(A.dense(), D)


def test_truncated_svd_factors():
    M = torch.randn(5, 7)
    S = torch.linalg.svdvals(M)
    L, R = truncated_svd(M, 3)
    torch.testing.assert_close(L.mT @ L, R @ R.mT)  # balanced: both carry the square roots
    torch.testing.assert_close(((L @ R) - M).square().sum(), S[3:].square().sum())
    L, R = truncated_svd(M, 3, balanced=False)
    torch.testing.assert_close(L.mT @ L, torch.eye(3))
    torch.testing.assert_close((R @ R.mT).diagonal().sqrt(), S[:3])


def positive_definite(n: int) -> DenseMatrix:
    F = torch.randn(n, n)
    return DenseMatrix(F @ F.T + 0.1 * torch.eye(n))


def error_in(metric: Metric, A: LinearOperator, W: torch.Tensor) -> float:
    E = W - A.dense()
    return float((E * metric.apply(E)).sum())


@pytest.mark.parametrize("recipe", [Kronecker(), Monarch(blocks=2), TensorTrain(rank=2)], ids=str)
def test_metric_steers_the_error(recipe):
    W, metric = torch.randn(8, 6), Metric(positive_definite(8), positive_definite(6))
    plain = project(recipe, W)
    steered = project(recipe, W, left=metric.left, right=metric.right)
    assert error_in(metric, steered, W) < 0.95 * error_in(metric, plain, W)
    assert float((plain.dense() - W).norm()) <= float((steered.dense() - W).norm())


def test_identity_metric_changes_nothing():
    W, eye = torch.randn(6, 6), DiagonalMatrix(torch.ones(6))
    for recipe in (LowRank(rank=2), Monarch(blocks=2), Kronecker()):
        same = project(recipe, W, left=eye, right=eye)
        torch.testing.assert_close(
            (same.dense() - W).norm(), (project(recipe, W).dense() - W).norm()
        )


def test_metric_of_a_stack_is_refused():
    with pytest.raises(ValueError, match="one matrix at a time"):
        project(Kronecker(), torch.ones(2, 4, 4), left=DenseMatrix(torch.eye(4)))


@pytest.mark.parametrize("sides", ["left", "right"])
def test_metric_of_the_wrong_size_is_refused(sides):
    with pytest.raises(ValueError, match="3"):
        project(Kronecker(), torch.ones(4, 4), **{sides: DenseMatrix(torch.eye(3))})


def test_least_squares_finds_the_members_near_its_start():
    A = Monarch(blocks=2).init(8, 8)
    tensors = named_tensors(A).values()
    start = with_tensors(A, iter([t + 0.1 * torch.randn_like(t) for t in tensors]))
    found = least_squares_fit(start, A.dense())
    torch.testing.assert_close(found.dense(), A.dense(), atol=1e-9, rtol=0)


def test_least_squares_by_iteration_is_that_by_the_jacobian(monkeypatch):
    """Both ways of solving a step lead to the same error."""
    import importlib

    W, start = torch.randn(7, 7), TensorTrain(rank=2).init(7, 7)
    errors = []
    for limit in (2**22, 0):
        monkeypatch.setattr(
            importlib.import_module("matrigami.operators._projection"), "DIRECT", limit
        )
        errors.append(float((least_squares_fit(start, W, steps=60).dense() - W).norm()))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_padded_sizes_are_fitted_to_the_part_that_counts():
    """The entries outside the matrix are free: better than zeros outside."""
    W = torch.randn(7, 7)
    A = project(Kronecker(), W)
    padded = torch.nn.functional.pad(W, (0, 1, 0, 1))
    naive = project(Kronecker(), padded).dense()[:7, :7]
    assert float((A.dense() - W).norm()) <= float((naive - W).norm()) + 1e-9
