"""Influence against its definition, against leaving an example out, and where examples mix."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import CurvatureMatrix, ekfac, ggn, influence, kfac, kfoc
from matrigami.operators import DenseMatrix


def each_gradient(model, loss, x, y):
    """The gradient of every example by itself, `(n, p)`."""
    at = {name: p.detach() for name, p in model.named_parameters()}
    of_one = grad(lambda w, x, y: loss(functional_call(model, w, (x[None],)), y[None]))
    rows = vmap(of_one, (None, 0, 0))(at, x, y)
    return torch.cat([t.flatten(1) for t in rows.values()], 1)


class Tokens(nn.Module):
    """An embedding, a tied head, a grouped convolution and a structured layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.body = mg.nn.StructuredLinear(8, 8, mg.Monarch(2))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        h = self.mix(self.table(ids).mT).mT
        return self.head(torch.tanh(self.body(h))).mT


@pytest.mark.parametrize("method", [kfac, ekfac, kfoc])
def test_scores_are_the_definition(method):
    model, loss = Tokens(), nn.CrossEntropyLoss()
    ids, y = torch.randint(7, (9, 5)), torch.randint(7, (9, 5))
    ids[0, :] = 3  # one token several times
    F = method(model, loss, (ids, y))
    G = each_gradient(model, nn.CrossEntropyLoss(reduction="sum"), ids, y)
    plus = [mg.shift(B, 0.2 * mg.trace(B) / B.shape[-1]) for B in F.blocks]
    D = CurvatureMatrix(tuple(plus), F.names, F.shapes, F.order).dense()
    wanted = G[:4] @ torch.linalg.solve(D, G.mT) / y.numel()
    queries = [(ids[:1], y[:1]), (ids[1:4], y[1:4])]
    train = [(ids[:6], y[:6]), (ids[6:], y[6:])]
    assert_close(influence(F, model, loss, queries, train, damping=0.2), wanted)
    summed = nn.CrossEntropyLoss(reduction="sum")
    F = method(model, summed, (ids, y))
    assert_close(influence(F, model, summed, queries, train, damping=0.2), wanted)


def test_in_least_squares_it_is_leaving_out_but_for_the_leverage():
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    model, loss = nn.Linear(3, 1, bias=False), nn.MSELoss()
    model.weight.data = torch.linalg.lstsq(x, y).solution.mT
    scores = influence(ggn(model, loss, (x, y)), model, loss, (x, y), (x, y), damping=0.0)
    leverage = (x @ torch.linalg.solve(x.mT @ x, x.mT)).diagonal()
    slope = 2 * (model(x) - y) * x
    for t in range(12):
        rest = torch.arange(12) != t
        moved = torch.linalg.lstsq(x[rest], y[rest]).solution.mT - model.weight
        assert_close(scores[:, t], (slope @ moved.mT)[:, 0] * (1 - leverage[t]))


def test_any_matrix_over_all_parameters_does():
    model, loss = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.MSELoss()
    batch = (torch.randn(10, 4), torch.randn(10, 2))
    G = ggn(model, loss, batch)
    exact = DenseMatrix(G.dense())
    scores = influence(exact, model, loss, batch, batch)
    rows = each_gradient(model, nn.MSELoss(reduction="sum"), *batch)
    wanted = rows @ mg.solve(mg.shift(exact, 0.1 * mg.trace(exact) / 23), rows.mT) / 20
    assert_close(scores, wanted)


def test_what_does_not_fit_is_refused():
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    F = kfac(nn.Linear(4, 2), loss, (batch[0], batch[1] % 2))
    with pytest.raises(ValueError, match="Give a number from 0"):
        influence(F, model, loss, batch, batch, damping=-1.0)
    with pytest.raises(ValueError, match="the model has 15 trainable parameters"):
        influence(F, model, loss, batch, batch)

    class Centred(nn.Module):
        """Sees all examples at once."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            h = self.inner(x)
            return h - h.mean(0)

    with pytest.raises(ValueError, match="Some layer sees them together"):
        influence(DenseMatrix(torch.eye(15)), Centred(), loss, batch, batch)
