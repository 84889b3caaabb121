"""What a loss counts: masks, weights, smoothed labels, functions; and how data are read."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, fisher, ggn, hessian, kfac, kfoc
from tests.curvature import reference

W = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def classes():
    y = torch.randint(3, (8,))
    y[[2, 5]] = -100
    return y


def shares():
    return torch.rand(8, 3).softmax(1)


def signs():
    return torch.rand(8, 3).round()


CASES = {
    "ignored": (nn.CrossEntropyLoss(), classes),
    "classes": (nn.CrossEntropyLoss(weight=W), classes),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), classes),
    "both": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.2), classes),
    "summed": (nn.CrossEntropyLoss(weight=W, reduction="sum"), classes),
    "shares": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.1), shares),
    "positive": (nn.BCEWithLogitsLoss(pos_weight=W), signs),
    "outputs": (nn.BCEWithLogitsLoss(weight=W, pos_weight=W + 1), signs),
    "function": (partial(nn.functional.cross_entropy, weight=W), classes),
    "squares": (nn.functional.mse_loss, shares),
}


@pytest.mark.parametrize("name", CASES)
def test_every_term_counts_as_in_the_loss(name):
    """Of one batch and of two that are cut anywhere: the Gauss-Newton matrix of all the data."""
    model, x = network(), torch.randn(8, 4)
    loss, targets = CASES[name]
    y = targets()
    f, J = reference.jacobian(model, x)
    G = J.mT @ reference.output_hessian(loss, f, y) @ J
    for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        for found in (ggn(model, loss, data), fisher(model, loss, data)):
            assert_close(found.dense(), G, atol=1e-13, rtol=1e-10)
        E = ekfac(model, loss, data)
        assert_close(E.dense().trace(), G.trace())
    drawn = fisher(model, loss, (x, y), labels=1000).dense()
    assert float((drawn - G).norm() / G.norm()) < 0.1
    assert_close(
        mg.trace(ekfac(model, loss, (x, y), labels="empirical")),
        mg.trace(fisher(model, loss, (x, y), labels="empirical")),
    )


@pytest.mark.parametrize("method", [kfac, ekfac, kfoc])
def test_ignored_positions_are_as_if_they_were_not_there(method):
    model, x, y = network(), torch.randn(8, 4), classes()
    kept = y >= 0
    masked = method(model, nn.CrossEntropyLoss(), (x, y)).dense()
    assert_close(masked, method(model, nn.CrossEntropyLoss(), (x[kept], y[kept])).dense())
    batches = [(x, y), (x, torch.full_like(y, -100))]  # one that holds nothing at all
    assert_close(method(model, nn.CrossEntropyLoss(), batches).dense(), masked)


def test_log_probabilities_are_classes():
    model, x, y = network(), torch.randn(8, 4), classes()
    logs = nn.Sequential(*model, nn.LogSoftmax(1))
    for method in (kfac, fisher):
        scores = method(model, nn.CrossEntropyLoss(weight=W), (x, y)).dense()
        assert_close(method(logs, nn.NLLLoss(weight=W), (x, y)).dense(), scores)


def test_outputs_without_an_axis_of_their_own():
    model, x = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.randn(6, 4)
    for loss in (nn.MSELoss(), nn.BCEWithLogitsLoss()):
        y = torch.rand(6).round()
        f, J = reference.jacobian(model, x)
        G = J.mT @ reference.output_hessian(loss, f, y) @ J
        for found in (fisher(model, loss, (x, y)), ekfac(model, loss, (x, y))):
            assert_close(found.dense().trace(), G.trace())
    assert_close(kfac(model, nn.MSELoss(), (x, torch.rand(6))).dense(), 2 / 6 * J.mT @ J)


class Loader:
    """Batches that are made when they are asked for, and counted while they are held."""

    def __init__(self) -> None:
        self.made: list[torch.Tensor] = []

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(4, 4, generator=generator)
            yield x, torch.randint(3, (4,), generator=generator)


def test_a_loader_is_read_one_batch_at_a_time():
    import weakref

    class Counting(Loader):
        live = peak = 0

        def __iter__(self):
            for x, y in super().__iter__():
                self.live += 1
                self.peak = max(self.peak, self.live)
                weakref.finalize(x, self.leave)
                yield x, y
                del x

        def leave(self):
            self.live -= 1

    model, loss = network(), nn.CrossEntropyLoss()
    batches = list(Loader())
    for method in (kfac, ggn, hessian, fisher):
        data = Counting()
        found = method(model, loss, data).dense()
        assert data.peak <= 3
        assert_close(found, method(model, loss, batches).dense())
        assert_close(found, method(model, loss, iter(batches)).dense())  # can be read only once
    drawn = fisher(model, loss, Loader(), labels=2)
    assert_close(drawn.dense(), drawn.dense())


def test_attention_and_recurrence_have_second_derivatives():
    """Fused kernels have none; in single precision, where they are chosen."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.r, self.o = (
                nn.Linear(4, 4),
                nn.LSTM(4, 3, batch_first=True),
                nn.Linear(7, 3),
            )

        def forward(self, x):
            q = self.q(x)[:, None]
            mixed = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0].mean(1)
            return self.o(torch.cat([mixed, self.r(x)[0][:, -1]], 1))

    model = Attention().float()
    x, y = torch.randn(3, 4, 4).float(), torch.randint(3, (3,))
    G = ggn(model, nn.CrossEntropyLoss(), (x, y)).dense()
    assert_close(fisher(model, nn.CrossEntropyLoss(), (x, y)).dense(), G)
    H = hessian(model, nn.CrossEntropyLoss(), (x, y)).dense()
    assert_close(H, H.mT, atol=1e-5, rtol=1e-4)
    assert float((H - G).norm()) > 1e-3
