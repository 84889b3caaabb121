"""One way to compress after another: what the first has done stays."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import matrigami as mg
from matrigami.compress import (
    Grid,
    n_of_m,
    prune_,
    quantize_,
    round_ldl,
    unstructured,
    weight,
)
from tests.compress.moments import layer

GRIDS = (Grid(4, group=16), Grid(3, group=5, symmetric=False), Grid(2, group=None))


def lost(E, A, B):
    return float(((E.mT if B is None else E.mT @ B).mT * (E @ A)).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("two_sided", [False, True])
def test_zeros_stay_and_the_others_make_up_for_them(grid, two_sided):
    """Better than to round to nearest, which keeps zeros too, and than to put them back."""
    W, A, B = layer(24, 32)
    B = B if two_sided else None
    mask = unstructured(0.5)(W)
    W = W * mask
    kept = round_ldl(W, A, B, grid=grid, keep_zeros=True).value.dense()
    filled = round_ldl(W, A, B, grid=grid).value.dense()
    assert bool((kept[~mask] == 0).all())
    assert bool((filled[~mask] != 0).any())
    errors = [lost(W - V, A, B) for V in (kept, grid.round(W).dense(), filled * mask)]
    assert errors[0] < min(errors[1:])


@pytest.fixture
def pruned():
    """A model that is pruned 2 of 4, its last layer as it was, and its data."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    model.append(nn.Linear(16, 5))
    mix = torch.randn(24, 24) * torch.logspace(-1, 0, 24)
    data = [torch.randn(40, 24) @ mix for _ in range(4)]
    prune_(model, data, n_of_m(2, 4))
    return model, data


@pytest.mark.parametrize("two_sided", [False, True])
def test_pruned_models_stay_pruned_when_they_are_quantised(pruned, two_sided):
    model, data = pruned
    zeros = [weight(model[i]) == 0 for i in (0, 2)]
    report = quantize_(model, data, Grid(8, group=None), two_sided=two_sided)
    assert all(bool((weight(model[i])[z] == 0).all()) for i, z in zip((0, 2), zeros, strict=True))
    assert [one.macs for one in report.layers] == [24 * 32 // 2, 32 * 16 // 2]
    assert all("50% zeros kept" in one.note for one in report.layers)
    assert all(one.bits < 1 + 4 + 16 / 24 + 0.01 for one in report.layers)  # mask, codes, scale


def test_codes_of_pruned_layers_are_stored_without_zeros(pruned, tmp_path):
    model, data = pruned
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for i in (0, 2):
            dense[i].weight.copy_(layer(*dense[i].weight.shape)[0])
    sizes = {}
    for name, given in (("dense", dense), ("pruned", model)):
        values = quantize_(given, data, Grid(4, group=None, symmetric=False)).values
        folder = mg.save(given, tmp_path / name, values)
        stored = load_file(folder / "matrigami.safetensors")
        sizes[name] = sum(t.nbytes for t in stored.values())
        found = mg.load(folder, into=copy.deepcopy(dense))
        for a, b in zip(found.parameters(), given.parameters(), strict=True):
            assert torch.equal(a, b)
    assert sizes["dense"] - sizes["pruned"] >= (24 * 32 + 32 * 16) // 8  # of 4 bits 1 goes
