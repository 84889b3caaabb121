"""Folders of ours through stock transformers, on a model that the test makes."""

import pytest
import torch

import matrigami as mg
from matrigami.compress import (
    Grid,
    prune_,
    quantize_,
    register_transformers,
    shrink_,
    structure_,
    unstructured,
)
from matrigami.nn import StructuredLinear

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
TOKENS = {"input_ids": torch.arange(80).view(4, 20) * 7 % 64}


@pytest.fixture
def model(llama):
    return llama()


def small(model):
    """Every kind of layer at once: quantised, pruned, structured."""
    values = quantize_(model, [TOKENS], Grid(3, 16), targets="*.q_proj").values
    values |= quantize_(model, [TOKENS], Grid(4, 16, symmetric=False), targets="*.k_proj").values
    prune_(model, [TOKENS], unstructured(0.7), targets="*.o_proj")
    structure_(model, [TOKENS], mg.Monarch(4), targets="*.up_proj")
    structure_(model, [TOKENS], mg.LowRank(rank=4), targets="*.down_proj")
    return values


def test_the_numbers_are_those_of_the_model(model, tmp_path):
    folder = mg.save(model, tmp_path / "small", small(model))
    register_transformers()
    register_transformers()  # again: nothing
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(again.model.layers[1].mlp.up_proj, StructuredLinear)
    assert type(again.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(again(**TOKENS).logits, model(**TOKENS).logits)
        assert torch.equal(mg.load(folder)(**TOKENS).logits, model(**TOKENS).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert again.generate(TOKENS["input_ids"][:, :4], max_new_tokens=3, do_sample=False).shape == (
        4,
        7,
    )
    again.save_pretrained(tmp_path / "theirs")  # structured: only with us; but nothing is lost


def test_shrunken_models_too(model, tmp_path):
    report = shrink_(model, [TOKENS], 0.25, targets="*.down_proj")
    folder = mg.save(model, tmp_path / "small", report.values)
    register_transformers()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.model.layers[0].mlp.up_proj.out_features == 48
    with torch.no_grad():
        assert torch.equal(again(**TOKENS).logits, model(**TOKENS).logits)


def test_a_damaged_file_is_refused(model, tmp_path):
    folder = mg.save(model, tmp_path / "small", small(model))
    path = folder / "matrigami.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    register_transformers()
    with pytest.raises(ValueError, match="its hash differs"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_who_does_not_know_us_gets_no_half_model(model, tmp_path, monkeypatch):
    folder = mg.save(model, tmp_path / "small", small(model))
    for table in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        known = getattr(transformers.quantizers.auto, table)
        monkeypatch.delitem(known, "matrigami", raising=False)
    with pytest.raises(OSError, match="no file named model"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_dense_files_do_not_name_us(model, tmp_path):
    folder = mg.save(model, tmp_path / "small", small(model))
    register_transformers()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    mg.nn.to_dense_(again)
    plain = mg.compress.save_dense(again, tmp_path / "plain")
    dense = transformers.AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        torch.testing.assert_close(dense(**TOKENS).logits, model(**TOKENS).logits)
