"""Several trusts in the gradients, judged by the outputs of the whole model."""

import copy

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import Grid, _trials as trials, compress_, evaluate, structure_
from matrigami.compress._tail import Tail


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def data():
    return list((torch.randn(64, 12) * torch.linspace(0.2, 2, 12)).split(16))


def test_the_trust_is_that_with_which_the_model_diverges_least(model, data, monkeypatch):
    every = trials.TRUSTS
    found = {}
    for trusts in (every, *((trust,) for trust in every)):
        monkeypatch.setattr(trials, "TRUSTS", trusts)
        made = copy.deepcopy(model)
        report = structure_(made, data, LowRank(rank=2), targets="2", two_sided=True)
        found[trusts] = evaluate(made, model, data[3:]).kl, report.layers[0].note
    alone = [found[trust,] for trust in every]
    assert found[every] == min(alone)
    assert len({kl for kl, _ in alone}) == len(every)


def test_layers_that_are_rounded_are_not_tried(model, data):
    ways = {"0": Grid(3, None), "2": LowRank(rank=2)}
    report = compress_(model, data, ways, two_sided=True)
    notes = {layer.name: layer.note for layer in report.layers}
    assert "moments" in notes["2"] or "inputs" in notes["2"]
    assert "identity" not in notes["0"]


def test_asking_for_a_damping_asks_for_no_trial(model, data):
    report = structure_(model, data, LowRank(rank=2), two_sided=True, damping=0.1)
    assert [layer.note for layer in report.layers] == ["", ""]


def test_an_overflowing_model_is_infinitely_far(model, data):
    far = trials.divergence(lambda: model(data[3]))
    assert far() == 0.0
    with torch.no_grad():
        model[4].weight.fill_(float("inf"))
    assert far() == float("inf")


class Counted(nn.Linear):
    """A block that tells when it is run."""

    runs = ()

    def forward(self, x):
        self.runs.append(self)
        return super().forward(x).relu_()


class Blocks(nn.Module):
    """A chain; what the first block returns may be used once more behind it."""

    def __init__(self, *, skip):
        super().__init__()
        self.blocks = nn.ModuleList([Counted(6, 6) for _ in range(4)])
        self.head, self.skip, self.runs = nn.Linear(6, 5), skip, []
        for block in self.blocks:
            block.runs = self.runs

    def forward(self, x):
        every = [x]
        for block in self.blocks:
            every.append(block(every[-1]))
        return self.head(every[-1] + every[1] if self.skip else every[-1])


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_a_trial_runs_from_its_block_on(skip):
    model, x = Blocks(skip=skip), torch.randn(3, 6)
    names = [f"blocks.{i}" for i in range(4)]
    tail = Tail(model, names, x)
    for i, name in enumerate(names):
        tail.advance([name])
        model.blocks[i].weight.mul_(2)
        expected = model(x)
        model.runs.clear()
        assert torch.equal(tail(), expected)
        assert model.runs == list(model.blocks)[0 if skip else i :]
