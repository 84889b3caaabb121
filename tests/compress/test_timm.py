"""Models of timm: a ViT, and a residual network of convolutions."""

import copy

import pytest
import torch

import matrigami as mg
from matrigami.compress import Grid, prune_, quantize_, shrink_, structure_, unstructured
from matrigami.nn import replace_

timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

KINDS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2},
    "test_resnet": {},
}


@pytest.fixture(params=KINDS)
def make(request):
    """Makes a model of one kind."""
    torch.set_default_dtype(torch.float32)
    return lambda: timm.create_model(request.param, num_classes=5, **KINDS[request.param]).eval()


@pytest.fixture
def data():
    return [torch.randn(2, 3, 32, 32, dtype=torch.float32) for _ in range(4)]


def test_layers_are_rounded_pruned_and_restructured(make, data):
    model = make()
    count = len(mg.nn.chosen(model))
    for compress in (
        lambda m: quantize_(m, data, Grid(4, 16), two_sided=True),
        lambda m: prune_(m, data, unstructured(0.5)),
        lambda m: structure_(m, data, mg.LowRank(rank=0.25)),
    ):
        report = compress(copy.deepcopy(model))
        assert len(report.layers) == count
        assert all(layer.loss <= layer.simple * (1 + 1e-6) for layer in report.layers)
        assert all(layer.rows > 0 for layer in report.layers)


def test_what_surgery_makes_is_saved_and_loaded(make, data, tmp_path):
    model = make()
    before = sum(p.numel() for p in model.parameters())
    replace_(model, mg.LowRank(rank=0.25))
    assert sum(p.numel() for p in model.parameters()) < before
    again = mg.load(mg.save(model, tmp_path / "out"), into=make())
    with torch.no_grad():
        assert torch.equal(again(data[0]), model(data[0]))


def test_neurons_of_a_vit_go(data):
    torch.set_default_dtype(torch.float32)
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=5, **KINDS[name]).eval()
    report = shrink_(model, data, 0.25, targets="*.mlp.fc2")
    assert [model.get_submodule(r.name).in_features for r in report.layers] == [144, 144]
