"""Surgery: what is exchanged, what is kept, and that nothing changes where it does not fit."""

import copy
import math

import pytest
import torch
from torch import nn

from matrigami import Kronecker, LowRank, Monarch, project
from matrigami.curvature import capture
from matrigami.nn import StructuredConv, StructuredLinear, replace_, stand_in, to_dense_
from matrigami.nn._budget import cost_of, parsed_budget, under_budget
from matrigami.testing import check_layer

FULL = LowRank(rank=1.0)


class Net(nn.Module):
    """Attention, convolutions of two kinds, and an MLP."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="circular")
        self.line = nn.Conv1d(8, 8, 3, padding="same", dilation=2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.line(self.conv(x).flatten(2)).mT
        x = x + self.attn(x, x, x)[0]
        return self.head(x + self.mlp(x))


def test_full_structures_change_nothing_but_the_parameters():
    model, x = Net(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    done = replace_(model, FULL)
    assert [layer.name for layer in done.layers] == [
        "conv",
        "line",
        "attn.out_proj",
        "mlp.0",
        "mlp.2",
    ]
    assert isinstance(model.conv, StructuredConv)
    assert isinstance(model.mlp[0], StructuredLinear)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1])[0], expected[0])
    assert max(layer.error for layer in done.layers) < 1e-12
    assert to_dense_(model) == [layer.name for layer in done.layers]
    assert isinstance(model.conv, nn.Conv2d)
    assert type(model.mlp[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": "valid"}, {"dilation": 2, "padding": 3}]
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_are_matrices_of_taps(axes, options):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = kind(2, 4, 2, **options)
    x = torch.randn(3, 2, 7, 6, 5)[(..., *[0] * (3 - axes))]
    new = stand_in(conv, FULL)
    new.taps.load_matrix(LowRank(rank=1.0).init(*conv.weight.flatten(1).shape))
    conv.weight.data.copy_(new.taps.weight.detach().reshape(conv.weight.shape))
    torch.testing.assert_close(new(x), conv(x))
    torch.testing.assert_close(new(x[0]), conv(x[0]))
    torch.testing.assert_close(new.to_conv()(x), conv(x))


def test_curvature_reads_the_taps_of_a_structured_convolution():
    new = stand_in(nn.Conv2d(2, 4, 2), Monarch(blocks=2))
    check_layer(new.taps, torch.randn(3, 5, 8))


def test_type_gradients_hooks_mode_and_bias_are_kept():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16).eval()
    model[0].weight.requires_grad_(False)
    calls = []
    forward = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    bias = model[0].bias.detach().clone()
    replace_(model, LowRank(rank=2), targets="0")
    new = model[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [new.U.requires_grad, new.V.requires_grad, new.bias.requires_grad] == [
        False,
        False,
        True,
    ]
    assert torch.equal(new.bias, bias)
    assert not new.training
    model(torch.ones(8, dtype=torch.bfloat16))
    forward.remove()
    model(torch.ones(8, dtype=torch.bfloat16))
    assert calls == ["before", "after", "before"]
    to_dense_(model)
    assert [model[0].weight.requires_grad, model[0].bias.requires_grad] == [False, True]


def test_shared_weights_and_shared_layers_stay_shared():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 2)})
    model["b"].weight = model["a"].weight
    model["again"] = model["a"]
    x = torch.randn(4, 6)
    expected = model["b"](x)
    done = replace_(model, FULL, targets=["a", "b", "c"])
    assert [layer.name for layer in done.layers] == ["a", "c"]
    assert model["again"] is model["a"]
    assert model["a"].U is model["b"].U
    assert model["a"].bias is not model["b"].bias
    torch.testing.assert_close(model["b"](x), expected)
    to_dense_(model)
    assert model["a"].weight is model["b"].weight
    assert model["again"] is model["a"]


def test_a_layer_whose_weight_is_that_of_an_embedding_is_refused():
    model = nn.ModuleDict({"table": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False)})
    model["head"].weight = model["table"].weight
    with pytest.raises(ValueError, match="head shares its weight with table, a Embedding"):
        replace_(model, LowRank(rank=2), targets="head")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": LowRank(rank=2), "targets": "mlpp.0"}, r"Nearest: mlp\.0"),
        ({"structure": LowRank(rank=2), "targets": "q"}, "Nearest: "),
        ({"structure": {"mlp.*": LowRank(rank=2), "had": LowRank(rank=2)}}, "Nearest: head"),
        ({"structure": Monarch(blocks=4), "targets": "*"}, "4 blocks do not divide"),
        ({"budget": "0.01x macs", "targets": "mlp.*"}, "no structure of full rank"),
        ({"budget": "half"}, "0.5x macs"),
        ({}, "one of structure= and budget="),
        ({"structure": {"*": FULL}, "targets": "*"}, "patterns of the mapping"),
        ({"structure": FULL, "init": "random", "metric": {}}, "metric= was given beside"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(arguments, message):
    model = Net()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_(model, **arguments)
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_transposed_convolution_has_no_stand_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 2))
    with pytest.raises(ValueError, match=r"ConvTranspose1d.*\n.*ignore="):
        replace_(model, LowRank(rank=2), targets="*")
    assert isinstance(model[0], nn.Linear)


def test_recipes_by_pattern_the_first_counts():
    model = Net()
    done = replace_(model, {"mlp.0": Kronecker(), "mlp.*": LowRank(rank=2)})
    assert [str(layer.structure).split("(")[0] for layer in done.layers] == ["Kronecker", "LowRank"]


def test_the_metric_of_the_inputs_is_better_on_them():
    x = torch.randn(200, 12) * torch.linspace(0.02, 2, 12)
    plain = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))
    seen = copy.deepcopy(plain)
    expected = plain(x).detach()
    with capture(seen) as moments:
        seen(x).square().sum().backward()
    replace_(seen, LowRank(rank=3), targets="0", metric=moments)
    replace_(plain, LowRank(rank=3), targets="0")
    assert (seen(x) - expected).norm() < 0.7 * (plain(x) - expected).norm()


def test_a_budget_takes_the_nearest_of_full_rank_below_it():
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 36), nn.Linear(36, 4))
    W = model[0].weight.detach().clone()
    done = replace_(model, budget="0.5x macs", vectors=3)
    assert all(2 * layer.macs[1] <= layer.macs[0] for layer in done.layers)
    assert torch.linalg.matrix_rank(model[0].weight) == 64
    first = done.layers[0]
    errors = [
        float((W - project(s, W).dense()).norm() / W.norm())
        for s in under_budget(64, 64, 0.5, "macs")
    ]
    assert first.error == pytest.approx(min(errors), rel=1e-4)
    table = str(done).splitlines()
    assert len(table) == 4
    assert "-> 2048" in table[1]
    assert all(s > 0 for layer in done.layers for s in layer.seconds)


def test_a_random_start_takes_the_largest_below_a_budget():
    model = nn.Sequential(nn.Linear(172, 64), nn.Linear(64, 4))
    done = replace_(model, budget="0.5x parameters", init="random")
    sizes = [cost_of(s, 64, 172).params for s in under_budget(64, 172, 0.5, "parameters")]
    assert done.layers[0].parameters == (64 * 172, max(sizes))
    assert math.isnan(done.layers[0].error)
    drawn = done.layers[0].structure.init(64, 172).dense().std()
    assert float(model[0].weight.detach().std()) == pytest.approx(float(drawn), rel=0.2)


@pytest.mark.parametrize("text", ["2x macs", "0x macs", "0.5x cows", "0.5 macs"])
def test_a_budget_is_a_share(text):
    with pytest.raises(ValueError, match="no share"):
        parsed_budget(text)


def test_conv1d_of_transformers_is_replaced():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="needs the extra hf")
    model = nn.Sequential(pytorch_utils.Conv1D(6, 8), nn.Linear(6, 3))
    x = torch.randn(4, 8)
    expected = model(x)
    replace_(model, FULL)
    assert isinstance(model[0], StructuredLinear)
    torch.testing.assert_close(model(x), expected)
    to_dense_(model)
    assert type(model[0]) is pytorch_utils.Conv1D
    torch.testing.assert_close(model(x), expected)
    to_dense_(model)
    assert type(model[0]) is pytorch_utils.Conv1D
    torch.testing.assert_close(model(x), expected)


def test_keywords_and_weights_are_those_of_torch():
    """A model may call its layers by `input=`, or read the weight of a convolution."""
    linear, conv = nn.Linear(6, 4), nn.Conv2d(3, 4, 2)
    x, image = torch.randn(5, 6), torch.randn(2, 3, 5, 5)
    new, small = stand_in(conv, FULL), stand_in(linear, FULL)
    assert new(input=image).shape == conv(input=image).shape
    assert small(input=x).shape == (5, 4)
    torch.testing.assert_close(nn.functional.conv2d(image, new.weight, new.taps.bias), new(image))
