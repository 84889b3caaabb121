"""A structured layer stands where nn.Linear stands."""

import torch
from torch import nn

from matrigami import project
from matrigami.nn import StructuredLinear
from matrigami.structures import LowRank, Monarch


def test_weight_is_dense_and_differentiable():
    layer = StructuredLinear(6, 4, LowRank(rank=2))
    torch.testing.assert_close(layer.weight, layer.matrix().dense())
    layer.weight.sum().backward()
    assert layer.U.grad is not None
    assert "weight" not in layer.state_dict()


def test_transformer_layer_trains_and_evaluates_alike():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    layer.linear1 = StructuredLinear(16, 32, Monarch(blocks=4))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_parameters_are_drawn_again_after_meta():
    layer = StructuredLinear(64, 64, Monarch(blocks=8), zero_init=True, device="meta")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    same = StructuredLinear(
        64, 64, Monarch(blocks=8), zero_init=True, generator=torch.Generator().manual_seed(0)
    )
    assert not layer.weight.detach().any()
    for a, b in zip(layer.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_held_weight_is_used_for_its_own_tensors_only():
    layer = StructuredLinear(8, 8, Monarch(blocks=2)).eval()
    wrong = torch.full((8, 8), 5.0)
    layer._materialized = (4, wrong, layer._versions())
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ wrong.mT + layer.bias)
        doubled = {name: 2 * p for name, p in layer.named_parameters()}
        plain = 2 * (layer.matrix() @ x.mT).mT * 2 + 2 * layer.bias
        torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), plain)
        layer.left.mul_(2.0)
        torch.testing.assert_close(layer(x), (layer.matrix() @ x.mT).mT + layer.bias)


def test_load_into_a_parametrised_factor():
    layer = StructuredLinear(8, 8, Monarch(blocks=2))
    nn.utils.parametrizations.weight_norm(layer, "right")
    A = project(Monarch(blocks=2), torch.randn(8, 8))
    layer.load_matrix(A)
    torch.testing.assert_close(layer.weight, A.dense())
