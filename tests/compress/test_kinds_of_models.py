"""Models of transformers of many kinds: compressed, saved, and loaded again by both libraries."""

import pytest
import torch

import matrigami as mg
from matrigami.compress import (
    Grid,
    evaluate,
    quantize_,
    register_transformers,
    save_compressed_tensors,
    save_dense,
    shrink_,
    structure_,
)
from matrigami.nn import to_dense_

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(96).view(4, 24) * 7 % 61 + 2
PATCHES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 4,
}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
KINDS = {
    "gpt2": (
        "AutoModelForCausalLM",
        lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        {"input_ids": IDS},
    ),
    "falcon": (
        "AutoModelForCausalLM",
        lambda: transformers.FalconConfig(**FALCON, num_attention_heads=4),
        {"input_ids": IDS},
    ),
    "bert": (
        "AutoModelForSequenceClassification",
        lambda: transformers.BertConfig(**SIZES),
        {"input_ids": IDS, "attention_mask": (torch.arange(24) < 20).long().expand(4, 24)},
    ),
    "vit": (
        "AutoModelForImageClassification",
        lambda: transformers.ViTConfig(**PATCHES, num_labels=5),
        {"pixel_values": torch.linspace(-1, 1, 4 * 3 * 256).sin().view(4, 3, 16, 16)},
    ),
    "resnet": (
        "AutoModelForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        {"pixel_values": torch.linspace(-1, 1, 4 * 3 * 1024).sin().view(4, 3, 32, 32)},
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :9]},
    ),
    "mixtral": (
        "AutoModelForCausalLM",
        lambda: transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3),
        {"input_ids": IDS},
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """The class of transformers, a model, and a batch."""
    torch.set_default_dtype(torch.float32)
    name, config, batch = KINDS[request.param]
    auto = getattr(transformers, name)
    return auto, auto.from_config(config()).eval(), batch


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_compressed_models_load_again(kind, tmp_path):
    auto, model, batch = kind
    before = logits(model, batch)
    last = list(mg.nn.chosen(model))[-3:]
    report = quantize_(model, [batch], Grid(4, 16), ignore=last, two_sided=True)
    structure_(model, [batch], mg.LowRank(rank=0.5), targets=last)
    expected = logits(model, batch)
    assert 0 < (expected - before).norm() < 0.5 * before.norm()
    assert all(r.rows for r in report.layers)
    folder = mg.save(model, tmp_path / "small", report.values)
    register_transformers()
    assert torch.equal(logits(mg.load(folder), batch), expected)
    again = auto.from_pretrained(folder)
    assert type(again) is type(model)
    assert torch.equal(logits(again, batch), expected)
    to_dense_(again)
    plain = auto.from_pretrained(save_dense(again, tmp_path / "plain"))
    torch.testing.assert_close(logits(plain, batch), expected, atol=1e-4, rtol=1e-4)
    found = evaluate(plain, model, [batch])
    assert found.kl < 1e-6
    assert (found.perplexity == found.perplexity) == model.can_generate()


@pytest.mark.parametrize(
    "options", [{}, {"targets": "*.o_proj", "heads": 2}], ids=["units", "heads"]
)
def test_smaller_models_are_dense_with_sizes_of_their_own(llama, tmp_path, options):
    model = llama()
    shrink_(model, [{"input_ids": IDS}], 0.5 if options else 0.25, **options)
    folder = save_dense(model, tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(again, {"input_ids": IDS}), logits(model, {"input_ids": IDS}))
    config = again.config
    sizes = (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    assert sizes == ((64, 2, 1) if options else (48, 4, 2))


@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        ("GPT2Config", "AutoModelForCausalLM", {"targets": "*.mlp.c_proj"}),
        ("GPT2Config", "AutoModelForCausalLM", {"targets": "*.attn.c_proj", "heads": 4}),
        (
            "BertConfig",
            "AutoModelForSequenceClassification",
            {"targets": "re:.*[0-9].output.dense"},
        ),
        (
            "BertConfig",
            "AutoModelForSequenceClassification",
            {"targets": "*.attention.output.dense", "heads": 4},
        ),
        ("ViTConfig", "AutoModelForImageClassification", {"targets": "*.fc2"}),
        ("ViTConfig", "AutoModelForImageClassification", {"targets": "*.o_proj", "heads": 4}),
    ],
)
def test_neurons_and_heads_go_from_models_of_every_kind(config, name, options, tmp_path):
    """What is smaller computes what zeros did, or `shrink_` raises; it loads again to the bit."""
    torch.set_default_dtype(torch.float32)
    sizes = {
        "GPT2Config": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "BertConfig": SIZES,
        "ViTConfig": PATCHES,
    }
    model = getattr(transformers, name).from_config(
        getattr(transformers, config)(**sizes[config], initializer_range=0.3)
    )
    batch = {"input_ids": IDS}
    if config == "ViTConfig":
        batch = {"pixel_values": torch.linspace(-1, 1, 4 * 3 * 256).sin().view(4, 3, 16, 16)}
    model.eval()
    before = model.num_parameters()
    report = shrink_(model, [batch], 0.5, **options)
    assert len(report.layers) == 2
    assert model.num_parameters() < before
    again = mg.load(mg.save(model, tmp_path / "out", report.values))
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_sizes_that_no_configuration_tells_are_refused(llama, tmp_path):
    model = llama()
    shrink_(model, [{"input_ids": IDS}], 0.25, targets="model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=r"no configuration of a LlamaForCausalLM(.|\n)*mat.*save"):
        save_dense(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_separate_experts_are_saved_as_such(tmp_path):
    """Every expert is a layer; those that no token reaches are told."""
    torch.set_default_dtype(torch.float32)
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the last expert is never the best two
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0.0
            layer.mlp.gate.weight[:3] *= 50.0
    mg.nn.separate_(model)
    batch = {"input_ids": IDS}
    structured = structure_(model, [batch], mg.LowRank(rank=0.5), targets="*.experts.0.*")
    report = quantize_(model, [batch], Grid(4, 16), targets="*.experts.[123].*")
    assert len(structured.layers) == 4
    assert len(report.layers) == 12
    assert sum(r.rows for r in report.layers) > 0
    expected = logits(model, batch)
    folder = mg.save(model, tmp_path / "small", report.values)
    register_transformers()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for other in (again, mg.load(folder)):
        assert torch.equal(logits(other, batch), expected)
        assert len(mg.nn.separated(other)) == 2
    to_dense_(again)
    assert not mg.nn.separated(again)
    with pytest.raises(ValueError, match="is fused again; the format knows"):
        save_compressed_tensors(again, report.values, tmp_path / "packed")
    plain = save_dense(again, tmp_path / "plain")
    dense = transformers.AutoModelForCausalLM.from_pretrained(plain)
    torch.testing.assert_close(logits(dense, batch), expected, atol=1e-4, rtol=1e-4)
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(**SIZES | {"hidden_size": 48}, num_local_experts=4)
    )
    before = list(other.modules())
    with pytest.raises(ValueError, match="not the one that was saved"):
        mg.load(folder, into=other)
    assert list(other.modules()) == before
