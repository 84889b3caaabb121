"""Projection: bad targets, metrics, and the least-squares fit behind what has no closed form."""

from itertools import pairwise

import pytest
import torch

from matrigami import DenseMatrix, DiagonalMatrix, LinearOperator, Structure, project
from matrigami.operators import (
    Metric,
    contractions,
    least_squares_fit,
    named_tensors,
    truncated_svd,
    with_tensors,
)
from matrigami.operators._alternating import alternate
from matrigami.operators._metric import Target, whitened, whitening
from matrigami.structures import (
    EXAMPLES,
    BlockTensorTrain,
    Dense,
    Kronecker,
    LowRank,
    Monarch,
    TensorTrain,
)

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


@pytest.mark.usefixtures("unchecked")
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


@pytest.mark.parametrize("recipe", [Kronecker(), LowRank(rank=2), Monarch(blocks=2)], ids=str)
def test_stacks_are_projected_one_by_one(recipe):
    """With one metric for all, or one for each."""
    W, left = torch.randn(2, 2, 8, 6), positive_definite(8)
    right = DenseMatrix(torch.stack([positive_definite(6).dense() for _ in range(2)]))
    A = project(recipe, W, left=left, right=right)
    assert tuple(A.shape) == (2, 2, 8, 6)
    for i in range(2):
        metric = Metric(left, right[i])
        one = project(recipe, W[1, i], left=left, right=right[i])
        both = error_in(metric, A[1, i], W[1, i]), error_in(metric, one, W[1, i])
        assert both[0] == pytest.approx(both[1], rel=1e-6)


def aligned(recipe, size: int, *, rows: bool) -> torch.Tensor:
    """A metric that is block diagonal in the blocks of the outermost tensor."""
    parts = contractions(project(recipe, torch.randn(8, 6)))
    outer = next(part for part in parts if (part.after if rows else part.before) is None)
    matrix = outer.matrix.T if rows else outer.matrix
    at = matrix.split_inputs(torch.arange(size, dtype=torch.float64)[:, None])[..., 0].long()
    M = torch.zeros(size, size)
    for block in at.flatten(0, 1):
        F = torch.randn(len(block), len(block))
        M[block[:, None], block] = F @ F.mT + 0.1 * torch.eye(len(block))
    return M


@pytest.mark.parametrize(
    "recipe",
    [Monarch(blocks=2), Monarch(blocks=2, interleaved=False), BlockTensorTrain(rank=1, cores=2)],
    ids=str,
)
def test_block_diagonal_metrics_have_a_closed_form(recipe):
    """No search from other starts, however long, comes nearer."""
    W = torch.randn(8, 6)
    left, right = aligned(recipe, 8, rows=True), aligned(recipe, 6, rows=False)
    metric = Metric(DenseMatrix(left), DenseMatrix(right))
    A = project(recipe, W, left=left, right=right)
    start = project(recipe, W)
    closed = whitened(lambda M: project(recipe, M), W, start, metric)
    assert error_in(metric, A, W) == pytest.approx(error_in(metric, closed, W), rel=1e-9)
    for seed in range(5):
        other = recipe.init(8, 6, generator=torch.Generator().manual_seed(seed), dtype=W.dtype)
        found = alternate(other, Target(W, metric), tol=1e-9, steps=300)
        assert error_in(metric, found, W) >= error_in(metric, A, W) * (1 - 1e-6)


@pytest.mark.parametrize(
    "recipe",
    [
        Kronecker(),
        Monarch(blocks=4),
        pytest.param(BlockTensorTrain(rank=1, cores=3), marks=pytest.mark.slow),
        TensorTrain(rank=2),
    ],
    ids=str,
)
def test_the_search_ends_where_the_error_is_flat(recipe):
    W, metric = torch.randn(8, 8), Metric(positive_definite(8), positive_definite(8))
    A = project(recipe, W, left=metric.left, right=metric.right, tol=1e-10, steps=2000)
    tensors = [t.clone().requires_grad_() for t in named_tensors(A).values()]
    E = W - with_tensors(A, iter(tensors)).dense()
    error = (E * metric.apply(E)).sum()
    slopes = torch.autograd.grad(error, tensors)
    error = float(error.detach())
    assert (
        max(float((t.detach() * s).abs().max()) for t, s in zip(tensors, slopes, strict=True))
        < 1e-3 * error
    )


@pytest.mark.parametrize("recipe", [Monarch(blocks=2), LowRank(rank=2), Kronecker()], ids=str)
@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_singular_metrics_have_a_finite_answer(recipe, vectors):
    X = torch.randn(vectors, 6)
    A = project(recipe, torch.randn(8, 6), right=X.mT @ X)
    assert A.dense().isfinite().all()


def test_what_a_singular_metric_feels_is_met():
    """Three inputs, rank three: the outputs on them are exact."""
    X, W = torch.randn(3, 6), torch.randn(8, 6)
    A = project(LowRank(rank=3), W, right=X.mT @ X)
    torch.testing.assert_close(A @ X.mT, W @ X.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    W, M = torch.randn(8, 6).to(dtype), positive_definite(6)
    for recipe in (Kronecker(), LowRank(rank=2)):
        A = project(recipe, W, right=M)
        assert A.dtype == dtype
        single = project(recipe, W.float(), right=M)
        torch.testing.assert_close(A.dense().float(), single.dense(), rtol=0.1, atol=0.1)


def test_complex_metrics_are_hermitian():
    W = torch.randn(8, 6, dtype=torch.complex128)
    F = torch.randn(6, 6, dtype=torch.complex128)
    M = DenseMatrix(F @ F.mH)
    for recipe in (Kronecker(), Monarch(blocks=2), LowRank(rank=2)):
        plain, steered = project(recipe, W), project(recipe, W, right=M)
        errors = [Metric(right=M).square(W - A.dense()) for A in (plain, steered)]
        assert errors[1] < errors[0]


def test_progress_is_told_and_the_error_never_grows():
    told = []
    M = positive_definite(8)
    project(Kronecker(), torch.randn(8, 8), right=M, progress=lambda *now: told.append(now))
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    assert all(b <= a for (_, a), (_, b) in pairwise(told))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1}, "tol must be"),
        ({"steps": 0}, "steps at least 1"),
        ({"right": -torch.eye(6)}, "eigenvalue -1"),
        ({"right": torch.full((6, 6), torch.nan)}, "NaN"),
    ],
)
def test_options_and_metrics_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        project(Kronecker(), torch.randn(8, 6), **options)


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


@pytest.mark.parametrize("rank", [6, 4])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_a_metric_is_whitened_and_taken_back_on_what_it_feels(rank, kind):
    X = torch.randn(6, rank, dtype=kind)
    A = X @ X.mH
    F, inverse = (M.dense() for M in whitening(DenseMatrix(A)))
    torch.testing.assert_close(F.mH @ F, A)
    torch.testing.assert_close(inverse @ F @ X, X)
