"""The inputs of layers, block by block: order, prefix, what is run, and how often."""

import copy

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import Grid, quantize_, set_weight, weight
from matrigami.compress._calibration import block_by_block, observed
from matrigami.compress._moments import Seen, Sums, paired
from matrigami.compress._outcome import aim
from matrigami.compress._running import Once
from matrigami.nn import StructuredLinear, chosen, swap
from tests.compress.test_models import Block, Branches, Chain, batches, sequence


def inputs_of(model, name, data):
    """What a layer is given by the model as it is now."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


@pytest.mark.parametrize("make", [Chain, Branches, sequence])
def test_every_layer_is_seen_behind_its_compressed_prefix(make):
    """Compressed by doubling: the moments are those of the model as it is at that time."""
    model = make()
    data = batches()
    layers = chosen(model, "*", ignore="never" if isinstance(model, Branches) else ())
    checked = []

    def compress(seen):
        for name, what in seen.items():
            x = inputs_of(model, name, data[:3])
            torch.testing.assert_close(what.moments()[0], x.mT @ x / len(x))
            checked.append(name)
        for name in seen:
            set_weight(layers[name], 2 * weight(layers[name]))

    block_by_block(model, layers, data, compress)
    assert sorted(checked) == sorted(layers)


class Shared(nn.Module):
    """Three layers that are given the same memory, the last one after it was written into."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(7, 4) for _ in range(3))

    def forward(self, x):
        x = x.clone()
        return self.q(x) + self.k(x) + self.v(x.mul_(2))


def test_inputs_that_layers_share_are_multiplied_once():
    """And again where they were written into, and in every batch, were it the same one."""
    x = torch.randn(16, 7)
    model, made = Shared(), []
    found = observed(model, chosen(model, "*"), [x] * 4)
    for name, scale in (("q", 1), ("k", 1), ("v", 4)):
        assert (found[name].rows, found[name].held) == (48, 16)
        for moment in found[name].moments():
            torch.testing.assert_close(moment, (scale * x.mT @ x / 16).double())
    once = Once(lambda t, _: made.append(t.clone()))
    once(x, None), once(x.view(16, 7), None)
    x.mul_(2)
    once(x, None), once(x[:8], None)
    assert len(made) == 3


def test_the_drift_is_from_the_given_model_to_the_compressed_prefix():
    """Of the products of inputs `E[(z - x) x.T]`; none where nothing is compressed yet."""
    model, data = Chain(), batches()
    given, layers = copy.deepcopy(model), chosen(model, "*")
    norms = []

    def compress(seen):
        for name, what in seen.items():
            if "blocks" in name:
                z, x = (inputs_of(m, name, data[:3]) for m in (given, model))
                torch.testing.assert_close(what.drift, (z - x).mT @ x)
                norms.append(float(what.drift.norm()))
            else:
                assert what.drift is None  # outside of the chain it is not known
        for name in seen:
            if name != "stem":
                set_weight(layers[name], 1.5 * weight(layers[name]))

    block_by_block(model, layers, data, compress)
    assert norms[:2] == [0, 0]
    assert min(norms[2:]) > 0


class Again(Block):
    """A block that calls its layers three times."""

    def forward(self, x, scale=1.0):
        for _ in range(3):
            x = super().forward(x, scale)[0]
        return (x,)


def test_calls_of_a_layer_are_compared_one_by_one_with_those_of_the_given_model():
    """At 8 bits next to nothing changes; each was compared with the last call of the block."""
    model, data = Chain(), batches()
    for block in model.blocks:
        block.__class__ = Again
    given, nearest = model(data[0]), copy.deepcopy(model)
    quantize_(model, data, Grid(bits=8), targets="blocks.*")
    for name in chosen(nearest, "blocks.*"):
        layer = nearest.get_submodule(name)
        set_weight(layer, Grid(bits=8).round(weight(layer)).dense())
    assert (model(data[0]) - given).norm() < (nearest(data[0]) - given).norm()


class Experts(nn.Module):
    """Each expert takes the eight vectors that it likes best, in the order in which it does."""

    def __init__(self, width):
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x, scale=1.0):
        likes, out = self.router(x).softmax(-1), x
        for i, expert in enumerate(self.experts):
            own = likes[:, i].topk(8).indices
            out = out.index_add(0, own, scale * expert(x[own]))
        return (out,)


def test_vectors_are_paired_with_those_of_the_same_token():
    z = torch.randn(64, 12)
    x = z + 0.1 * torch.randn(64, 12)
    for given in (z, 3 + 2 * z):
        assert torch.equal(paired(given, x), given)
    found = paired(torch.cat([z[:32], z[32:].roll(1, 0)]), x)
    assert torch.equal(found[:32], z[:32])
    assert (found[32:] == x[32:]).all(-1).double().mean() > 0.9


def test_experts_that_choose_their_tokens_stay_what_they_are():
    """Behind a prefix that has moved a little they choose in another order."""
    model, data = Chain(), list(torch.randn(8, 24, 7))
    for i in range(3):
        model.blocks[i] = Experts(12)
    layers, shifts = chosen(model, "blocks.*.experts.*"), []

    def compress(seen):
        for name, what in seen.items():
            W = weight(layers[name])
            shifts.append(float((aim(W, what) - W).norm() / W.norm()))
            set_weight(layers[name], W + 0.02 * torch.randn(12, 12))

    block_by_block(model, layers, data, compress)
    assert len(shifts) == 9
    assert max(shifts) < 0.2


class InPlace(Block):
    """The same block, which writes into what it is given."""

    def forward(self, x, scale=1.0):
        x += scale * self.down(self.up(x).relu())
        return (x,)


@pytest.mark.parametrize("targets", ["*", "blocks.*"])
def test_blocks_that_work_in_place_are_seen_as_those_that_do_not(targets):
    usual = Chain()
    in_place = copy.deepcopy(usual)
    for block in in_place.blocks:
        block.__class__ = InPlace
    data = batches()
    for model in (usual, in_place):
        quantize_(model, data, Grid(bits=3), targets=targets)
    for a, b in zip(usual.parameters(), in_place.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_stands_before_the_blocks_is_run_once_if_nothing_in_it_is_compressed():
    model, data = Chain(), batches()
    runs = []
    model.stem.register_forward_hook(lambda *_: runs.append(1))
    quantize_(model, data, Grid(bits=4), targets="blocks.*")
    assert len(runs) == 2 + len(data)  # for the order, the chain, and once for every batch


def test_blocks_in_front_of_the_chosen_ones_run_once_and_those_behind_do_not():
    model, data = Chain(depth=5), batches()
    runs = [0] * 5
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    quantize_(model, data, Grid(bits=4), targets=["blocks.1.*", "blocks.3.up"])
    more = [count - 2 for count in runs]  # for the order and the chain
    once = len(data)
    assert more == [once, 3 * once, 2 * once, 3 * once, 0]


def test_weights_make_up_for_half_of_the_drift():
    """Of inputs that a prefix has halved, all of it would be twice the weights."""
    seen, z = Seen.empty(torch.ones(1, 3)), torch.eye(3).repeat(5, 1)
    seen.add(Sums.of(z / 2, z), held=False)
    seen.add(Sums.of(z), held=True)
    W = torch.randn(2, 3)
    torch.testing.assert_close(aim(W, seen), W * (1 + 0.5 / 1.01))
    torch.testing.assert_close(aim(W, Seen.empty(z)), W)


def test_a_structure_in_the_place_of_a_block_is_in_the_prefix_of_the_next():
    model, data = sequence(), batches()

    def compress(seen):
        if "0" in seen:
            swap(model, {model[0]: StructuredLinear.from_linear(model[0], LowRank(rank=1))})
        if "2" in seen:
            x = inputs_of(model, "2", data[:3])
            torch.testing.assert_close(seen["2"].moments()[0], x.mT @ x / len(x))

    block_by_block(model, chosen(model), data, compress)
