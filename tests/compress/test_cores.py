"""Structured layers whose tensors are rounded: numbers, files, journals, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import matrigami as mg
from matrigami import BlockTensorTrain, Kronecker, LowRank, Monarch, TensorTrain
from matrigami.compress import (
    Grid,
    compress_,
    prune_,
    quantize_,
    quantized_values,
    save_compressed_tensors,
    save_dense,
    unstructured,
)
from matrigami.nn import StructuredConv, StructuredLinear, replace_, to_dense_
from tests.compress.test_journal import Killed, killed_after

STRUCTURES = [
    LowRank(rank=6),
    Monarch(blocks=4),
    BlockTensorTrain(rank=2),
    Kronecker(),
    TensorTrain(rank=3),
    Monarch(blocks=5, pad=True),
]

each_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)


def layers(structure, middle=StructuredLinear):
    first = middle(16, 24, structure)
    return nn.Sequential(first, nn.Tanh(), middle(24, 16, structure), nn.Linear(16, 5)).float()


def inputs(size=96):
    """Vectors that hang together."""
    mixing = 2 * torch.randn(4, 16)
    return [(torch.randn(size, 4) @ mixing + 0.3 * torch.randn(size, 16)).float() for _ in range(8)]


def state(model):
    return [(p.data_ptr(), p.requires_grad) for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@each_structure
def test_eight_bits_change_little_and_parameters_stay(structure):
    model, data = layers(structure), inputs()
    model[0].requires_grad_(False)
    given, before = copy.deepcopy(model), state(model)
    report = quantize_(model, data, Grid(8))
    assert state(model) == before
    assert list(report.values) == ["0", "2"]
    assert list(report.left) == ["3.weight"]
    x = torch.cat(data)
    assert not equal(model, given)
    assert (model(x) - given(x)).norm() < 0.01 * given(x).norm()


@each_structure
@pytest.mark.parametrize("two_sided", [False, True])
def test_three_bits_lose_less_than_rounding_to_nearest(structure, two_sided):
    model, data = layers(structure), inputs()
    report = quantize_(model, data, Grid(3, 8), two_sided=two_sided)
    for told in report.layers:
        assert 0 < told.loss < told.simple
        cores = report.values[told.name]
        stored = sum(core.stored_bits + 16 * core.scale.numel() for core in cores.values())
        assert told.bits * sum(core.codes.numel() for core in cores.values()) == stored
        assert told.macs == model.get_submodule(told.name).cost().macs


@each_structure
def test_codes_come_back_to_the_bit(tmp_path, structure):
    dtype = torch.bfloat16 if isinstance(structure, LowRank) else torch.float32
    model = layers(structure).to(dtype)
    data = [x.to(dtype) for x in inputs()]
    report = quantize_(model, data, Grid(4, 4, symmetric=False))
    folder = mg.save(model, tmp_path / "codes", report.values)
    again = mg.load(folder, into=layers(structure))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert equal(again, model)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 5))
    assert equal(mg.load(folder, into=dense), model)
    assert quantized_values(folder) == {}


def test_codes_are_smaller_than_numbers(tmp_path):
    model = nn.Sequential(StructuredLinear(128, 128, Monarch(blocks=4)), nn.Linear(128, 2)).float()
    report = quantize_(model, [torch.randn(64, 128).float()] * 4, Grid(4), damping=0.01)
    folders = [mg.save(model, tmp_path / name, v) for name, v in (("a", report.values), ("b", {}))]
    few, many = ((path / "matrigami.safetensors").stat().st_size for path in folders)
    assert few < many / 4


def test_a_killed_call_goes_on_and_ends_the_same(tmp_path):
    model, data = layers(Monarch(blocks=4)), inputs()
    whole, broken, again = (copy.deepcopy(model) for _ in range(3))
    methods = {"0": Grid(3, 4), "2": Grid(4, None, symmetric=False), "3": unstructured(0.5)}
    expected = compress_(whole, data, methods)
    with pytest.raises(Killed):
        compress_(broken, data, methods, journal=tmp_path / "j", progress=killed_after(3))
    report = compress_(again, data, methods, journal=tmp_path / "j")
    assert report.layers == expected.layers
    assert equal(again, whole)
    assert equal(mg.load(mg.save(again, tmp_path / "out", report.values), into=model), whole)


def test_convolutions_and_layers_that_nothing_reaches():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(48, 3)).float()
    replace_(model, {"0": LowRank(rank=3)})
    model.never = StructuredLinear(8, 8, LowRank(rank=2)).float()
    never, model.forward = model.never, lambda x: model[2](model[1](model[0](x)))
    report = quantize_(model, [torch.randn(9, 4, 8).float()] * 4, Grid(4), targets=["0.*", "never"])
    assert isinstance(model[0], StructuredConv)
    assert [told.rows > 0 for told in report.layers] == [True, False]
    assert torch.equal(never.U, report.values["never"]["U"].dense())


def test_what_cannot_be_rounded_is_refused_and_shared_tensors_are_left():
    shared = layers(LowRank(rank=4), lambda *sizes: StructuredLinear(16, 16, sizes[2]))
    shared[2].U = shared[0].U
    with pytest.raises(ValueError, match="no layer of one matrix"):
        quantize_(shared, inputs(), Grid(4), targets=["0", "2"])
    capped = layers(LowRank(rank=4))
    capped[0] = StructuredLinear(16, 24, LowRank(rank=4), rms_cap=True).float()
    model = layers(LowRank(rank=4))
    tries = [
        (capped, {"*": Grid(4)}, "^0: its weight is computed from others"),
        (model, {"0": unstructured(0.5), "2": Grid(4)}, "^0: it is structured already"),
    ]
    for net, methods, words in tries:
        before = copy.deepcopy(net)
        with pytest.raises(ValueError, match=words):
            compress_(net, inputs(), methods)
        assert equal(net, before)
    with pytest.raises(ValueError, match="only 3 is one matrix"):
        prune_(model, inputs(), unstructured(0.5))


def test_files_of_others_say_what_they_do_not_know(tmp_path):
    model = layers(BlockTensorTrain(rank=2))
    values = quantize_(model, inputs(), Grid(4)).values
    dense = copy.deepcopy(model)
    to_dense_(dense)
    for net in (model, dense):
        with pytest.raises(ValueError, match=r"0 is a .*the format knows nn\.Linear alone"):
            save_compressed_tensors(net, values, tmp_path / "out")
    save_dense(dense, tmp_path / "dense")
    model[0].get_parameter(model[0].factor_names[0]).data.mul_(1.5)
    with pytest.raises(ValueError, match="0 has changed since it was quantised"):
        mg.save(model, tmp_path / "changed", values)
    assert not (tmp_path / "changed").exists()
