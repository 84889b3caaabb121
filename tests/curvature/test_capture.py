"""Moments of what layers see, in the loops that people write."""

import copy
import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import matrigami as mg
from matrigami.curvature import capture, kfac
from tests.curvature import reference

SIZES = (5, 3)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(*sizes):
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes or SIZES]


def trained(model, loss, data, /, **options):
    """What a capture sees of one pass, forward and backward."""
    with capture(model, **options) as moments:
        for x, y in data:
            loss(model(x), y).backward()
    return moments


def gradients(model, loss, data):
    """The gradients of the loss of each example, by the output of a layer."""
    rows = []
    for x, y in data:
        for i in range(len(x)):
            seen = []
            with model[2].register_forward_hook(lambda _m, _i, o, seen=seen: seen.append(o)):
                value = loss(model(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.autograd.grad(value, seen[0])[0])
    return torch.cat(rows)


def test_calibration_without_gradients():
    model, data = network(), batches()
    with capture(model) as moments, torch.no_grad():
        for x, _ in data:
            model(x)
    X = torch.cat([x for x, _ in data])
    found = moments["0.weight"]
    assert (found.rows, found.examples, found.gradients) == (8, 8, None)
    assert_close(found.inputs.dense()[0], X.mT @ X / 8)
    assert_close(moments["2.weight"].inputs.dense()[0], model[:2](X).mT @ model[:2](X) / 8)
    assert list(moments) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(moments) == 4
    with pytest.raises(ValueError, match="they have no gradients"):
        moments.curvature()


def test_moments_of_gradients():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    moments = trained(model, loss, data)
    G = gradients(model, loss, data)
    assert_close(moments["2.weight"].gradients.dense()[0], G.mT @ G / 8)
    assert_close(moments["2.bias"].gradients.dense()[0], G.mT @ G / 8)


LOSSES = {
    "ce": nn.CrossEntropyLoss(),
    "ce, sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "mse, sum": nn.MSELoss(reduction="sum"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_the_curvature_is_kfac_with_the_labels_of_the_data(loss, joint):
    model, data = network(), batches()
    if isinstance(loss, nn.MSELoss):
        data = [(x, torch.randn(len(x), 3)) for x, _ in data]
    moments = trained(model, loss, data, loss=loss, joint=joint)
    expected = kfac(model, loss, data, labels="empirical", joint=joint)
    found = moments.curvature()
    assert found.names == expected.names
    assert_close(found.dense(), expected.dense(), atol=1e-12, rtol=1e-9)


class Everything(nn.Module):
    """Tokens, a convolution, a norm, a structured layer, one layer twice, and tied weights."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.monarch = mg.nn.StructuredLinear(4, 4, mg.Monarch(2))
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.norm(self.conv(self.tokens(x).mT).mT)
        h = self.twice(self.twice(self.monarch(h).tanh()).tanh())
        return self.head(h).mT


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_every_kind_of_layer_is_seen_as_by_kfac(joint):
    model, loss = Everything(), nn.CrossEntropyLoss()
    data = [(torch.randint(7, (n, 6)), torch.randint(7, (n, 6))) for n in (4, 2)]
    moments = trained(model, loss, data, loss=loss, joint=joint)
    expected = kfac(model, loss, data, labels="empirical", joint=joint)
    found = moments.curvature()
    assert set(found.names) == set(expected.names)
    assert_close(found.dense(), expected.dense(), atol=1e-10, rtol=1e-8)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


def test_layers_that_read_one_tensor_share_one_moment():
    model, loss, data = Heads(), nn.CrossEntropyLoss(), batches(5, 3, 4)
    moments = trained(model, loss, data)
    sums = [moments._sums[f"{name}.weight",][0].A for name in "qkv"]
    assert sums[0] is sums[1] is sums[2]
    X = torch.cat([x for x, _ in data])
    for name in "qkv":
        assert_close(moments[f"{name}.weight"].inputs.dense()[0], X.mT @ X / 12)


def test_gradient_accumulation_is_one_batch():
    model, loss = network(), nn.CrossEntropyLoss()
    (x, y) = batches(8)[0]
    with capture(model, scale=lambda: 0.5) as moments:
        for part, labels in zip(x.split(4), y.split(4), strict=True):
            (loss(model(part), labels) / 2).backward()
    expected = kfac(model, loss, (x, y), labels="empirical", joint=False)
    assert_close(moments.curvature().dense(), expected.dense())


def test_the_scale_of_a_gradient_scaler_is_taken_out():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with capture(model, scale=scaler.get_scale) as moments:
        for x, y in data:
            scaler.scale(loss(model(x), y)).backward()
    expected = trained(model, loss, data)
    assert_close(moments.curvature().dense(), expected.curvature().dense())


def test_passes_without_backward_are_not_counted():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    expected = trained(model, loss, data).curvature().dense()
    with capture(model) as moments:
        for x, y in data:
            thrown_away = model(x + 1.0)
            del thrown_away
            gc.collect()
            loss(model(x), y).backward()
    assert moments["0.weight"].examples == 8
    assert_close(moments.curvature().dense(), expected)


def test_evaluation_between_steps_counts_inputs_alone():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    with capture(model) as moments:
        for x, y in data:
            loss(model(x), y).backward()
    rows = moments["0.weight"].rows
    with torch.no_grad():
        model(data[0][0])
    assert moments["0.weight"].rows == rows  # the capture is closed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_after_an_error():
    model = network()
    with pytest.raises(RuntimeError), capture(model):
        model(torch.randn(2, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_batch_with_nan_is_left_out_and_counted():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    expected = trained(model, loss, data).curvature().dense()
    x, y = data[0]
    bad = x.clone()
    bad[1, 2] = torch.nan
    moments = trained(model, loss, [data[0], (bad, y), data[1]])
    assert moments.rejected == {"0": 1, "2": 1}
    assert moments["0.weight"].examples == 8
    assert_close(moments.curvature().dense(), expected)


def test_an_infinite_gradient_is_left_out():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    expected = trained(model, loss, data).curvature().dense()
    with capture(model) as moments:
        for x, y in data:
            loss(model(x), y).backward()
        (torch.inf * loss(model(data[0][0]), data[0][1])).backward()
    assert moments.rejected == {"0": 1, "2": 1}
    assert_close(moments.curvature().dense(), expected)


def test_half_precision_is_summed_in_single():
    model, loss = network().float(), nn.CrossEntropyLoss()
    data = [(x.float(), y) for x, y in batches(32, 16)]
    exact = trained(model, loss, data).curvature()
    with capture(model) as moments, torch.autocast("cpu", torch.bfloat16):
        for x, y in data:
            loss(model(x), y).backward()
    found = moments.curvature()
    assert found.dtype == torch.float32
    assert reference.distance(found.dense(), exact.dense()) < 0.03
    wide = trained(model, loss, data, dtype=torch.float64)
    assert wide["0.weight"].inputs.dtype == torch.float64


def test_frozen_layers_are_not_watched():
    model, loss, data = network(), nn.CrossEntropyLoss(), batches()
    model[0].requires_grad_(False)
    moments = trained(model, loss, data)
    assert list(moments) == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"'0.weight'\]: it has not seen"):
        moments["0.weight"]
    with pytest.raises(ValueError, match="seen nothing"):
        capture(network())["0.weight"]


@pytest.mark.usefixtures("unchecked")
def test_a_module_without_a_rule_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 3))
    with pytest.raises(TypeError, match="1, a Bilinear with two inputs: weight, bias"):
        capture(model)


def test_padding_is_left_out_of_moments():
    """As if it were not there, for the layers that see the positions of the mask."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(6, 7, 4)
    mask = torch.arange(7)[None] < torch.tensor([7, 2, 3, 1, 7, 5])[:, None]
    for inputs in (x, x.flatten(0, 1)):
        with capture(model) as moments, torch.no_grad():
            moments.mask = mask
            model(inputs)
        with capture(model) as alone, torch.no_grad():
            model(x[mask])
        for name in ("0.weight", "2.weight"):
            assert moments[name].rows == alone[name].rows == int(mask.sum())
            assert_close(moments[name].inputs.dense(), alone[name].inputs.dense())


def test_ignored_positions_do_not_count_in_the_curvature():
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    y[[1, 6]] = loss.ignore_index
    found = []
    for rows in (torch.ones(8, dtype=torch.bool), y >= 0):
        with capture(model, loss=loss) as moments:
            moments.mask = (y >= 0)[rows]
            loss(model(x[rows]), y[rows]).backward()
        found.append(moments.curvature().dense())
    assert_close(*found)


class Repeated(nn.Module):
    """One layer three times, by checkpoints or not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.call = nn.Linear(4, 4), nn.Linear(4, 3), lambda f, h: f(h)

    def forward(self, x):
        for _ in range(3):
            x = self.call(lambda h: torch.tanh(self.a(h)) + h, x)
        return self.o(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_a_repeated_layer_are_seen_as_without(reentrant):
    model, loss, data = Repeated(), nn.CrossEntropyLoss(), batches()
    plain, again = model, copy.deepcopy(model)
    again.call = partial(checkpoint, use_reentrant=reentrant)
    data = [(x.requires_grad_(), y) for x, y in data]
    expected, found = trained(plain, loss, data), trained(again, loss, data)
    for name in ("a.weight", "o.weight"):
        assert found[name].rows == expected[name].rows
        assert found[name].examples == expected[name].examples == sum(SIZES)
        assert_close(found[name].inputs.dense(), expected[name].inputs.dense())
        assert_close(found[name].gradients.dense(), expected[name].gradients.dense())


def test_an_empty_batch_adds_nothing():
    model, loss = network(), nn.CrossEntropyLoss(reduction="sum")
    moments = trained(model, loss, batches(0, 4, 0), loss=loss)
    assert moments["0.weight"].rows == moments["0.weight"].examples == 4
    assert not moments.rejected


def test_copies_and_other_captures_do_not_disturb():
    model, x = network(), torch.randn(5, 4)
    with capture(model) as moments, capture(model) as second:
        copy.deepcopy(model)(torch.randn(3, 4))
        model(x).sum().backward()
    for found in (moments, second):
        assert found["0.weight"].rows == 5
        assert_close(found["0.weight"].inputs.dense()[0], x.mT @ x / 5)
