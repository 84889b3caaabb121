"""Removal against exact solutions and the methods that it is meant to beat."""

import itertools

import pytest
import torch

from matrigami.compress import (
    _removal,
    n_of_m,
    remove,
    unstructured,
    whole_columns,
    whole_rows,
)
from matrigami.compress._moments import damped, row_losses
from matrigami.compress._removal import fitted
from tests.compress.moments import layer, moment


def exact(W, mask, A, B):
    """The best weights on a support, by the normal equations of all of them."""
    H = torch.kron(torch.eye(len(W)) if B is None else B, A)
    kept = mask.flatten()
    x = torch.zeros(W.numel())
    x[kept] = torch.linalg.solve(H[kept][:, kept], (H @ W.flatten())[kept])
    return x.reshape(W.shape)


@pytest.mark.parametrize("two_sided", [True, False])
def test_the_fit_on_a_support_is_exact(two_sided):
    W, A, B = layer(5, 6)
    A, B = damped(A, 0.5), damped(B, 0.5) if two_sided else None
    mask = torch.rand(5, 6) > 0.4
    torch.testing.assert_close(fitted(W, mask, A, B), exact(W, mask, A, B), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("two_sided", [True, False])
def test_the_fit_on_whole_rows_and_columns_is_exact_however_the_moments_are(two_sided):
    """Also where an input and an output never moved; all weights stay as they are."""
    W, A, B = (t.double() for t in layer(7, 9))
    B = B if two_sided else None
    mask = (torch.arange(7) % 3 > 0)[:, None] & (torch.arange(9) % 2 > 0)
    found = fitted(W, mask, A, B)
    torch.testing.assert_close(found, exact(W, mask, A, B), rtol=1e-6, atol=1e-6)
    assert torch.equal(fitted(W, mask | True, A, B), W)
    A[3], A[:, 3] = 0, 0
    assert bool(fitted(W, mask, A, B).isfinite().all())


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("whole", [whole_rows, whole_columns])
def test_whole_rows_and_columns_go_where_it_costs_least(whole, two_sided):
    """Within a tenth of the best of all 20 choices, and better than by size."""
    W, A, B = layer(6, 6)
    B = B if two_sided else None
    found = remove(W, whole(0.5), A, B, damping=0.0)
    losses, kinds = [], []
    for kept in itertools.combinations(range(6), 3):
        one = torch.zeros(6, dtype=torch.bool)
        one[list(kept)] = True
        mask = (one[:, None] if whole is whole_rows else one).expand(6, 6)
        losses.append(float(row_losses(W - exact(W, mask, A, B), A, B).sum()))
        kinds.append(mask)
    assert any(torch.equal(found.mask, mask) for mask in kinds)
    assert found.loss * float(row_losses(W, A, B).sum()) <= 1.1 * min(losses)


@pytest.mark.parametrize("two_sided", [True, False])
def test_the_support_is_near_the_best_of_all(two_sided):
    """Of all 924 supports of 6 of 12 weights."""
    W, A, B = layer(3, 4)
    B = B if two_sided else None
    found = remove(W, unstructured(0.5), A, B, damping=0.0)
    best = float("inf")
    for kept in itertools.combinations(range(12), 6):
        mask = torch.zeros(12, dtype=torch.bool)
        mask[list(kept)] = True
        mask = mask.reshape(3, 4)
        best = min(best, float(row_losses(W - exact(W, mask, A, B), A, B).sum()))
    assert found.loss * float(row_losses(W, A, B).sum()) <= 1.3 * best


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("two_sided", [True, False])
def test_removal_beats_magnitude_with_the_best_weights(sparsity, two_sided):
    W, A, B = layer(40, 60)
    B = B if two_sided else None
    found = remove(W, unstructured(sparsity), A, B)
    mask = unstructured(sparsity)(W)
    E = W - fitted(W, mask, damped(A, 0.01), B)
    assert found.loss < 0.8 * float(row_losses(E, A, B).sum() / row_losses(W, A, B).sum())


def test_as_many_weights_go_as_were_asked():
    W, A, _ = layer(30, 40)
    for sparsity in (0.0, 0.25, 0.9):
        found = remove(W, unstructured(sparsity), A)
        assert int((~found.mask).sum()) == round(sparsity * W.numel())
        assert (found.W[~found.mask] == 0).all()
    found = remove(W, n_of_m(2, 4), A)
    assert (found.mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_nothing_removed_is_nothing_changed():
    W, A, B = layer(6, 8)
    torch.testing.assert_close(remove(W, unstructured(0.0), A, B).W, W, rtol=1e-6, atol=1e-6)


def test_without_moments_the_smallest_go():
    W = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    assert torch.equal(remove(W, unstructured(0.5)).W, torch.tensor([[3.0, 0.0], [0.0, 2.0]]))


def test_dead_inputs_cost_nothing():
    W, A, _ = layer(6, 8)
    A[2], A[:, 2] = 0, 0
    found = remove(W, unstructured(0.5), A, holdout=A)
    assert found.W.isfinite().all()
    assert found.loss < 1


def test_the_loss_is_told_on_vectors_that_were_held_out():
    W, A, _ = layer(6, 8)
    holdout = moment(8, seed=4)
    found = remove(W, unstructured(0.5), A, holdout=holdout)
    expected = row_losses(W - found.W, holdout, None).sum() / row_losses(W, holdout, None).sum()
    assert found.loss == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W, A: remove(W, unstructured(1.0), A), "below 1.0"),
        (lambda W, A: n_of_m(5, 4), "at most 4 can stay"),
        (lambda W, A: remove(W, n_of_m(2, 4), A), "not a multiple of 4"),
        (lambda W, A: remove(W, unstructured(0.5), A[:2, :2]), "A is 2x2"),
        (lambda W, A: remove(W, unstructured(0.5), A / 0), "A has NaN or infinite"),
        (lambda W, A: remove(W, unstructured(0.5), -A), "has the eigenvalue"),
        (lambda W, A: remove(W, unstructured(0.5), A, holdout=A * torch.nan), "holdout has NaN"),
        (lambda W, A: remove(W, unstructured(0.5), A, damping=()), r"damping=\(\)"),
        (lambda W, A: remove(W, unstructured(0.5), A, damping=(0.1, -1.0)), "-1.0"),
        (lambda W, A: remove(W, unstructured(0.5), A, damping=torch.nan), "damping=nan"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    W, A, _ = layer(4, 5)
    with pytest.raises(ValueError, match=message):
        call(W, A)


@pytest.mark.parametrize(("pattern", "apart"), [(unstructured(0.8), 24), (n_of_m(1, 6), 6)])
def test_no_swap_makes_a_sparse_row_better(pattern, apart):
    """All of them, with the best weights on each support."""
    W, A, _ = layer(3, 24)
    A = damped(A, 0.01)
    mask = remove(W, pattern, A, damping=0.0).mask
    for w, kept in zip(W, mask, strict=True):
        best = row_losses(w - exact(w[None], kept[None], A, None), A, None)
        for i, j in itertools.product(kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]):
            if i // apart == j // apart:
                other = kept.clone()
                other[i], other[j] = False, True
                E = w - exact(w[None], other[None], A, None)
                assert row_losses(E, A, None) > best * (1 - 1e-3)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("pattern", [unstructured(0.9), n_of_m(1, 8)])
def test_swaps_improve_the_support_of_admm(two_sided, pattern, monkeypatch):
    W, A, B = layer(30, 64)
    B = B if two_sided else None
    found = remove(W, pattern, A, B)
    monkeypatch.setattr(_removal, "swapped", lambda W, mask, A, support: mask)
    before = remove(W, pattern, A, B)
    assert found.mask.sum() == before.mask.sum()
    assert torch.equal(pattern(found.mask.double()), found.mask)
    assert found.loss < 0.996 * before.loss


def test_sparse_rows_in_a_singular_metric():
    """Nothing is inverted that has no inverse, and inputs that are dead stay out of it."""
    W, A, _ = layer(20, 40, vectors=3)
    A[5], A[:, 5] = 0, 0
    found = remove(W, unstructured(0.9), A, damping=0.0)
    assert found.W.isfinite().all()
    assert int(found.mask.sum()) == 80


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_matrix_stays_as_it_is(shape):
    found = remove(torch.zeros(shape), unstructured(0.9), torch.zeros(shape[1], shape[1]))
    assert (found.W.shape, found.loss) == (shape, 0.0)


def test_the_damping_is_chosen_on_vectors_that_were_held_out():
    W, A, _ = layer(20, 40, vectors=30)
    holdout, options = moment(40, seed=7), (1e-6, 0.1, 10.0)
    each = [remove(W, unstructured(0.5), A, damping=d, holdout=holdout) for d in options]
    found = remove(W, unstructured(0.5), A, damping=options, holdout=holdout)
    assert found.loss == min(made.loss for made in each)
    assert found.damping == options[[made.loss for made in each].index(found.loss)]
