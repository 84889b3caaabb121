"""Fused modules with a layer for each matrix: the same outputs, and back again."""

import copy

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.nn import (
    SeparateAttention,
    StructuredLinear,
    chosen,
    replace_,
    separate_,
    separated,
    to_dense_,
)

OPTIONS = [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 10}]


def sides(options, N=3, L=5, S=4):
    """Queries, keys and values."""
    sizes = (L, 8), (S, options.get("kdim", 8)), (S, options.get("vdim", 8))
    x = [torch.randn(N, length, width) for length, width in sizes]
    return x if options.get("batch_first") else [t.transpose(0, 1) for t in x]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": torch.linspace(-2, 3, 20).reshape(5, 4)},
        {"attn_mask": torch.arange(20).reshape(5, 4) % 3 == 0},
        {"attn_mask": torch.linspace(-2, 3, 120).reshape(6, 5, 4)},
        {"key_padding_mask": torch.arange(4).expand(3, 4) > 2, "attn_mask": torch.eye(5, 4) > 0},
        {"average_attn_weights": False},
        {"need_weights": False},
    ],
    ids=["none", "added", "left out", "of each head", "two masks", "of each", "no weights"],
)
def test_attention_is_that_of_torch(options, masks):
    fused, x = nn.MultiheadAttention(8, 2, **options), sides(options)
    masks = {
        k: t.double() if k == "attn_mask" and t.is_floating_point() else t for k, t in masks.items()
    }
    separate = SeparateAttention(fused)
    torch.testing.assert_close(separate(*x, **masks), fused(*x, **masks))
    again = separate.fused()
    assert all(torch.equal(p, fused.get_parameter(n)) for n, p in again.named_parameters())
    torch.testing.assert_close(again(*x, **masks), fused(*x, **masks))


def test_one_example():
    fused, x = nn.MultiheadAttention(8, 2), torch.randn(5, 8)
    torch.testing.assert_close(SeparateAttention(fused)(x, x, x), fused(x, x, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_may_see_no_key(need_weights, training):
    """NaN beside weights of 0/0, and zero without them: both as torch has it."""
    fused, x = nn.MultiheadAttention(8, 2).train(training), sides({})
    masks = {"attn_mask": torch.arange(5)[:, None].expand(5, 4) == 2, "need_weights": need_weights}
    expected = fused(*x, **masks)
    torch.testing.assert_close(
        SeparateAttention(fused)(*x, **masks), expected, equal_nan=need_weights
    )


@pytest.mark.parametrize("padded", [False, True])
def test_surgery_reaches_every_matrix_of_an_encoder(padded):
    """Its fast path is not taken, and it comes back as it was."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    x, before = torch.randn(2, 5, 8), copy.deepcopy(model.state_dict())
    mask = {"src_key_padding_mask": torch.arange(5).expand(2, 5) > 3} if padded else {}
    expected = model[0](x, **mask).detach()[:, :4]
    with torch.no_grad():
        assert separate_(model) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
        assert separated(model) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
        torch.testing.assert_close(model[0](x, **mask)[:, :4], expected)
        done = replace_(model, LowRank(rank=1.0), targets="*")
        assert len(done.layers) == 12
        assert isinstance(model[0].layers[1].self_attn.value, StructuredLinear)
        torch.testing.assert_close(model[0](x, **mask)[:, :4], expected)
        to_dense_(model)
    assert not separated(model)
    assert type(model[0].layers[0].self_attn) is nn.MultiheadAttention
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name])


def test_what_is_more_than_attention_stays_fused():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2, add_zero_attn=True), "b": nn.MultiheadAttention(8, 2)}
    )
    assert separate_(model) == ["b"]
    assert list(chosen(model, "b.*")) == ["b.query", "b.key", "b.value", "b.out_proj"]
    with pytest.raises(ValueError, match="would itself be another layer"):
        separate_(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="matches no layer"):
        separate_(model, "attention")


@pytest.mark.parametrize("name", ["MixtralConfig", "GptOssConfig"])
def test_experts_of_transformers(name):
    """Those with a bias, a transposed weight or a gate of their own, too."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.set_default_dtype(torch.float32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = getattr(transformers, name)(vocab_size=32, **sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, before = torch.arange(20).view(2, 10), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        assert separate_(model) == ["model.layers.0.mlp.experts"]
        torch.testing.assert_close(model(ids).logits, expected)
        assert len(chosen(model, "*.experts.*")) == 8
        to_dense_(model)
        torch.testing.assert_close(model(ids).logits, expected)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
