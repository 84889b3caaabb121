"""Moments of output gradients: once for many compressions, without gradients of weights."""

import copy

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import Grid, allocate, compress_, gradient_moments, plan, quantize_
from matrigami.compress._gradients import output_moments


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Linear(9, 8), nn.Linear(8, 5))


@pytest.fixture
def data():
    return list(torch.randn(4, 16, 7))


@pytest.mark.parametrize("method", [Grid(3), LowRank(rank=2)], ids=str)
def test_given_moments_are_those_that_would_be_taken(model, data, method):
    moments, other = gradient_moments(model, data), copy.deepcopy(model)
    planned = [plan(model, data, [method], two_sided=given) for given in (moments, True)]
    assert planned[0].to_json() == planned[1].to_json()
    compress_(model, data, method, two_sided=moments)
    compress_(other, data, method, two_sided=True)
    assert torch.equal(model(data[0]), other(data[0]))


def test_moments_do_not_depend_on_who_asks_for_gradients(model, data):
    """Neither on batches that require some, nor on a caller that wants none."""
    usual = gradient_moments(model, data)
    asking = gradient_moments(model, [x.clone().requires_grad_() for x in data])
    with torch.inference_mode():
        inferring = gradient_moments(model, data)
    for name, B in usual.items():
        assert torch.equal(asking[name], B)
        assert torch.equal(inferring[name], B)


def test_moments_of_other_layers_are_refused(model, data):
    with pytest.raises(ValueError, match="of none that is compressed"):
        quantize_(model, data, two_sided={"head": torch.eye(3)})


def test_every_draw_shares_the_forward_pass_and_no_weight_gets_a_gradient(model, data):
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    model[2].weight.register_hook(runs.append)
    output_moments(model, {str(i): model[i] for i in (0, 2)}, data, samples=3)
    assert runs == [1] * len(data)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_moments_are_those_of_the_gradients(model, data):
    """Of `-log p` with one drawn label, by hand."""
    batch = data[0]
    found = output_moments(model, {"0": model[0], "2": model[2]}, [batch], samples=1, bound=None)
    first = model[0](batch).detach().requires_grad_()
    second = model[2](first.relu()).detach().requires_grad_()
    logits = model[3](model[2](first.relu()))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, drawn, reduction="sum"), first)
    loss = nn.functional.cross_entropy(model[3](second), drawn, reduction="sum")
    (h,) = torch.autograd.grad(loss, second)
    for name, rows in (("0", g), ("2", h)):
        expected = (rows.mT @ rows / len(batch)).to(found[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-8)


def test_a_budget_takes_the_moments_once(model, data):
    runs = []
    moments = gradient_moments(model, data)
    model[3].register_full_backward_hook(lambda *_: runs.append(1))
    found = allocate(model, data, "0.3x bytes", [Grid(3, None), Grid(8, None)], two_sided=moments)
    assert not runs
    taken = allocate(model, data, "0.3x bytes", [Grid(3, None), Grid(8, None)])
    assert taken.measured == found.measured
