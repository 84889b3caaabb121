"""The state is what `state` holds; loaded states fit, or nothing changes; nothing is ever NaN."""

import copy

import pytest
import torch
from torch import nn

from matrigami.optim import KFAC, OPTIMIZERS, SGD_SIZE, SOAP, Muon, Shampoo, newton_root, plan
from matrigami.optim._options import check_options

every = pytest.mark.parametrize("name", OPTIMIZERS)
LOSS = nn.MSELoss()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.LayerNorm(6))


def made(name: str, model: nn.Module, **options):
    return KFAC(model, LOSS, **options) if name == "kfac" else OPTIMIZERS[name](model, **options)


def train(model: nn.Module, optimizer, steps: int) -> None:
    x = torch.linspace(-1, 1, 72).view(12, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x), x).backward()
        optimizer.step()


def copies(optimizer) -> None:
    """What moving the state away and back leaves."""
    for entry in optimizer.state.values():
        entry |= {k: S.clone() for k, S in entry.items() if isinstance(S, torch.Tensor)}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@every
def test_a_state_that_is_moved_is_used_and_saved(name):
    still, moved = network(), network()
    first, second = made(name, still), made(name, moved)
    train(still, first, 4)
    for _ in range(4):
        copies(second)
        train(moved, second, 1)
    assert same(still, moved)
    copies(second)
    train(moved, second, 1)
    resumed = copy.deepcopy(moved)
    third = made(name, resumed)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    train(moved, second, 2)
    train(resumed, third, 2)
    assert same(moved, resumed)


@every
def test_a_state_that_is_reset_starts_again(name):
    model = network()
    optimizer = made(name, model)
    train(model, optimizer, 3)
    p = model[0].weight
    entry = next(k for k, S in optimizer.state[p].items() if k in ("M", "V"))
    optimizer.state[p][entry] = torch.full_like(optimizer.state[p][entry], 1e3)
    before = p.detach().clone()
    train(model, optimizer, 1)
    assert float(optimizer.state[p][entry].abs().max()) > 100
    assert not torch.equal(before, p)
    optimizer.state.clear()
    train(model, optimizer, 1)
    assert [float(e["step"]) for e in optimizer.state.values()] == [1.0] * len(optimizer.state)


@every
def test_numbers_and_names_of_a_loaded_state(name):
    """Numbers of other tools are taken; parameters are matched by their names."""

    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            for key in sorted(names):
                layer = nn.Linear(6, 6, bias=False)
                setattr(self, key, layer)
            self._modules = {key: self._modules[key] for key in names}

        def forward(self, x):
            return self.c(self.a(torch.tanh(self.b(x))))

    one, other = Two("a", "b", "c"), Two("b", "a", "c")
    first, second = made(name, one), made(name, other)
    train(one, first, 3)
    other.load_state_dict(one.state_dict())
    saved = copy.deepcopy(first.state_dict())
    for entry in saved["state"].values():
        entry["step"] = float(entry["step"])
    second.load_state_dict(saved)
    train(one, first, 2)
    train(other, second, 2)
    assert torch.equal(one.a.weight, other.a.weight)
    assert torch.equal(one.b.weight, other.b.weight)


def cut(entry: dict) -> None:
    entry["M"] = entry["M"][..., :1]


def dropped(entry: dict) -> None:
    del entry["M"]


@every
@pytest.mark.parametrize("damage", [cut, dropped])
def test_a_state_that_does_not_fit_changes_nothing(name, damage):
    model = network()
    optimizer = made(name, model)
    train(model, optimizer, 2)
    before, wrong = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    damage(wrong["state"][0])
    wrong["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match=r"the entry of parameter 0 does not fit"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_states_of_other_methods_and_models():
    model = network()
    soap = SOAP(model)
    train(model, soap, 1)
    saved = soap.state_dict()
    with pytest.raises(ValueError, match="it is that of another optimiser"):
        Shampoo(model).load_state_dict(saved)
    small = SOAP(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"its groups have \[2, 4\] parameters"):
        small.load_state_dict(saved)
    renamed = nn.Sequential(*[nn.Identity(), *network()])
    with pytest.raises(ValueError, match="it is that of other parameters"):
        SOAP(renamed).load_state_dict(saved)


VANISHING = {
    "soap": lambda W: SOAP([W], lr=0.01, eps=0.0),
    "adam graft": lambda W: Shampoo([W], lr=0.01, adam_eps=0.0),
    "own graft": lambda W: Shampoo([W], lr=0.01, graft=SGD_SIZE),
    "newton": lambda W: Shampoo([W], lr=0.01, root=newton_root),
    "muon": lambda W: Muon([W], lr=0.01),
    "kfac": lambda W: KFAC([W], lr=0.01),
}


@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e-42])
def test_gradients_that_vanish_move_no_parameter_far(name, size):
    """Their squares are zero in single precision."""
    W = nn.Parameter(torch.ones(6, 6, dtype=torch.float32))
    optimizer = VANISHING[name](W)
    for _ in range(4):
        W.grad = size * torch.randn(6, 6, dtype=torch.float32)
        optimizer.step()
    assert bool(W.isfinite().all())
    assert float((W - 1).detach().abs().max()) < 0.5


def test_a_momentum_that_dies_out_stays_finite():
    W = nn.Parameter(torch.ones(6, 6, dtype=torch.float32))
    optimizer = Muon([W], lr=1e-3, momentum=0.5)
    for i in range(200):  # 0.5^150 has no square, and then is none itself
        W.grad = torch.randn(6, 6, dtype=torch.float32) if i < 5 else torch.zeros_like(W)
        optimizer.step()
    assert bool(W.isfinite().all())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SOAP, {"eps": -1.0}),
        (SOAP, {"betas": (0.9, 1.0)}),
        (SOAP, {"lr": float("nan")}),
        (Shampoo, {"epsilon": -1.0}),
        (Shampoo, {"exponent": 0.5}),
        (Muon, {"momentum": 1.0}),
        (KFAC, {"damping": 0.0}),
        (KFAC, {"decay": 1.0}),
    ],
)
def test_options_out_of_range(method, options):
    (key,) = options
    with pytest.raises(ValueError, match=rf"^{method.__name__}\({key}=.*: .*\n") as refused:
        method([nn.Parameter(torch.ones(2, 2))], **options)
    assert str(refused.value).count("\n") <= 2


@pytest.mark.parametrize(("key", "value"), [("frequency", 2.5), ("lr", "fast"), ("betas", 0.9)])
def test_options_that_are_no_such_numbers(key, value):
    with pytest.raises(ValueError, match=rf"SOAP\({key}={value}"):
        check_options("SOAP", {key: value})


def test_a_cycle_may_be_long():
    model = network()
    optimizer = SOAP(model, frequency=10**7)
    train(model, optimizer, 2)
    entries = [e["offset"] for e in optimizer.state.values() if "offset" in e]
    offsets = torch.cat([offset.flatten() for offset in entries]).tolist()
    assert len(set(offsets)) == 4
    assert max(offsets) < 10**7


@every
def test_going_up_is_going_down_the_negative(name):
    models = network(), network()
    x = torch.linspace(-1, 1, 72).view(12, 6)
    up = made(name, models[0], maximize=True)
    down = made(name, models[1])
    for _ in range(4):
        for model, optimizer, sign in ((models[0], up, -1), (models[1], down, 1)):
            optimizer.zero_grad()
            (sign * LOSS(model(x), x)).backward()
            optimizer.step()
    assert same(*models)
    assert up.state_dict()["param_groups"][0]["maximize"] is True


@every
def test_a_plan_says_where_to_start(name):
    rate = OPTIMIZERS[name].starting_rate()
    assert repr(plan(network(), OPTIMIZERS[name])).endswith(f"start with lr={rate:g}")


def _stepped(optimizer, model):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("method", [SOAP, Shampoo, Muon])
def test_parameters_that_are_others_now_and_options_out_of_range_are_refused_in_words(method):
    model = nn.Linear(4, 3).float()
    optimizer = method(model)
    _stepped(optimizer, model)
    model.double()
    with pytest.raises(ValueError, match=r"is \(3, 4\) in torch.float64 now; its state is"):
        _stepped(optimizer, model)
    model.float()
    model.weight.grad = None
    model.weight.data = torch.ones(5, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"is \(5, 4\) in torch.float32 now"):
        _stepped(optimizer, model)
    other = nn.Linear(4, 3)
    optimizer = method(other)
    _stepped(optimizer, other)
    optimizer.param_groups[0]["adam_eps"] = -1.0
    with pytest.raises(ValueError, match=r"adam_eps=-1.0\): this is out of range"):
        _stepped(optimizer, other)
