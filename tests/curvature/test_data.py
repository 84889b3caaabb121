"""What must not matter (how data are split, repeated, scaled), and what labels mean."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import damped, ekfac, fisher, kfac, kfoc
from tests.curvature import reference

METHODS = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def drawn(loss, n):
    x = torch.randn(n, 4)
    if loss is nn.CrossEntropyLoss:
        return x, torch.randint(3, (n,))
    return x, torch.rand(n, 3)


def update(F, model, loss, batch, damping=1e-6):
    """The preconditioned gradient of one batch."""
    gradients = torch.autograd.grad(loss(model(batch[0]), batch[1]), tuple(model.parameters()))
    return mg.solve(F, F.vector(dict(zip(F.order, gradients, strict=True))), damping)


@methods
@losses
@pytest.mark.parametrize("labels", ["exact", "empirical"])
def test_a_batch_four_times_over_changes_nothing(method, loss, labels):
    model, (x, y), mean = network(), drawn(loss, 6), loss()
    once = method(model, mean, (x, y), labels=labels)
    batch = (x.repeat(4, 1), torch.cat([y] * 4))
    often = method(model, mean, batch, labels=labels)
    assert_close(often.dense(), once.dense(), atol=1e-12, rtol=1e-8)
    a, b = (update(F, model, mean, d) for F, d in ((once, (x, y)), (often, batch)))
    assert float((a - b).norm() / a.norm()) < 1e-6


@methods
@losses
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_uneven_batches_and_order_do_not_matter(method, loss, reduction):
    model, (x, y), loss = network(), drawn(loss, 9), loss(reduction=reduction)
    whole = method(model, loss, (x, y)).dense()
    for sizes in ([5, 4], [1, 6, 2]):
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        assert_close(method(model, loss, batches).dense(), whole, atol=1e-11, rtol=1e-8)
    order = torch.randperm(9)
    assert_close(method(model, loss, (x[order], y[order])).dense(), whole, atol=1e-11, rtol=1e-8)


@methods
@losses
def test_a_sum_is_a_mean_times_its_terms(method, loss):
    model, (x, y) = network(), drawn(loss, 7)
    terms = 7 if loss is nn.CrossEntropyLoss else 21
    for labels in ("exact", "empirical", 3):
        mean, total = (
            method(model, loss(reduction=r), (x, y), labels=labels) for r in ("mean", "sum")
        )
        assert_close(total.dense(), terms * mean.dense(), atol=1e-11, rtol=1e-8)
        step = mg.solve(damped(total, 1e-3 * terms), torch.ones(total.shape[0]))
        assert_close(terms * step, mg.solve(damped(mean, 1e-3), torch.ones(total.shape[0])))


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_labels_are_those_of_the_data(loss, reduction):
    model, loss_value = network(), loss(reduction=reduction)
    batches = [drawn(loss, n) for n in (5, 2)]
    full = reference.empirical(model, loss_value, batches)
    sums = reference.pair_sums(model, loss_value, batches, labels="empirical")
    for names, found in sums.items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-10)
    one = batches[0][0][:1], batches[0][1][:1]
    exact = reference.empirical(model, loss_value, [one])
    for method in METHODS.values():
        F = method(model, loss_value, one, labels="empirical")
        assert_close(F.dense(), reference.assembled(exact, model, F), atol=1e-12, rtol=1e-9)


@losses
def test_drawn_labels_converge(loss):
    model, batch = network(), drawn(loss, 4)
    exact = kfac(model, loss(), batch).dense()
    errors = [
        reference.distance(kfac(model, loss(), batch, labels=n, seed=1).dense(), exact)
        for n in (4, 4096)
    ]
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 5  # 32 is expected


@methods
def test_drawn_labels_are_repeated_by_their_seed(method):
    model, batch = network(), drawn(nn.CrossEntropyLoss, 8)
    first, again, other = (
        method(model, nn.CrossEntropyLoss(), batch, labels=1, seed=s).dense() for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert reference.distance(other, first) > 0.01


def test_drawn_labels_are_unbiased_over_seeds():
    model, batch, loss = network(), drawn(nn.CrossEntropyLoss, 3), nn.CrossEntropyLoss()
    exact = reference.gauss_newton(model, loss, [batch])
    traces = torch.stack(
        [mg.trace(ekfac(model, loss, batch, labels=1, seed=s)) for s in range(100)]
    )
    assert abs(traces.mean() - exact.trace()) < 4 * traces.std() / 10


class Words(nn.Module):
    """A model of sequences: classes in axis 1."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh()).mT


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@losses
def test_a_label_at_every_position(loss, reduction):
    """Cross entropy of `(N, C, S)`, and the other losses with more axes."""
    model, kind = Words(), loss
    loss = loss(reduction=reduction)
    y = (
        (lambda n: torch.randint(3, (n, 6)))
        if kind is nn.CrossEntropyLoss
        else (lambda n: torch.rand(n, 3, 6))
    )
    batches = [(torch.randn(n, 6, 4), y(n)) for n in (3, 2)]
    full = reference.gauss_newton(model, loss, batches)
    F = ekfac(model, loss, batches)
    assert_close(mg.trace(F), full.trace(), rtol=1e-10, atol=0)
    for names, found in reference.pair_sums(model, loss, batches).items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)
    B, A = reference.factors(model, loss, batches, model.first)
    found = kfac(model, loss, batches, joint=False)["first.weight"].dense()[0]
    assert_close(found, torch.kron(B, A), atol=1e-12, rtol=1e-9)
    assert_close(fisher(model, loss, batches).dense(), full, atol=1e-12, rtol=1e-9)


@losses
def test_the_factors_are_the_moments_of_the_definition(loss):
    """Of a net where K-FAC is not exact: `B` from the derivative by a layer's output."""
    model, batches = network(), [drawn(loss, n) for n in (5, 3)]
    F = kfac(model, loss(), batches, joint=False)
    for name in ("0", "2"):
        B, A = reference.factors(model, loss(), batches, model[int(name)])
        assert_close(F[f"{name}.weight"].dense()[0], torch.kron(B, A), atol=1e-13, rtol=1e-9)
        assert_close(F[f"{name}.bias"].dense()[0], B, atol=1e-13, rtol=1e-9)


def test_a_loader_is_read_like_a_list():
    x, y = drawn(nn.CrossEntropyLoss, 9)
    model, loss = network(), nn.CrossEntropyLoss()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    batches = (tuple(batch) for batch in loader)
    assert_close(kfac(model, loss, batches).dense(), kfac(model, loss, (x, y)).dense())
    assert_close(kfac(model, loss, loader).dense(), kfac(model, loss, (x, y)).dense())


def test_one_vector_without_a_batch_axis_of_more():
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    x, y = drawn(nn.CrossEntropyLoss, 1)
    full = reference.gauss_newton(model, loss, [(x, y)])
    order = reference.places(model, ("weight", "bias"))[0]
    assert_close(kfac(model, loss, (x, y))["weight"].dense()[0], full[order][:, order])
