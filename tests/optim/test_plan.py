"""Routing: each parameter by the module that owns it; views and their inverses."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from matrigami import Monarch
from matrigami.curvature import capture
from matrigami.nn import Part, Role, StructuredLinear, param_groups, parts
from matrigami.operators import contractions, stacked_view, transposed_view
from matrigami.optim import OPTIMIZERS, SOAP, Muon, Shampoo, plan
from matrigami.structures import EXAMPLES


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def roles(model: nn.Module, **options) -> dict[str, tuple[Role, str]]:
    return {row.name: (row.role, row.blocks) for row in plan(model, **options).rows}


def test_every_kind_of_layer():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose2d(4, 6, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(3, 5),
            "gru": nn.GRU(3, 5),
            "norm": nn.BatchNorm2d(3),
            "act": nn.PReLU(),
            "form": nn.Bilinear(3, 4, 2),
            "core": StructuredLinear(8, 12, Monarch(blocks=4), rms_cap=True),
            "head": nn.Linear(12, 3),
        }
    )
    found = roles(model)
    assert found["conv.weight"] == (Role.CONVOLUTION, "2 of 3x18")
    assert found["up.weight"] == (Role.CONVOLUTION, "1 of 24x4")
    assert found["attention.in_proj_weight"] == (Role.MATRIX, "3 of 4x4")
    assert found["lstm.weight_hh_l0"] == (Role.MATRIX, "4 of 5x5")
    assert found["gru.weight_ih_l0"] == (Role.MATRIX, "3 of 5x3")
    assert found["norm.weight"] == (Role.NORM, "3")
    assert found["act.weight"] == (Role.GAIN, "1")
    assert found["form.weight"] == (Role.MATRIX, "2 of 3x4")
    assert found["core.left"] == (Role.CORE, "4 of 3x4")
    assert found["core.gain_left"] == (Role.GAIN, "1")
    assert found["head.weight"] == (Role.HEAD, "1 of 3x12")
    assert {row.name for row in plan(model).rows} == {n for n, _ in model.named_parameters()}


def test_tied_heads_and_embeddings_take_adam():
    rows = {row.name: row for row in plan(Tied()).rows}
    assert rows["embed.weight"].role is Role.TIED
    assert rows["embed.weight"].method == "Adam"
    assert rows["mix.weight"].method == "SOAP"


def test_muon_leaves_the_head_to_adam():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rows = {row.name: row.method for row in plan(model, "muon").rows}
    assert rows["0.weight"] == "Muon"
    assert rows["1.weight"] == "Adam"
    assert {r.method for r in plan(model, Muon, head=()).rows if "weight" in r.name} == {"Muon"}


def test_the_forecast_is_what_is_allocated():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).float()
    for make in (SOAP, Muon, partial(Shampoo, block_size=4)):
        table = plan(model, make)
        optimizer = make(table)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        counters = {"step", "skipped", "seeded", "offset"}
        entries = [(k, S) for state in optimizer.state.values() for k, S in state.items()]
        assert table.bytes == sum(S.nbytes for k, S in entries if k not in counters)
        total, start = str(table).splitlines()[-2:]
        assert total.startswith("total")
        assert start.startswith("start with lr=")


def test_unknown_parameters_are_refused_listed_or_registered():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(3, 2)), nn.Linear(3, 2)

    with pytest.raises(
        ValueError, match=r"of the model itself, a Scaled: scale.\n.*\n.*elementwise"
    ):
        plan(Scaled())
    assert roles(Scaled(), elementwise=["scale"])["scale"] == (Role.ELEMENTWISE, "3x2")
    with pytest.raises(ValueError, match="names \\['scales'\\]"):
        plan(Scaled(), elementwise=["scales"])
    parts.register(Scaled)(lambda module: {"scale": Part(Role.GAIN)})
    assert roles(Scaled())["scale"] == (Role.GAIN, "3x2")
    with pytest.raises(ValueError, match="The optimisers are"):
        plan(Scaled(), "sgd")


def test_bare_parameters_are_matrices_only_with_two_axes():
    with pytest.raises(ValueError, match="Pass the model"):
        SOAP([nn.Parameter(torch.zeros(2, 3, 4))])
    with pytest.raises(ValueError, match="out of range"):
        SOAP([nn.Parameter(torch.zeros(2))], lr=-1.0)
    layer = nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Muon(layer).step()


def test_groups_with_transferred_rates_get_their_views():
    model = nn.Sequential(StructuredLinear(8, 8, Monarch(blocks=4)), nn.Linear(8, 2))
    groups = plan(model).groups(param_groups(model, lr=0.01))
    optimizer = SOAP(groups)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.01, 0.02]
    model(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].left]["P"].shape == (4, 2, 2)
    with pytest.raises(ValueError, match="are not in the plan"):
        plan(model).groups([{"params": [nn.Parameter(torch.ones(2))]}])


@pytest.mark.parametrize("name", EXAMPLES)
def test_views_of_cores_are_their_blocks_and_invert(name: str):
    for part in contractions(EXAMPLES[name].init(8, 8)):
        view, blocks = part.matrix.view, part.matrix.blocks()
        assert torch.equal(view.split(part.matrix.core), blocks.reshape(-1, *blocks.shape[-2:]))
        assert torch.equal(view.merge(view.split(part.matrix.core)), part.matrix.core)


@pytest.mark.parametrize("largest", [2, 3, 100])
def test_views_of_convolutions_invert_in_tiles(largest: int):
    W = torch.randn(4, 3, 2, 2)
    for view in (stacked_view((4, 3, 2, 2), 2), transposed_view((4, 3, 2, 2), 2)):
        tiled = view.tiled(largest)
        assert torch.equal(tiled.merge(tiled.split(W)), W)
        assert max(tiled.stack[1:]) <= largest
        assert tuple(tiled.split(W).shape) == tiled.stack


def test_states_and_parameters_of_another_kind_are_refused():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    other = torch.optim.AdamW(model.parameters())
    other.step()
    with pytest.raises(ValueError, match="another optimiser"):
        SOAP(model.parameters()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"Muon: a parameter of shape \(2, 2\) is complex"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex128))])


def test_an_error_names_the_layer_as_the_model_does():
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2, 2))

    with pytest.raises(ValueError, match=r"parameters of 0, a Gain: gain"):
        plan(nn.Sequential(Gain()))
    assert len(plan(nn.Sequential(Gain()), elementwise=["0.gain"]).rows) == 1


def test_the_plan_says_where_a_spectral_step_pays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3))
    model = model.double()
    x = torch.randn(40, 6, dtype=torch.float64) + 3  # one direction is much larger than the others
    with capture(model) as seen:
        model(x).square().sum().backward()
    rows = {row.name: row for row in plan(model, "muon", moments=seen).rows}
    found, G = rows["0.weight"].spectral, model[0].weight.grad
    norms = [torch.linalg.matrix_norm(*a) for a in ((G, "nuc"), (G,), (x,), (x, 2))]
    assert found.gradient == pytest.approx(float(norms[0] / norms[1]) ** 2)
    assert found.inputs == pytest.approx(float(norms[2] / norms[3]) ** 2)
    assert found.pays == (found.gradient > found.inputs)
    assert rows["2.weight"].spectral is None  # it takes Adam
    assert str(found) in str(plan(model, "muon", moments=seen))
    assert "spectral step" not in str(plan(model, "muon"))


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_rate_of_the_plan_is_the_default(kind):
    assert kind.starting_rate() == inspect.signature(kind).parameters["lr"].default
