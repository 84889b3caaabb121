"""Models written and read: to the bit, checked, and all or nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import matrigami as mg
from matrigami.compress import Grid, prune_, quantize_, quantized_values, unstructured
from matrigami.nn import StructuredConv, replace_
from matrigami.structures import EXAMPLES


class Net(nn.Module):
    """A tied head, a convolution, an MLP and buffers."""

    def __init__(self, width=16):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 6))
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.norm(self.conv(self.table(tokens).mT)).mT
        return self.head(self.mlp(x))


TOKENS = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(0))


def same(a, b):
    return torch.equal(a.eval()(TOKENS), b.eval()(TOKENS)) and all(
        x.dtype == y.dtype for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.fixture
def compressed():
    """Structured, then quantised, then pruned, each another layer."""
    model = Net().to(torch.bfloat16).float().eval()
    replace_(model, {"conv": mg.LowRank(rank=3), "mlp.2": mg.Monarch(blocks=2)})
    report = quantize_(model, [TOKENS], Grid(3, 8), targets="mlp.0")
    model.head.weight.data[:, 2:] = 0
    return model, report.values


def test_structured_quantised_and_pruned_layers_come_back_to_the_bit(tmp_path, compressed):
    model, values = compressed
    folder = mg.save(model, tmp_path / "out", values)
    assert sorted(p.name for p in folder.iterdir()) == ["matrigami.json", "matrigami.safetensors"]
    tensors = load_file(folder / "matrigami.safetensors")
    assert {name.removeprefix("mlp.0.") for name in tensors if name.startswith("mlp.0.")} == {
        "bias",
        "weight.codes",
        "weight.scale",
    }
    assert tensors["table.weight.values"].numel() == 18
    other = Net()
    again = mg.load(folder, into=other)
    assert again is other
    assert isinstance(again.conv, StructuredConv)
    assert again.head.weight is again.table.weight
    assert same(again, model)
    assert torch.equal(quantized_values(folder)["mlp.0"].codes, values["mlp.0"].codes)
    assert same(mg.load(folder, into=mg.load(folder, into=Net())), model)  # structured already


def test_the_type_of_the_file_counts(tmp_path):
    model = Net().to(torch.bfloat16).eval()
    report = quantize_(model, [TOKENS], Grid(4, 8), targets="mlp.*")
    folder = mg.save(model, tmp_path / "out", report.values)
    assert same(mg.load(folder, into=Net()), model)


def test_half_of_the_weights_take_little_more_than_half_of_the_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).float()
    prune_(model, [torch.randn(99, 64).float()], unstructured(0.5), targets="0")
    folder = mg.save(model, tmp_path / "out")
    size = (folder / "matrigami.safetensors").stat().st_size
    assert 64 * 64 * 2 + 64 * 8 <= size < 64 * 64 * 2 + 64 * 8 + 300
    again = mg.load(folder, into=nn.Sequential(nn.Linear(64, 64, bias=False)))
    assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in {"blr", "hodlr"}])
def test_every_structure_comes_back(tmp_path, name):
    make = lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))  # noqa: E731
    model = make()
    replace_(model, EXAMPLES[name], init="random")
    again = mg.load(mg.save(model, tmp_path / "out"), into=make())
    assert again[0].structure == EXAMPLES[name]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    x = torch.randn(3, 16)
    torch.testing.assert_close(again(x), model(x))  # strides may differ, and with them the rounding


def test_shared_structured_layers_stay_shared(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model

    model = make()
    replace_(model, mg.LowRank(rank=2))
    again = mg.load(mg.save(model, tmp_path / "out"), into=make())
    assert again[0].U is again[1].U
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_a_layer_that_changed_after_it_was_quantised_is_refused(tmp_path, compressed):
    model, values = compressed
    model.mlp[0].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"mlp\.0 has changed"):
        mg.save(model, tmp_path / "out", values)
    assert list(tmp_path.iterdir()) == []


def wider(folder):
    return Net(width=17)


def untied(folder):
    model = Net()
    model.head = nn.Linear(6, 8, bias=False)
    return model


def truncated(folder):
    path = folder / "matrigami.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def foreign(folder):
    (folder / "matrigami.json").unlink()


def newer(folder):
    edited(folder, version=2)


def unknown(folder):
    edited(folder, structures={"conv": {"name": "os:system", "fields": {}}})


def elsewhere(folder):
    edited(folder, structures={"../x": {"name": "lowrank", "fields": {"rank": 1}}})


def other_bits(folder):
    told = json.loads((folder / "matrigami.json").read_text())["tensors"]
    edited(folder, tensors=told | {"mlp.0.weight": told["mlp.0.weight"] | {"bits": 8}})


def no_codes(folder):
    from matrigami.compress._folder import sha256

    path = folder / "matrigami.safetensors"
    tensors = load_file(path)
    del tensors["mlp.0.weight.codes"]
    save_file(tensors, path)
    edited(folder, sha256=sha256(path))


def edited(folder, **changes):
    path = folder / "matrigami.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wider, "not the one that was saved"),
        (untied, "not the one that was saved"),
        (truncated, "hash differs"),
        (foreign, "No such file"),
        (newer, "version 2 is not 1"),
        (unknown, "'os:system' is not known"),
        (elsewhere, r"no layer \.\./x"),
        (other_bits, r"mlp\.0\.weight do not fit"),
        (no_codes, r"mlp\.0\.weight do not fit.*codes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, compressed, spoil, message):
    model, values = compressed
    folder = mg.save(model, tmp_path / "out", values)
    target = spoil(folder) or Net()
    before, modules = copy.deepcopy(target.state_dict()), list(target.modules())
    with pytest.raises(ValueError, match=message):
        mg.load(folder, into=target)
    assert list(target.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


def test_a_folder_without_a_configuration_names_what_made_it(tmp_path):
    folder = mg.save(Net(), tmp_path / "out", factory="my.models:net")
    with pytest.raises(ValueError, match=r"my\.models:net.*into=model"):
        mg.load(folder)
    with pytest.raises(ValueError, match="exists"):
        mg.save(Net(), tmp_path / "out")


def test_models_of_transformers_are_made_from_their_configuration(llama, tmp_path):
    model = llama()
    tokens = torch.randint(0, 64, (4, 20))
    replace_(model, mg.LowRank(rank=8), targets="*.mlp.*")
    report = quantize_(model, [{"input_ids": tokens}], Grid(4, 16), targets="*.self_attn.*")
    folder = mg.save(model, tmp_path / "out", report.values)
    again = mg.load(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_files_of_a_folder_can_be_read_by_those_who_may_read_others(tmp_path):
    """And what a loader wants beside the weights comes along; weights of the source do not."""
    source = tmp_path / "source"
    source.mkdir()
    beside = ["chat_template.jinja", "preprocessor_config.json", "spiece.model", "tokenizer.json"]
    for name in (*beside, "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text("{}")
        (source / name).chmod(0o400)
    folder = mg.save(nn.Linear(3, 2), tmp_path / "out", source=source)
    (tmp_path / "other").write_text("")
    usual = (tmp_path / "other").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert sorted(modes) == sorted([*beside, "matrigami.json", "matrigami.safetensors"])
    assert set(modes.values()) == {usual}
