"""Learning rates for each factor, and the coordinate check that they transfer across widths."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from matrigami import Structure
from matrigami.nn import (
    StructuredLinear,
    adam_rule,
    coordinate_check,
    coordinate_slope,
    param_groups,
    sgd_rule,
)
from matrigami.operators import Fan
from matrigami.structures import (
    BlockTensorTrain,
    Dense,
    Einsum,
    Kronecker,
    LowRank,
    Monarch,
    TensorTrain,
)


def scales(model: nn.Module, **options) -> dict[str, float]:
    """The multiplier of each parameter by name."""
    groups = param_groups(model, lr=2.0, **options)
    by_id = {id(p): g["lr"] / 2.0 for g in groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


def test_dense_layers_shrink_with_the_width():
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256))
    wanted = {"0.weight": 0.25, "0.bias": 1.0, "1.weight": 1.0, "1.bias": 1.0}
    assert scales(model, base_width=64, width=256) == wanted
    assert set(scales(model).values()) == {1.0}


@pytest.mark.parametrize(
    ("structure", "wanted"),
    [
        (Dense(), {"entries": 1.0}),
        (BlockTensorTrain(rank=1), {"cores_0": 16.0, "cores_1": 16.0}),  # sqrt(d) / 2
        (BlockTensorTrain(rank=4), {"cores_0": 16.0, "cores_1": 4.0}),  # f_in: alpha, gamma r
        (Monarch(blocks=32), {"left": 16.0, "right": 16.0}),
        (Monarch(blocks=4), {"left": 1024 / 256 / 2, "right": 1024 / 256 / 2}),
        (Kronecker(), {"left": 16.0, "right": 16.0}),
        (TensorTrain(rank=4), {"cores_0": 4.0, "cores_1": 16.0}),  # f_in: n_i k
        (LowRank(rank=32), {"U": 16.0, "V": 0.5}),  # f_in: r, d_in
    ],
    ids=str,
)
def test_adam_multipliers_of_a_square_layer(structure, wanted):
    """`(d_in / f_in) / factors`, d = 1024."""
    layer = StructuredLinear(1024, 1024, structure, bias=False)
    assert scales(layer) == wanted
    shrunk = {name: scale / 16 for name, scale in wanted.items()}
    assert scales(layer, base_width=64, width=1024) == shrunk


def test_multipliers_of_a_rectangle():
    """3072 -> 512: inputs (32, 96), outputs (16, 32); the first core sees 32 of 3072 inputs."""
    layer = StructuredLinear(3072, 512, BlockTensorTrain(rank=2), bias=False)
    fans = [tuple(fan[:2]) for fan in layer.fans]
    n1 = layer.cores_0.shape[-2]
    n2 = 3072 // n1
    assert fans == [(n1, 2 * 16), (2 * n2, 32)]
    assert scales(layer) == {"cores_0": 3072 / n1 / 2, "cores_1": 3072 / (2 * n2) / 2}


def test_rules():
    fan = Fan(inputs=8, outputs=32)
    assert adam_rule(fan, inputs=64, outputs=128, factors=2) == 4.0
    assert sgd_rule(fan, inputs=64, outputs=128, factors=2) == (32 / 8) / (128 / 64) / 2


@pytest.mark.parametrize(
    ("inputs", "outputs", "wanted"), [(256, 64, 0.5 / 16), (64, 256, 1 / 8), (256, 256, 1 / 16)]
)
def test_initial_spread(inputs, outputs, wanted):
    """`sqrt(min(f_in, f_out)) / f_in`."""
    assert Fan(inputs, outputs).std == pytest.approx(wanted)
    layer = StructuredLinear(inputs, outputs, Dense())
    assert float(layer.entries.detach().std()) == pytest.approx(wanted, rel=0.05)


def test_spectral_norm_is_of_order_one():
    """0.71, 2.88 and 1.98 are what Gaussian matrices of these sizes give."""
    for inputs, outputs, wanted in ((256, 64, 0.75), (64, 256, 3.0), (256, 256, 2.0)):
        weight = StructuredLinear(inputs, outputs, Dense()).matrix().dense().detach()
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(wanted, rel=0.1)


def test_fixed_layers_and_width_of_the_model():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 128
            self.read = nn.Linear(10, 128)
            self.hidden = StructuredLinear(128, 128, LowRank(rank=8))

    wanted = {"read.weight": 1.0, "read.bias": 1.0, "hidden.bias": 1.0}
    got = scales(Net(), base_width=64, fixed=["read"])
    assert {name: got[name] for name in wanted} == wanted
    assert got["hidden.U"] == 128 / 8 / 2 / 2


def test_names_of_no_layer_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.LayerNorm(4))
    for name in ("read", "0", "1", ""):
        with pytest.raises(ValueError, match="no such layers") as caught:
            param_groups(model, lr=1.0, fixed=[name])
        assert len(str(caught.value).splitlines()) <= 3


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match="width of the model is not known") as caught:
        param_groups(nn.Linear(4, 4), lr=1.0, base_width=64)
    assert len(str(caught.value).splitlines()) <= 3


def test_tied_and_frozen_parameters():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    tied[1].bias.requires_grad_(False)
    parameters = [p for group in param_groups(tied, lr=1.0) for p in group["params"]]
    assert len(parameters) == 2
    assert {id(p) for p in parameters} == {id(tied[0].weight), id(tied[0].bias)}


def test_groups_hold_every_parameter_once_and_feed_an_optimizer():
    model = nn.Sequential(StructuredLinear(32, 32, Monarch(blocks=4)), nn.Linear(32, 4))
    groups = param_groups(model, lr=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [g["lr"] for g in groups] == sorted(g["lr"] for g in groups)
    optimizer = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert [g["lr_scale"] * 0.1 for g in optimizer.param_groups] == pytest.approx(
        [g["lr"] for g in groups]
    )


# ---------------------------------------------------------------- coordinate check


WIDTHS = (64, 256, 1024)

FAMILIES: dict[str, Callable[[int], Structure]] = {
    "dense": lambda width: Dense(),
    "btt(rank=1)": lambda width: BlockTensorTrain(rank=1),
    "btt(rank=4)": lambda width: BlockTensorTrain(rank=4),
    "monarch": lambda width: Monarch(blocks=round(width**0.5)),
    "kronecker": lambda width: Kronecker(),
    "tt(rank=4)": lambda width: TensorTrain(rank=4),
    "lowrank": lambda width: LowRank(),
    "einsum": lambda width: Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0.25)),
}
"""The structure of a hidden layer of each width."""


class Net(nn.Module):
    """Fixed random features, one structured layer of the width, a head that starts at zero."""

    def __init__(self, width: int, structure: Structure, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.width = width
        self.read = nn.Linear(16, width).requires_grad_(False)
        self.hidden = StructuredLinear(width, width, structure)
        self.head = StructuredLinear(width, 4, Dense(), zero_init=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(torch.relu(self.read(x))).relu())


def naive(model: nn.Module) -> list[dict]:
    """The rule of dense layers on every factor: `base_width / width`."""
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    return [{"params": weights, "lr": 1e-3 * 64 / model.width}]


def ruled(model: nn.Module) -> list[dict]:
    """The structure-aware rule."""
    return param_groups(model, 1e-3, base_width=64)


def slope(family: str, groups: Callable[[nn.Module], list[dict]], seeds: int = 6) -> float:
    """Of the change of the hidden features against the width, averaged over seeds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    y = torch.randint(0, 4, (64,), generator=generator)
    total = dict.fromkeys(WIDTHS, 0.0)
    for seed in range(seeds):
        build = partial(build_net, family=family, seed=seed)
        changes = coordinate_check(build, WIDTHS, groups, x, y, features="hidden", steps=5)
        total = {width: total[width] + change for width, change in changes.items()}
    return coordinate_slope(total)


def build_net(width: int, family: str, seed: int) -> Net:
    return Net(width, FAMILIES[family](width), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_updates_do_not_depend_on_the_width(family):
    assert abs(slope(family, ruled)) < 0.1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in {"dense", "lowrank"}])
def test_feature_updates_vanish_with_the_rule_of_dense_layers(family):
    """For dense layers both rules are one; for low rank only the constant differs."""
    assert slope(family, naive) < -0.2


def test_feature_updates_of_the_whole_einsum_family(monkeypatch):
    """With all seven sizes growing the second factor is wide: a drift as `d^-0.14` is left."""
    family = Einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25))
    monkeypatch.setitem(FAMILIES, "all seven", lambda width: family)
    assert abs(slope("all seven", ruled, seeds=2)) < 0.2
    assert slope("all seven", naive, seeds=2) < -0.4


def test_slope_of_a_power_law():
    assert coordinate_slope({w: 3 * w**-0.25 for w in WIDTHS}) == pytest.approx(-0.25)
