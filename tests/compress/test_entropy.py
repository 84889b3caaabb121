"""The entropy coder against the entropy, and files of entropy-coded weights."""

import json

import pytest
import torch
from torch import nn

import matrigami as mg
from matrigami.compress import entropy, round_waterfill, set_weight, weight
from matrigami.compress._entropy import coded, restored

pytest.importorskip("constriction", reason="needs the extra entropy")


def lattice(bits=2.0, m=96, n=128):
    """A weight whose columns matter unequally."""
    W = torch.randn(m, n)
    A = torch.diag(torch.linspace(0.1, 10, n).square())
    return round_waterfill(W, A, bits=bits, damping=1e-3).value


@pytest.mark.parametrize("bits", [0.3, 2.0, 6.0])
def test_the_codes_come_back_in_as_many_bits_as_they_are_worth(bits):
    value = lattice(bits)
    told, tensors = coded(value)
    again = restored(json.loads(json.dumps(told)), tensors)
    assert torch.equal(again.codes, value.codes)
    assert torch.equal(again.dense(), value.dense())
    size = sum(tensors[key].nbytes for key in ("words", "row_sizes", "column_sizes"))
    assert 8 * size / value.codes.numel() < 1.1 * entropy(value.codes) + 0.05


def test_zeros_and_single_values():
    for codes in (torch.zeros(3, 4), torch.ones(2, 2), torch.tensor([[0.0, 0.0], [0.0, -7.0]])):
        value = mg.compress.LatticeMatrix(
            codes.to(torch.int32), torch.ones(len(codes)), torch.ones(codes.shape[1])
        )
        assert torch.equal(restored(*coded(value)).codes, value.codes)


def test_a_damaged_stream_is_refused():
    told, tensors = coded(lattice())
    words = tensors["words"].clone()
    words[len(words) // 2] ^= 1
    with pytest.raises(ValueError, match="hash differs"):
        restored(told, tensors | {"words": words})
    with pytest.raises(ValueError, match="tables has the shape"):
        restored(told, tensors | {"tables": tensors["tables"][1:]})
    with pytest.raises(ValueError, match="codes of"):
        restored(told, tensors | {"tables": tensors["tables"].flip(0) + 1})
    with pytest.raises(ValueError, match="the classes are not"):
        restored(told, tensors | {"row_sizes": tensors["row_sizes"] + 1})


def test_files(tmp_path):
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 5))
    A = torch.diag(torch.linspace(0.1, 10, 128).square())
    value = round_waterfill(weight(model[0]), A, bits=2.0, damping=1e-3).value
    set_weight(model[0], value.dense())
    folder = mg.save(model, tmp_path / "small", {"0": value})
    size = (folder / "matrigami.safetensors").stat().st_size
    assert size < 0.2 * 4 * (128 * 96 + 96 * 5)
    again = mg.load(folder, into=nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 5)))
    x = torch.randn(3, 128)
    assert torch.equal(again(x), model(x))
