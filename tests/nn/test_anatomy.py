"""What every kind of layer is: the laws, and readers that agree."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from matrigami import Monarch
from matrigami.curvature import capture, ekfac, fisher, kfac
from matrigami.nn import (
    Part,
    Role,
    StructuredLinear,
    anatomy,
    coordinate_check,
    coordinate_slope,
    param_groups,
    parts,
    uses,
)
from matrigami.optim import KFAC, OPTIMIZERS, SOAP, Muon, plan
from matrigami.testing import LAYER_LAWS, check_layer
from tests.nn.kinds import KINDS, SEEN, Conv1D, Gated, LlamaRMSNorm, Registered, attention


@pytest.mark.parametrize("name", KINDS)
def test_laws(name: str):
    layer, *inputs = KINDS[name]()
    for p in layer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    check_layer(layer, *inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", KINDS)
def test_all_readers_agree(name: str):
    """Rates, plan and optimiser take the same matrices; curvature reads them or says why not."""
    layer = KINDS[name]()[0].float()
    matrices = {e.name for e in anatomy(layer, "test") if e.part.blocks is not None}
    scaled = {id(p) for g in param_groups(layer, 1.0, base_width=1, width=7) for p in g["params"]}
    assert scaled == {id(p) for p in layer.parameters()}
    for optimizer in OPTIMIZERS.values():
        rows = plan(layer, optimizer, head=()).rows
        assert {row.name for row in rows} == {name for name, _ in layer.named_parameters()}
        assert {row.name for row in rows if row.view is not None} <= matrices
    assert {row.name for row in plan(layer, SOAP).rows if row.view is not None} == matrices
    seen = all(part.is_seen for part in parts(layer).values())
    assert seen or name not in SEEN
    if seen:
        capture(layer)
        return
    with pytest.raises(
        TypeError, match=rf"parameters of the model itself, an? {type(layer).__name__}"
    ):
        capture(layer)


@pytest.mark.parametrize("make", [nn.Conv3d, nn.ConvTranspose3d])
def test_kfac_trains_what_its_plan_says(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(2, 4, 2), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(6, 2, 3, 3, 3), torch.arange(6) % 3
    model(x)
    said = {row.name for row in plan(model, KFAC).rows if row.method == "KFAC"}
    assert said == {"0.weight", "2.weight"}
    optimizer, loss = KFAC(model, nn.CrossEntropyLoss()), nn.CrossEntropyLoss()
    before = float(loss(model(x), y).detach())
    for _ in range(10):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    watched = {n for n, p in model.named_parameters() if "watched" in optimizer.state[p]}
    assert watched == said
    assert float(loss(model(x), y).detach()) < before / 2


def scales(model: nn.Module, **options) -> dict[str, float]:
    groups = param_groups(model, 1.0, base_width=64, width=512, **options)
    by_id = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_rates_of_attention_and_gates():
    found = scales(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, device="meta"))
    matrices = {name for name in found if name.endswith("weight") and "norm" not in name}
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight"} < matrices
    assert {found[name] for name in matrices} == {1 / 8}
    assert {found[name] for name in set(found) - matrices} == {1.0}
    found = scales(nn.LSTM(512, 512, device="meta"))
    assert {n: found[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih")} == {
        "weight_ih": 1 / 8,
        "weight_hh": 1 / 8,
        "bias_ih": 1.0,
    }


class Mixed(nn.Module):
    """Fixed random features, one attention layer, a head that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.read, self.head = nn.Linear(16, width).requires_grad_(False), nn.Linear(width, 4)
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mixed = nn.Identity()
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        h = self.read(x).relu()
        return self.head(self.mixed(self.mix(h, h, h)[0]).relu().mean(1))


def slope(groups) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, 16, generator=generator)
    y = torch.randint(0, 4, (32,), generator=generator)
    widths = (64, 256, 512)
    return coordinate_slope(
        coordinate_check(Mixed, widths, groups, x, y, features="mixed", steps=5)
    )


def test_rates_of_attention_transfer():
    """What attention makes changes alike at every width; with one rate for all it explodes."""
    assert abs(slope(lambda model: param_groups(model, 1e-3, base_width=64))) < 0.1
    everything = ["mix.in_proj_weight", "mix.out_proj.weight"]
    flat = partial(param_groups, lr=1e-3, base_width=64, elementwise=everything)
    assert slope(flat) > 0.5


def test_rules_of_a_plan_are_followed_by_gates():
    """An LSTM takes the optimiser's rule as a dense layer does: no rule is handed over in vain."""
    model = nn.Sequential(nn.LSTM(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    routes = plan(model, SOAP)
    groups = param_groups(model, 0.01, base_width=16, width=64, rules=routes.rules)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {rates[id(model.get_parameter(name))] for name in routes.rules} == {0.005}


def test_rates_follow_the_fans():
    """A depthwise kernel sees no width; a bilinear form sees it twice."""
    assert scales(nn.Conv2d(8, 8, 3, groups=8, bias=False)) == {"weight": 1.0}
    assert scales(nn.Conv2d(8, 8, 3, groups=2, bias=False)) == {"weight": 1 / 8}
    assert scales(nn.Bilinear(8, 8, 8, bias=False)) == {"weight": 1 / 64}
    assert scales(nn.Bilinear(8, 8, 8, bias=False), fixed=[""]) == {"weight": 1.0}
    model = nn.Sequential(attention(bias=False))
    assert set(scales(model, fixed=["0", "0.out_proj"]).values()) == {1.0}
    assert set(scales(parametrizations.orthogonal(nn.Linear(8, 8))).values()) == {1 / 8, 1.0}


class Same(nn.Linear):
    """A subclass that computes what its parent does."""


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised at each call."""

    def forward(self, x):
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, W, self.bias)


class Hidden(nn.Conv2d):
    """The same, by the method that `forward` calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class LowRankAdapted(nn.Linear):
    """LoRA: more parameters, and another sum."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.A, self.B = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.zeros(m, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


def patched() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight)
    return layer


UNKNOWN = {
    "two matrices": (lambda: Gated(4, 3), "a Gated: W, V"),
    "another forward": (lambda: Standardised(4, 3, 2), "a Standardised: weight"),
    "another inner method": (lambda: Hidden(4, 3, 2), "a Hidden: weight"),
    "low rank adapted": (lambda: LowRankAdapted(4, 3), "a LowRankAdapted: weight, "),
    "patched": (patched, "a Linear: weight"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_is_refused_in_the_same_words(name: str):
    make, what = UNKNOWN[name]
    model, loss = nn.Sequential(make(), nn.Flatten()), nn.CrossEntropyLoss()
    batch = (torch.randn(2, 4, 3, 3), torch.zeros(2, dtype=torch.long))
    errors = []
    for read in (
        lambda: param_groups(model, 1e-3),
        lambda: plan(model),
        lambda: SOAP(model),
        lambda: KFAC(model, loss),
        lambda: kfac(model, loss, batch),
        lambda: ekfac(model, loss, batch),
        lambda: capture(model),
    ):
        with pytest.raises((ValueError, TypeError), match=f"0, {what}") as caught:
            read()
        errors.append(str(caught.value).split("\n"))
    assert {len(lines) for lines in errors} == {3}
    assert len({tuple(lines[1:]) for lines in errors}) == 1
    names = [f"0.{name}" for name, p in model[0].named_parameters() if p.ndim > 1]
    assert param_groups(model, 1e-3, elementwise=names)[0]["lr_scale"] == 1.0
    assert {row.method for row in plan(model, Muon, elementwise=names).rows} == {"Adam"}


def test_a_subclass_without_a_forward_is_its_parent():
    assert parts(Same(4, 3))["weight"].role is Role.MATRIX
    wrapped = nn.Linear(4, 3)

    def forward(*arguments):
        return plain(*arguments)

    plain = wrapped.forward
    forward.__wrapped__ = plain  # as functools.wraps and accelerate's hooks do
    wrapped.forward = forward
    assert parts(wrapped)["weight"].is_seen


def test_more_parameters_than_the_parent_has():
    layer = Same(4, 3)
    layer.gain = nn.Parameter(torch.ones(()))
    assert parts(layer)["gain"] == Part(Role.ELEMENTWISE)
    layer.table = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"the model itself, a Same: table\."):
        plan(layer)
    layer.table.requires_grad_(False)
    assert {row.name for row in plan(layer).rows} == {"weight", "bias", "gain"}


def test_the_head_is_the_last_layer_whatever_happens_to_it():
    def role(head: nn.Module, **options) -> Role:
        model = nn.Sequential(nn.Linear(4, 4), head, nn.LayerNorm(3))
        return {row.name: row.role for row in plan(model, **options).rows}["0.weight"]

    assert role(nn.Linear(4, 3).requires_grad_(False)) is Role.MATRIX
    assert role(nn.Linear(4, 3), elementwise=["1.weight"]) is Role.MATRIX
    assert role(parametrizations.weight_norm(nn.Linear(4, 3))) is Role.MATRIX
    assert role(StructuredLinear(4, 3, Monarch(blocks=1))) is Role.MATRIX
    assert role(nn.LSTM(4, 3)) is Role.HEAD


@pytest.mark.usefixtures("unchecked")
def test_curvature_of_a_layer_that_is_partly_seen():
    """Plan and estimator decide by the parameter: what the parent has is seen, the rest is not."""
    layer = Same(4, 3)
    layer.gain = nn.Parameter(torch.ones(()))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3))
    optimizer = KFAC(model, nn.CrossEntropyLoss())
    nn.CrossEntropyLoss()(model(torch.randn(5, 4)), torch.arange(5) % 3).backward()
    optimizer.step()
    assert bool(optimizer.state[layer.weight]["watched"].all())
    with pytest.raises(TypeError, match=r"0, a Same: gain\."):
        kfac(model, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.arange(5) % 3))


def test_gates_are_matrices_of_their_own():
    for layer, gates in ((nn.LSTM(4, 6, proj_size=3), 4), (nn.GRUCell(4, 6), 3), (nn.RNN(4, 6), 1)):
        found = {n.split("_l")[0]: p.blocks for n, p in parts(layer).items() if p.blocks}
        hidden = 3 if "weight_hr" in found else 6
        assert found["weight_ih"].stack == (gates, 6, 4)
        assert found["weight_hh"].stack == (gates, 6, hidden)
        assert hidden == 6 or found["weight_hr"].stack == (1, 3, 6)


@pytest.mark.usefixtures("unchecked")
def test_bags_by_offsets_are_refused():
    with pytest.raises(TypeError, match=r"shape \(3,\)"):
        uses(nn.EmbeddingBag(7, 4), torch.tensor([1, 2, 3]), None)


def test_a_law_finds_a_wrong_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    parts.register(Doubled)(lambda layer: parts(nn.Linear(4, 3)))
    with pytest.raises(AssertionError, match="taps_make_the_gradient_of_each_example"):
        check_layer(Doubled(4, 3), torch.randn(5, 4))
    with pytest.raises(AssertionError, match="every_parameter_has_one_role"):
        check_layer(Gated(4, 3), torch.randn(5, 4), laws=LAYER_LAWS[:1])


def test_curvature_of_registered_and_foreign_layers_is_that_of_the_matrix():
    model = nn.Sequential(Registered(5, 4), LlamaRMSNorm(4), nn.Tanh(), Conv1D(3, 4))
    batch, loss = (torch.randn(6, 5), torch.arange(6) % 3), nn.CrossEntropyLoss()
    full = fisher(model, loss, batch).dense()
    found = ekfac(model, loss, batch)
    assert float(full.trace()) == pytest.approx(float(found.dense().trace()), rel=1e-9)
    twin = copy.deepcopy(model)
    with capture(twin) as moments, torch.no_grad():
        twin(batch[0])
    x = batch[0]
    torch.testing.assert_close(moments["0.W"].inputs.dense()[0], x.mT @ x / 6)
