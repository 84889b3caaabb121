"""Packing against the definition, and files that other programs load."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from matrigami.compress import (
    Grid,
    packed,
    quantize_,
    save_compressed_tensors,
    save_dense,
    save_gptq,
    unpacked,
)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 31, 32, 50])
def test_codes_are_a_bit_stream(bits, n):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, n)).to(torch.int8)
    words = packed(codes, bits)
    for row, line in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum((code + 2 ** (bits - 1)) << (bits * j) for j, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in line] == [
            number >> (32 * i) & 0xFFFFFFFF for i in range(len(line))
        ]
    assert torch.equal(unpacked(words, bits, n), codes)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="take 2"):
        unpacked(torch.zeros(1, 3, dtype=torch.int32), 4, 10)


def quantised(grid):
    model = nn.Sequential(
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).float()
    report = quantize_(model, [torch.randn(16, 32, dtype=torch.float32)], grid)
    return model, report.values


def test_compressed_tensors_hold_the_numbers_of_the_model(tmp_path):
    model, values = quantised(Grid(4, 8, symmetric=False))
    folder = save_compressed_tensors(model, values, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    for name in ("0", "2"):
        m, n = tensors[f"{name}.weight_shape"].tolist()
        codes = unpacked(tensors[f"{name}.weight_packed"], 4, n).float()
        zeros = unpacked(tensors[f"{name}.weight_zero_point"].mT, 4, m).mT.float()
        steps = tensors[f"{name}.weight_scale"]
        W = (codes - zeros.repeat_interleave(8, 1)) * steps.repeat_interleave(8, 1)
        assert torch.equal(W, model.get_submodule(name).weight)
    assert torch.equal(tensors["4.weight"], model[4].weight)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["4"]
    assert config["config_groups"]["group_0"]["targets"] == ["0", "2"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_files_hold_the_numbers_of_the_model(tmp_path, symmetric):
    model, values = quantised(Grid(4, 8, symmetric=symmetric))
    folder = save_gptq(model, values, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    codes = unpacked(tensors["0.qweight"].mT, 4, 32).mT.int() + 8
    zeros = (unpacked(tensors["0.qzeros"], 4, 16).int() + 8 + 1) % 16  # version 1 stores one less
    steps = tensors["0.scales"].float()
    group = tensors["0.g_idx"].long()
    W = ((codes - zeros[group]) * steps[group]).mT
    torch.testing.assert_close(W, model[0].weight, rtol=1e-3, atol=1e-6)


def test_dense_files_hold_the_numbers_of_the_model(tmp_path):
    model, _ = quantised(Grid(4, 8))
    tensors = load_file(save_dense(model, tmp_path / "out") / "model.safetensors")
    assert {n: torch.equal(t, tensors[n]) for n, t in model.state_dict().items()} == dict.fromkeys(
        tensors, True
    )


def test_a_folder_that_exists_is_left_alone(tmp_path):
    model, values = quantised(Grid(4, 8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    for save in (lambda to: save_dense(model, to), lambda to: save_gptq(model, values, to)):
        with pytest.raises(ValueError, match="exists"):
            save(tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_what_a_format_does_not_know_is_refused(tmp_path):
    model, values = quantised(Grid(3, 8))
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        save_gptq(model, values, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_transformers_load_the_files_to_the_bit(llama, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("compressed_tensors", reason="needs the extra hf")
    model = llama()
    tokens = torch.randint(0, 64, (4, 20))
    for bits, group in ((4, 16), (3, 32), (8, None), (2, 24)):
        report = quantize_(model, [{"input_ids": tokens}], Grid(bits, group))
        folder = save_compressed_tensors(model, report.values, tmp_path / f"{bits}")
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)
