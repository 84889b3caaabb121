"""What an example is: wherever a model keeps its examples, none is taken for another.

The trace of EKFAC is that of the block of the Gauss-Newton matrix, which knows nothing of layers.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, kfac
from matrigami.curvature._examples import Finder
from matrigami.curvature._tape import find_layers, pull_back, recording
from tests.curvature import reference

LOSS = nn.CrossEntropyLoss()


class Mixing(nn.Module):
    """Positions come before the examples, as many as there are, and see one another."""

    def __init__(self, leave: str) -> None:
        super().__init__()
        self.a, self.n, self.o, self.leave = (
            nn.Linear(4, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
            leave,
        )

    def forward(self, x):
        h = self.n(torch.tanh(self.a(x.transpose(0, 1))))  # T N d
        h = h + h.mean(0, keepdim=True) ** 2
        if self.leave == "time first":
            return self.o(h).flatten(0, 1)
        if self.leave == "flat":
            return self.o(h.transpose(0, 1).flatten(0, 1))
        return self.o(h.mean(0))


class Windows(nn.Module):
    """Windows of an example are further rows of a convolution, inner or outer."""

    def __init__(self, *, outer: bool) -> None:
        super().__init__()
        self.c, self.g, self.o, self.outer = (
            nn.Conv1d(1, 3, 2),
            nn.GroupNorm(1, 3),
            nn.Linear(3, 3),
            outer,
        )

    def forward(self, x):
        rows = (x.transpose(0, 1) if self.outer else x).flatten(0, 1)[:, None]
        h = self.g(torch.tanh(self.c(rows))).mean(-1)
        h = (
            h.unflatten(0, (-1, len(x))).transpose(0, 1)
            if self.outer
            else h.unflatten(0, (len(x), -1))
        )
        return self.o((h**2).mean(1) + h[:, 0])


class Places(nn.Module):
    """One call of a table for all examples, as GPT-2 has for positions."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(7, 4), nn.Embedding(3, 4)
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.q(self.e(x) + self.p(torch.arange(3))))
        return self.o(h + h.mean(1, keepdim=True) ** 2).flatten(0, 1)


class Pairs(nn.Module):
    """Each example sees its twin, in the other half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.o(h + h.roll(len(h) // 2, 0) ** 2)


class Centred(nn.Module):
    """One layer for the examples, and for the mean of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x) - self.a(x).mean(0) - self.a(x.mean(0, keepdim=True))))


class Tied(nn.Module):
    """A table that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.m, self.l = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.l.weight = self.e.weight

    def forward(self, x):
        h = torch.tanh(self.m(self.e(x)))
        return self.l(h + h.mean(1, keepdim=True)).flatten(0, 1)


class Repeated(nn.Module):
    """A layer at three places, once by keyword, and bags of folded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.bag = (
            nn.Linear(4, 4),
            nn.Linear(4, 5),
            nn.EmbeddingBag(5, 4, mode="sum"),
        )

    def forward(self, x):
        rows = torch.tanh(self.bag(x.flatten(0, 1)).unflatten(0, (len(x), -1)))
        return self.l(self.e(input=torch.tanh(self.e(self.e(rows).sum(1)))))


def batch_statistics():
    """All examples see one another: no row is an example."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(4, 4, bias=False), norm, nn.Tanh(), nn.Linear(4, 3))


def tokens(*shape):
    return lambda: torch.randint(5, shape)


CASES = {
    "time first": (lambda: Mixing("mean"), lambda: torch.randn(4, 4, 4), 4),
    "flattened, time first": (lambda: Mixing("time first"), lambda: torch.randn(4, 4, 4), 16),
    "flattened": (lambda: Mixing("flat"), lambda: torch.randn(3, 4, 4), 12),
    "inner windows": (lambda: Windows(outer=False), lambda: torch.randn(3, 2, 5), 3),
    "outer windows": (lambda: Windows(outer=True), lambda: torch.randn(3, 2, 5), 3),
    "places": (Places, tokens(2, 3), 6),
    "tied": (Tied, tokens(3, 2), 6),
    "repeated": (Repeated, tokens(3, 2, 3), 3),
    "pairs": (Pairs, lambda: torch.randn(4, 3), 4),
    "more pairs": (Pairs, lambda: torch.randn(24, 3), 24),
    "centred": (Centred, lambda: torch.randn(6, 4), 6),
    "statistics": (batch_statistics, lambda: torch.randn(5, 4), 5),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CASES)
def test_the_trace_of_ekfac_is_that_of_the_block(name):
    made, inputs, rows = CASES[name]
    model, x, y = made(), inputs(), torch.randint(3, (rows,))
    G = reference.gauss_newton(model, LOSS, [(x, y)])
    E = ekfac(model, LOSS, (x, y), joint=False)
    for names, block in zip(E.names, E.blocks, strict=True):
        places = torch.cat([reference.places(model, [n]).flatten() for n in names])
        assert_close(mg.trace(block).sum(), G.diagonal()[places].sum())
    drawn = ekfac(model, LOSS, (x, y), joint=False, labels=3000)
    assert float((mg.trace(drawn) / G.trace() - 1).abs()) < 0.06


def test_the_layout_of_the_outputs_does_not_matter():
    flat, x, y = Mixing("flat"), torch.randn(3, 4, 4), torch.randint(3, (3, 4))
    apart = nn.Sequential(flat, nn.Unflatten(0, (3, 4)))
    apart.forward = lambda x: flat(x).unflatten(0, (3, 4)).transpose(1, 2)
    for method in (kfac, ekfac):
        once = method(flat, LOSS, (x, y.flatten())).dense()
        assert_close(method(apart, LOSS, (x, y)).dense(), once, atol=1e-13, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CASES)
def test_a_column_that_is_needed_anyway_tells_as_much_as_noise(name):
    made, inputs, _ = CASES[name]
    model, x = made(), inputs()
    with recording(find_layers(model, joint=False)) as calls:
        outputs = model(x)
    found = Finder(alone=True).find(x, outputs, calls)
    assert all(call.g is None for call in calls)
    column = torch.randn(1, *outputs.shape)
    assert Finder(alone=True).find(x, outputs, calls, column) == found
    seen = [call.g for call in calls]
    pull_back(outputs, calls, column)
    assert_close(seen, [call.g for call in calls])
