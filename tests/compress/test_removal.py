"""Removal against exact solutions and the methods that it is meant to beat."""

import itertools

import pytest
import torch

from matrigami.compress import n_of_m, remove, unstructured
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
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    W, A, _ = layer(4, 5)
    with pytest.raises(ValueError, match=message):
        call(W, A)
