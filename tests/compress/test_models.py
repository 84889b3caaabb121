"""Whole models: order, prefix, patterns, and what is told."""

import copy
import math

import pytest
import torch
from torch import nn

from matrigami import Kronecker, LowRank, Monarch
from matrigami.compress import (
    Grid,
    prune_,
    quantize_,
    set_weight,
    structure_,
    unstructured,
    weight,
)
from matrigami.compress._gradients import output_moments
from matrigami.compress._moments import Seen, Sums
from matrigami.nn import StructuredLinear, chosen


class Block(nn.Module):
    """A block with a residual branch, and arguments by keyword."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(self.up(x).relu()),)


class Chain(nn.Module):
    """Blocks in a list, as language models have them."""

    def __init__(self, width=12, depth=3, classes=5):
        super().__init__()
        self.stem = nn.Linear(7, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        return self.head(x)


class Branches(nn.Module):
    """No chain: two branches, the second used first, a third never."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.never = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(7, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.right(x) * self.left(x))


def batches(count=4, size=16):
    """Inputs that hang together, as those of real layers do."""
    return list(torch.randn(count, size, 3) @ torch.randn(3, 7) + 0.2 * torch.randn(count, size, 7))


def sequence():
    return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))


def test_output_moments_are_the_fisher_matrix_of_the_last_layer():
    """Of a softmax, `E[g g.T] = diag(p) - p p.T`."""
    model, data = nn.Sequential(nn.Linear(7, 4)), batches(1, 2000)
    found = output_moments(model, {"0": model[0]}, data, samples=20, bound=None)["0"]
    p = model(data[0]).softmax(-1)
    torch.testing.assert_close(
        found, torch.diag(p.mean(0)) - p.mT @ p / len(p), atol=5e-3, rtol=0.02
    )


@pytest.mark.parametrize("two_sided", [False, True])
def test_quantised_models_stay_nearer_than_rounded_ones(two_sided):
    model, data = Chain(width=24), batches(8, 64)
    expected = model(data[0]).detach()
    rounded, grid = Chain(width=24), Grid(3, None)
    rounded.load_state_dict(model.state_dict())
    for layer in chosen(rounded).values():
        set_weight(layer, grid.round(weight(layer)).dense())
    report = quantize_(model, data, grid, two_sided=two_sided)
    errors = [(m(data[0]) - expected).square().mean() for m in (model, rounded)]
    assert errors[0] < 0.8 * errors[1]
    assert [layer.name for layer in report.layers][:1] == ["stem"]
    assert all(
        torch.equal(weight(model.get_submodule(n)), v.dense()) for n, v in report.values.items()
    )
    assert "head" not in report.values


def test_pruned_models_have_the_zeros_and_stay_nearer():
    model, data = Chain(width=24), batches(8, 64)
    expected = model(data[0]).detach()
    simple = Chain(width=24)
    simple.load_state_dict(model.state_dict())
    for layer in chosen(simple).values():
        set_weight(layer, weight(layer) * unstructured(0.5)(weight(layer)))
    prune_(model, data, unstructured(0.5))
    errors = [(m(data[0]) - expected).square().mean() for m in (model, simple)]
    assert errors[0] < 0.8 * errors[1]
    for layer in chosen(model).values():
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


@pytest.mark.parametrize(
    ("structure", "two_sided"),
    [
        (LowRank(rank=0.5), False),
        (LowRank(rank=0.5), True),
        (Kronecker(), True),
        pytest.param(Monarch(blocks=4), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_structured_models_stay_nearer_than_projected_ones(structure, two_sided):
    model, data = Chain(width=24, depth=1), batches(8, 64)
    expected = model(data[0]).detach()
    simple = copy.deepcopy(model)
    for block in simple.blocks:
        block.up = StructuredLinear.from_linear(block.up, structure)
        block.down = StructuredLinear.from_linear(block.down, structure)
    report = structure_(model, data, structure, targets="blocks.*", two_sided=two_sided)
    errors = [(m(data[0]) - expected).square().mean() for m in (model, simple)]
    assert errors[0] < errors[1]
    assert isinstance(model.blocks[0].up, StructuredLinear)
    assert all(layer.loss <= layer.simple and layer.bits < 64 for layer in report.layers)


def test_a_structure_that_does_not_fit_changes_nothing():
    model = Chain()
    with pytest.raises(ValueError, match="5 blocks do not divide"):
        structure_(model, batches(), Monarch(blocks=5))
    assert isinstance(model.stem, nn.Linear)


def test_a_layer_that_nothing_reaches_is_told():
    report = quantize_(Branches(), batches(), Grid(4, None))
    told = {layer.name: layer for layer in report.layers}
    assert told["never"].rows == 0
    assert "not reached" in told["never"].note
    assert math.isnan(told["never"].loss)
    assert "not reached" in str(report)


def test_vectors_that_are_not_finite_are_left_out_and_told():
    seen = Seen.empty(torch.ones(1, 2))
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    seen.add(Sums.of(x), held=False)
    assert (seen.rows, seen.rejected) == (1, 2)
    assert torch.equal(seen.moments()[0], torch.tensor([[1.0, 2.0], [2.0, 4.0]]))


def test_convolutions_are_matrices_of_taps():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    data = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    expected = model(data[0]).detach()
    report = quantize_(model, data, Grid(4, None))
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.layers[0].rows == 3 * 8 * 16
    assert report.layers[0].loss <= report.layers[0].simple
    assert (model(data[0]) - expected).norm() < 0.2 * expected.norm()


def test_modes_and_shared_weights_are_kept():
    model = Chain().train()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    report = quantize_(model, batches(), Grid(4, None))
    assert model.training
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    assert "blocks.1.up" not in report.values


def test_a_forward_of_its_own_is_unknown():
    class Standardized(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    assert list(chosen(nn.Sequential(Standardized(4, 4), nn.Linear(4, 4)), "*")) == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "blocks.*.upp"}, r"Nearest: blocks\.\d\.up"),
        ({"ignore": "tail"}, "matches no layer"),
        ({"calibration": []}, "no batches"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(options, message):
    model = Chain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize_(model, options.pop("calibration", batches()), Grid(4, None), **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_progress_is_told():
    told = []
    quantize_(Chain(depth=1), batches(), Grid(4, None), progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == [1, 2, 3]
    assert {every for _, every, _ in told} == {3}


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(3, 5, 3, padding=1), torch.randn(20, 3, 9)),
        (nn.Conv3d(2, 5, 2), torch.randn(20, 2, 3, 4, 3)),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), torch.randn(20, 3, 4, 4)),
        (nn.Linear(6, 1), torch.randn(20, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_layer_that_its_anatomy_calls_a_matrix_is_rounded(layer, x):
    layer, x = layer.double(), x.double()
    expected = layer(x).detach()
    report = quantize_(nn.ModuleDict({"only": layer})["only"], [x], Grid(8, None), targets="*")
    assert report.layers[0].rows > 0
    assert 0 < (layer(x) - expected).norm() < 0.02 * expected.norm()


def test_targets_are_wildcards_or_regular_expressions():
    model = Chain()
    assert list(chosen(model, "re:blocks.[01].up")) == ["blocks.0.up", "blocks.1.up"]
    assert list(chosen(model, "*.up", ignore="re:.*0")) == ["blocks.1.up", "blocks.2.up"]
    for pattern, message in (("re:up", "matches no layer"), ("re:(", "no regular expression")):
        with pytest.raises(ValueError, match=message):
            chosen(model, pattern)
