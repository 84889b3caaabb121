"""A layer that sees no row of a batch, such as an expert without tokens, adds nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import capture, ekfac, ggn, kfac, kfoc


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(2, 4)

    def forward(self, x):
        return self.e((x[:, 0] > 0).long())


def convolution(kind):
    return lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), kind(1, 1, 3, padding=1), nn.Flatten())


EXPERTS = {
    "linear": lambda: nn.Linear(4, 4),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU()),
    "convolution": convolution(nn.Conv1d),
    "transposed": convolution(nn.ConvTranspose1d),
    "structured": lambda: mg.nn.StructuredLinear(4, 4, mg.Monarch(blocks=2)),
    "table": Table,
}


class Experts(nn.Module):
    """The first expert takes rows whose first entry is above a limit, the second all others."""

    def __init__(self, kind):
        super().__init__()
        self.e = nn.ModuleList([EXPERTS[kind](), EXPERTS[kind]()])
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.zeros_like(x)
        for expert, chosen in zip(self.e, (x[:, 0] > -9, x[:, 0] <= -9), strict=True):
            at = chosen.nonzero()[:, 0]
            h = h.index_add(0, at, expert(x[at]))
        return self.o(torch.tanh(h))


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_without_tokens(kind):
    model, loss = Experts(kind).double(), nn.CrossEntropyLoss()
    task = model, loss, (torch.randn(6, 4), torch.arange(6) % 3)
    assert_close(mg.trace(ekfac(*task)), mg.trace(ggn(*task)))
    for found in (kfac(*task), kfac(*task, reduce=True), kfoc(*task, labels=1)):
        assert not found["e.1." + next(n for n, _ in model.e[1].named_parameters())].dense().any()
        assert float(mg.trace(found)) > 0
    before = [p.detach().clone() for p in model.e[1].parameters()]
    optimizer = mg.optim.KFAC(model, loss)
    with capture(model) as moments:
        loss(model(task[2][0]), task[2][1]).backward()
    optimizer.step()
    assert len(moments) == len(list(model.e[0].parameters())) + 2
    assert all(map(torch.equal, before, model.e[1].parameters()))
