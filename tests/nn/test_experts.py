"""The mixture of experts: all experts weighted by their gates, at a part of the work."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import matrigami as mg
from matrigami.nn import StructuredLinear, StructuredMoE, param_groups, routing_loss
from matrigami.operators import cost
from matrigami.structures import EXAMPLES, BlockTensorTrain, LowRank, Monarch

each_structure = pytest.mark.parametrize("name", EXAMPLES)


def layer_of(name: str, experts: int = 5, active: int = 2, **options) -> StructuredMoE:
    torch.manual_seed(0)
    try:
        return StructuredMoE(12, 8, EXAMPLES[name], experts, active, **options)
    except ValueError:  # a square structure
        return StructuredMoE(12, 12, EXAMPLES[name], experts, active, **options)


def all_experts(layer: StructuredMoE, x: Tensor) -> Tensor:
    """Every expert on every vector, weighted by gates that are mostly zero."""
    logits = x @ layer.gate.mT
    kept = logits >= logits.topk(layer.active, -1).values[..., -1:]
    gates = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    y = torch.einsum("...e,emn,...n->...m", gates, layer.matrix().dense(), x)
    return y if layer.bias is None else y + layer.bias


@each_structure
@pytest.mark.parametrize(("experts", "active"), [(5, 2), (4, 4), (3, 1), (1, 1)])
def test_is_the_weighted_sum_of_all_experts_with_its_gradients(name, experts, active):
    layer = layer_of(name, experts, active)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 7, layer.in_features, requires_grad=True)
    parameters = [x, *layer.parameters()]
    results = [
        (y, *torch.autograd.grad(y.square().sum(), parameters))
        for y in (layer(x), all_experts(layer, x))
    ]
    for got, wanted in zip(*results, strict=True):
        scale = max(1.0, float(wanted.detach().abs().max()))
        assert float((got - wanted).detach().abs().max()) < 1e-12 * scale


TWO_FACTORS = [BlockTensorTrain(rank=2), Monarch(blocks=2), Monarch(blocks=2, interleaved=False)]


@pytest.mark.parametrize("recipe", TWO_FACTORS, ids=str)
def test_vectors_that_are_handled_in_portions_give_the_same(recipe, monkeypatch):
    torch.manual_seed(0)
    layer = StructuredMoE(12, 8, recipe, 5, 2)
    x = torch.randn(12, 23, requires_grad=True)
    g, parameters = torch.randn(23, 8), [x, *layer.parameters()]
    whole = layer(x.mT)
    wanted = torch.autograd.grad(whole, parameters, g)
    monkeypatch.setattr("matrigami.nn._expert_products.NEAR", 48)
    monkeypatch.setattr("matrigami.nn._expert_products.LEAST", 1)
    split = layer(x.mT)
    torch.testing.assert_close(split, whole)
    for a, b in zip(torch.autograd.grad(split, parameters, g), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recipe", TWO_FACTORS, ids=str)
def test_derivatives_of_derivatives_and_of_many_outputs(recipe):
    torch.manual_seed(0)
    layer = StructuredMoE(4, 4, recipe, 3, 2)
    x = torch.randn(3, 4, requires_grad=True)
    parameters = [x, *layer.parameters()]
    torch.autograd.gradgradcheck(lambda *_: layer(x).square(), parameters)
    many = torch.randn(5, 3, 4)
    ours, theirs = (
        torch.autograd.grad(y, parameters, many, is_grads_batched=True)
        for y in (layer(x), all_experts(layer, x))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_of_zero_has_a_gradient():
    """Its logit is so far below that the softmax is zero in single precision."""
    kind = {"dtype": torch.float32}
    layer, x = StructuredMoE(4, 4, BlockTensorTrain(rank=1), 2, 2, **kind), torch.ones(3, 4, **kind)
    layer.gate.data.copy_(torch.tensor([[200.0, 0, 0, 0], [0, 0, 0, 0]]))
    layer(x).sum().backward()
    assert float(layer.route(x).weights.detach().min()) == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_experts_of_rank_one_are_one_train_whose_rank_is_the_expert():
    layer = layer_of("btt", experts=3, active=3, bias=False)
    x = torch.randn(4, 12)
    layer.gate.data.zero_()  # all experts alike
    first, second = (getattr(layer, name).detach() for name in layer.factor_names)
    train = mg.BlockTensorTrainMatrix((torch.cat(list(first), -4), torch.cat(list(second), -1)))
    torch.testing.assert_close(layer(x), x @ train.dense().mT / 3)


def test_only_active_experts_multiply(monkeypatch):
    """The products see `active` columns for each vector, whatever the number of experts."""
    seen: list[int] = []
    plain = mg.LowRankMatrix.matmat

    def counted(A, X):
        seen.append(X.shape[-1])
        return plain(A, X)

    monkeypatch.setattr(mg.LowRankMatrix, "matmat", counted)
    layer = layer_of("lowrank", experts=5, active=2)
    layer(torch.randn(9, 12))
    assert sum(seen) == 18
    assert len(seen) == 5


def test_experts_that_get_nothing_have_zero_gradients():
    layer = layer_of("monarch", experts=4, active=1)
    layer.gate.data.zero_()
    layer.gate.data[2] = 100.0
    x = torch.rand(6, 12)
    layer(x).sum().backward()
    for name in layer.factor_names:
        sizes = getattr(layer, name).grad.flatten(1).norm(dim=1)
        assert [bool(s > 0) for s in sizes] == [False, False, True, False]
    assert float(layer.losses().balance.detach()) == pytest.approx(4.0)


@each_structure
def test_no_vectors_give_no_output_and_zero_gradients(name):
    layer = layer_of(name)
    y = layer(torch.randn(2, 0, layer.in_features))
    assert y.shape == (2, 0, layer.out_features)
    (y.sum() + routing_loss(layer)).backward()
    assert all(bool((p.grad == 0).all()) for p in layer.parameters())


def test_the_order_of_vectors_does_not_matter_to_the_last_bit():
    layer, x = layer_of("btt"), torch.randn(50, 12)
    order = torch.randperm(50)
    torch.testing.assert_close(layer(x)[order], layer(x[order]), rtol=1e-13, atol=1e-13)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    layer = layer_of("btt").to(dtype)
    x = torch.randn(40, 12).to(dtype)
    y = layer(x).detach()
    assert y.dtype is dtype
    wanted = all_experts(copy.deepcopy(layer).double(), x.double()).detach()
    error = float((y.double() - wanted).norm() / wanted.norm())
    assert error < (1e-6 if dtype is torch.float32 else 2e-2)


def test_autocast_multiplies_in_half_and_routes_in_single():
    layer, x = layer_of("btt").float(), torch.randn(40, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        empty = layer(x[:0])
    assert y.dtype is empty.dtype is torch.bfloat16
    assert torch.equal(layer.route(x).experts, layer.route(x).logits.topk(2).indices)
    wanted = all_experts(layer, x).detach()
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 2e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())


def test_losses_of_a_known_routing():
    layer = StructuredMoE(2, 2, LowRank(rank=1), experts=2, active=1)
    layer.gate.data.copy_(torch.eye(2))
    layer(torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0], [3.0, 0.0]]))
    losses = layer.losses()
    p = torch.tensor(3.0).sigmoid()
    first, second = (3 * p + (1 - p)) / 4, (3 * (1 - p) + p) / 4  # mean probabilities
    torch.testing.assert_close(losses.balance, 2 * (0.75 * first + 0.25 * second))
    torch.testing.assert_close(losses.z, torch.tensor(3.0).exp().add(1).log().square())


def test_losses_reach_the_gate_and_balance_it():
    torch.manual_seed(0)
    layer = StructuredMoE(8, 8, BlockTensorTrain(rank=1), experts=4, active=1)
    layer.gate.data[0] += 1.0
    x, start = torch.rand(200, 8), None
    optimizer = torch.optim.Adam([layer.gate], lr=0.02)
    for _ in range(60):
        layer(x)
        loss = routing_loss(layer, balance=1.0, z=0.0)
        start = float(loss.detach()) if start is None else start
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = torch.bincount(layer.route(x).experts.flatten(), minlength=4)
    assert start > 3.0
    assert float(loss.detach()) < 1.2
    assert int(counts.min()) > 20


def test_counts_multiply_adds_of_active_experts():
    recipe = Monarch(blocks=4)
    layer = StructuredMoE(16, 16, recipe, experts=8, active=2)
    one = cost(recipe.init(16, 16))
    assert layer.cost().macs == 2 * one.macs + 8 * 16
    assert layer.cost().params == 8 * one.params + 8 * 16


def test_rates_are_those_of_one_expert_and_the_gate_reads_the_width():
    layer = StructuredMoE(64, 64, BlockTensorTrain(rank=1), experts=8, active=2)
    groups = param_groups(layer, 1.0, base_width=32, width=64)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first, second = (scale[id(getattr(layer, name))] for name in layer.factor_names)
    assert (first, second, scale[id(layer.gate)], scale[id(layer.bias)]) == (2.0, 2.0, 0.5, 1.0)


@pytest.mark.parametrize("method", ["Muon", "SOAP", "Shampoo"])
def test_optimisers_know_it(method):
    layer = layer_of("btt")
    kind = mg.optim.OPTIMIZERS[method.lower()]
    routes = mg.optim.plan(layer, kind)
    rows = {row.name: row for row in routes.rows}
    assert all(rows[name].view is not None for name in (*layer.factor_names, "gate"))
    x, target = torch.randn(64, 12), torch.randn(64, 8)
    optimizer = kind(routes.groups(), lr=0.01)
    before = None
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        before = float(loss.detach()) if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before


def test_curvature_is_exact_for_one_example_and_captured():
    layer = layer_of("btt", experts=3, active=2)
    model, loss = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 2)), nn.MSELoss(reduction="sum")
    batch = (torch.randn(1, 12), torch.randn(1, 2))
    exact = mg.curvature.ggn(model, loss, batch).dense()
    F, at = mg.curvature.kfac(model, loss, batch, joint=False), 0
    for name, p in layer.named_parameters():
        view, size = mg.nn.parts(layer)[name].blocks, p.numel()
        numbers = torch.arange(at, at + size, dtype=torch.float64).view(p.shape)
        rows = numbers[None] if view is None else view.split(numbers).flatten(1)
        wanted = torch.stack([exact[row][:, row] for row in rows.long()])
        torch.testing.assert_close(F[f"0.{name}"].dense().reshape(wanted.shape), wanted)
        at += size
    with mg.curvature.capture(model) as seen:
        loss(model(batch[0]), batch[1]).backward()
    assert seen["0.gate"].inputs.shape[-1] == 12
    assert {f"0.{n}" for n in (*layer.factor_names, "gate", "bias")} <= set(seen)


def test_copies_pickles_and_states_are_whole():
    layer, x = layer_of("btt"), torch.randn(4, 12)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    other = layer_of("btt")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


def test_zero_init_starts_at_zero():
    layer = layer_of("btt", zero_init=True)
    assert float(layer(torch.randn(5, 12)).detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 4), "This is no mixture"),
        ((3, 0), "active cannot be 0"),
        ((0, 0), "experts cannot be 0"),
    ],
)
def test_refuses_what_is_no_mixture(numbers, message):
    with pytest.raises(ValueError, match=message):
        StructuredMoE(4, 4, LowRank(rank=1), *numbers)


@pytest.mark.parametrize("grown", [1.0, 50.0])
def test_each_expert_has_a_cap_of_its_own(grown):
    """As the layers of the experts, each with `rms_cap`, mixed by hand."""
    moe = layer_of("btt", bias=False, rms_cap=True)
    with torch.no_grad():
        for name in moe.factor_names:
            moe.get_parameter(name)[1] *= grown
            moe.get_parameter(f"gain_{name}").copy_(torch.rand(moe.experts))
    x, expected = torch.randn(5, 12), 0.0
    routing = moe.route(x)
    weights = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.weights)
    for e in range(moe.experts):
        kind = {"bias": False, "rms_cap": True}
        one = StructuredLinear(12, moe.out_features, moe.structure, **kind)
        for name, p in one.named_parameters():
            p.data.copy_(moe.get_parameter(name)[e])
        expected = expected + weights[:, [e]] * one(x)
    torch.testing.assert_close(moe(x), expected)
    assert moe.gains() == [f"gain_{name}" for name in moe.factor_names]
    groups = param_groups(moe, lr=1e-2)
    assert sum(len(group["params"]) for group in groups) == len(list(moe.parameters()))


def test_refuses_other_inputs_and_losses_before_a_call():
    layer = layer_of("btt")
    with pytest.raises(ValueError, match="Its last axis must be 12"):
        layer(torch.randn(3, 11))
    with pytest.raises(ValueError, match="has not been called"):
        copy.deepcopy(layer).losses()
    with pytest.raises(ValueError, match="has no mixture"):
        routing_loss(nn.Linear(2, 2))
