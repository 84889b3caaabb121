"""Rounding against brute force, closed forms and its own identities."""

import math

import pytest
import torch

from matrigami.compress import Grid, LatticeMatrix, QuantizedMatrix, round_ldl, round_waterfill
from matrigami.compress._moments import damped, row_losses, unit_lower
from matrigami.compress._rounding import Problem, by_columns, by_tiles
from matrigami.operators import DenseMatrix
from matrigami.testing import check_operator
from matrigami.testing._question_laws import costs
from matrigami.testing._suite import OPERATOR_LAWS
from matrigami.testing._torch_laws import vectorised_map
from tests.compress.moments import layer, moment

SIZES = [(5, 7), (16, 16), (37, 50), (1, 33), (20, 1)]


def brute_force(problem, K, L):
    """One entry after the other, each by the whole formula."""
    E, codes = torch.zeros_like(problem.W), torch.zeros_like(problem.W)
    m, n = problem.W.shape
    for i in reversed(range(m)):
        for j in reversed(range(n)):
            target = problem.W[i, j] + (K.mT @ E @ L)[i, j]
            code = (target / problem.steps[i, j]).round().clamp(problem.least, -1 - problem.least)
            codes[i, j] = code
            E[i, j] = problem.W[i, j] - code * problem.steps[i, j]
    return codes


def test_scales_of_small_matrices_in_single_precision_stay_finite():
    """Of a stack some are fitted to the last digit long before others."""
    parts = zip(*[layer(4, 6, seed=seed) for seed in range(50)], strict=True)
    W, A, B = (torch.stack(t).float() for t in parts)
    found = round_ldl(W, A, 1e-6 * B)
    assert bool(found.value.dense().isfinite().all())
    assert bool((found.loss <= found.nearest).all())


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_two_sided_codes_are_those_of_the_formula(m, n):
    W, A, B = layer(m, n)
    K, L = unit_lower(damped(B, 0.01), "B")[0], unit_lower(damped(A, 0.01), "A")[0]
    problem = Problem(W, torch.full_like(W, 0.5), None, -8)
    assert torch.equal(by_tiles(problem, K, L), brute_force(problem, K, L))


@pytest.mark.parametrize(("m", "n"), [*SIZES, (3, 200)])
def test_one_sided_codes_are_the_two_sided_ones_without_the_second_moment(m, n):
    W, A, _ = layer(m, n)
    L = unit_lower(damped(A, 0.01), "A")[0]
    problem = Problem(W, torch.full_like(W, 0.5), None, -8)
    assert torch.equal(by_columns(problem, L), by_tiles(problem, torch.eye(m), L))


def test_the_loss_is_the_sum_of_squared_rounding_errors_weighted_by_the_pivots():
    """`tr(B E A E.T) = sum C_i D_j r_ij^2`, without clipping |r| is half a step at most."""
    W, A, B = layer(12, 20)
    (K, C), (L, D) = unit_lower(B, "B"), unit_lower(A, "A")
    step = 0.25
    codes = by_tiles(Problem(W, torch.full_like(W, step), None, -(2**20)), K, L)
    E = W - step * codes
    r = K.mT @ E @ L
    assert r.abs().max() <= step / 2 + 1e-12
    weighted = (C[:, None] * D * r.square()).sum()
    torch.testing.assert_close(row_losses(E, A, B).sum(), weighted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
def test_feedback_beats_rounding_to_nearest(symmetric, two_sided):
    W, A, B = layer(24, 40)
    grid = Grid(3, 8, symmetric=symmetric, fitted=False)
    found = round_ldl(W, A, B if two_sided else None, grid=grid)
    nearest = grid.round(W)
    judge = B if two_sided else None
    whole = row_losses(W, A, judge).sum()
    torch.testing.assert_close(
        found.loss, row_losses(W - found.value.dense(), A, judge).sum() / whole
    )
    torch.testing.assert_close(
        found.nearest, row_losses(W - nearest.dense(), A, judge).sum() / whole
    )
    assert found.loss < 0.8 * found.nearest


def test_both_moments_beat_one_where_both_count():
    W, A, B = layer(32, 32)
    one, two = (round_ldl(W, A, b, grid=Grid(2, 16, False, False)) for b in (None, B))
    losses = [row_losses(W - r.value.dense(), A, B).sum() for r in (one, two)]
    assert losses[1] < 0.8 * losses[0]


def test_ranges_are_fitted_to_the_columns_that_count():
    """An outlier of a column without activity is cut off, and what counts is rounded finely."""
    W = torch.randn(6, 32).clamp(-1, 1)
    W[:, 0] = 20.0
    activity = torch.ones(32)
    activity[0] = 1e-6
    alike, weighted = (Grid(4, None).round(W, a).dense() for a in (None, activity))
    errors = [((W - V).square() * activity).sum() for V in (alike, weighted)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("n", [1, 128, 129, 300])
def test_losses_of_rows_by_blocks_are_the_whole_product(n):
    W, A, _ = layer(3, n)
    torch.testing.assert_close(row_losses(W, A, None), (W @ A * W).sum(-1))
    torch.testing.assert_close(row_losses(W, A, torch.eye(3)), (W @ A * W).sum(-1))


def test_refitted_scales_are_stationary():
    """No other scales are better for the codes: the gradient in each vanishes."""
    W, A, _ = layer(6, 16)
    found = round_ldl(W, A, grid=Grid(4, 8), damping=1e-9).value
    steps = found.scale.clone().requires_grad_()
    value = QuantizedMatrix(found.codes, steps, found.zero, found.bits, found.group)
    row_losses(W - value.dense(), damped(A, 1e-9), None).sum().backward()
    assert steps.grad is not None
    assert steps.grad.abs().max() < 1e-6 * row_losses(W, A, None).sum()


def test_no_row_is_worse_than_rounding_to_nearest():
    W, A, _ = layer(40, 24)
    holdout = moment(24, 30, seed=5)
    grid = Grid(4, None, fitted=False)
    found = round_ldl(W, A, grid=grid, holdout=holdout, damping=1e-4)
    nearest = grid.round(W)
    E, E0 = W - found.value.dense(), W - nearest.dense()
    assert (row_losses(E, holdout, None) <= row_losses(E0, holdout, None) * (1 + 1e-9)).all()


def test_the_damping_is_the_best_on_vectors_that_were_held_out():
    W, A, _ = layer(16, 24, vectors=30)
    holdout = moment(24, 400, seed=9)
    options = (1e-6, 1e-2, 1.0)
    alone = [float(round_ldl(W, A, damping=d, holdout=holdout).loss) for d in options]
    found = round_ldl(W, A, damping=options, holdout=holdout)
    assert float(found.loss) <= min(alone) * (1 + 1e-9)
    assert found.damping in options


def test_dead_inputs_are_rounded_to_nearest():
    W, A, _ = layer(8, 12)
    A[3], A[:, 3] = 0, 0
    found = round_ldl(W, A, grid=Grid(4, None), refit=False).value
    assert torch.equal(found.codes[:, 3], Grid(4, None).round(W).codes[:, 3])


def test_stacks_are_rounded_one_by_one():
    W, A, B = (
        torch.stack(parts) for parts in zip(*(layer(9, 20, seed=s) for s in (1, 2)), strict=True)
    )
    for b in (None, B):
        both = round_ldl(W, A, b, grid=Grid(3, 8))
        for i in range(2):
            one = round_ldl(W[i], A[i], None if b is None else b[i], grid=Grid(3, 8))
            assert torch.equal(both.value.codes[i], one.value.codes)
            torch.testing.assert_close(both.loss[i], one.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_is_kept(dtype):
    W, A, _ = layer(8, 16)
    value = round_ldl(W.to(dtype), A.float(), grid=Grid(4, 8, symmetric=False)).value
    assert value.dense().dtype == dtype


def test_a_full_grid_gives_members_back():
    grid = Grid(4, 4, symmetric=False)
    W = grid.round(layer(6, 10)[0]).dense()
    torch.testing.assert_close(grid.round(W).dense(), W)


def test_a_fitted_grid_is_no_worse():
    W = torch.randn(6, 64).pow(3)
    errors = [
        (W - Grid(3, 32, fitted=fitted).round(W).dense()).square().sum() for fitted in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("two_sided", [pytest.param(True, marks=pytest.mark.slow), False])
def test_waterfilling_meets_its_entropy_and_beats_equal_steps(two_sided):
    W, A, B = layer(256, 96)
    B = B if two_sided else None
    found = round_waterfill(W, A, B, bits=2.0, damping=(0.01, 0.1))
    assert 1.9 < found.entropy <= 2.0
    equal = round_ldl(W, A, B, grid=Grid(2, None, symmetric=False))
    assert found.loss < 0.5 * equal.loss


def test_waterfilling_of_white_inputs_is_the_uniform_quantiser():
    """Rate and distortion of fine steps: `D = 2^(-2 h) 2 pi e / 12` (Gish and Pierce 1968)."""
    W = torch.randn(500, 100)
    found = round_waterfill(W, torch.eye(100), bits=4.0, damping=1e-4)
    plain = found.entropy - 8 * (500 + 100) / (500 * 100)  # without a byte for each row and column
    ideal = 2 ** (-2 * plain) * 2 * math.pi * math.e / 12
    assert found.loss == pytest.approx(ideal, rel=0.03)


def test_quantised_matrices_obey_the_laws():
    W, A, _ = layer(6, 8)
    left_out = {costs, vectorised_map}  # bytes are those of packed codes; a stack may share codes
    laws = [law for law in OPERATOR_LAWS if law not in left_out]
    check_operator(round_ldl(W, A, grid=Grid(3, 4, symmetric=False)).value, laws)
    lattice = round_waterfill(W, A, bits=2.0).value
    torch.testing.assert_close(lattice @ torch.eye(8), lattice.dense())
    torch.testing.assert_close(lattice.T.dense(), lattice.dense().mT)


def test_bytes_are_those_of_the_codes_and_their_scales():
    from matrigami import cost

    value = Grid(4, 8).round(torch.randn(6, 16, dtype=torch.float32))
    assert cost(value).bytes == 6 * 16 // 2 + 12 * 4
    assert isinstance(round_waterfill(*layer(6, 8)[:2], bits=1.0).value, LatticeMatrix)


def test_operators_are_taken_as_moments():
    W, A, B = layer(6, 8)
    one, two = round_ldl(W, A, B), round_ldl(W, DenseMatrix(A), DenseMatrix(B))
    assert torch.equal(one.value.codes, two.value.codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W, A: round_ldl(W, A[:3, :3]), "A is 3x3, and W 4x5"),
        (lambda W, A: round_ldl(W, A, A), "B is 5x5, and W 4x5"),
        (lambda W, A: round_ldl(W, 2 - torch.eye(5)), "has the eigenvalue -1"),
        (lambda W, A: round_ldl(W, -A), "has the eigenvalue"),
        (lambda W, A: round_ldl(W, A.tril()), "does not equal its adjoint"),
        (lambda W, A: round_ldl(W, A, holdout=2 - torch.eye(5)), "holdout has the eigenvalue"),
        (lambda W, A: round_ldl(W * torch.nan, A), "NaN or infinite"),
        (lambda W, A: round_ldl(W, A * torch.nan), "A has NaN or infinite"),
        (lambda W, A: Grid(1), "2 to 8"),
        (lambda W, A: Grid(4, 0), "at least one"),
        (lambda W, A: round_waterfill(W, A, bits=0), "above 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    W, A, _ = layer(4, 5)
    with pytest.raises(ValueError, match=message) as caught:
        call(W, A)
    assert len(str(caught.value).splitlines()) <= 3
