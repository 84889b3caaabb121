"""K-FAC as an optimiser: the natural gradient of its definition, from an estimator on the model."""

import copy
import gc
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import kfac
from matrigami.nn import StructuredLinear
from matrigami.optim import KFAC, plan

LOSS = nn.CrossEntropyLoss()


def data(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def network(structured: bool = False) -> nn.Sequential:
    torch.manual_seed(2)
    hidden = StructuredLinear(8, 8, mg.Monarch(blocks=2)) if structured else nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: KFAC, steps: int) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def many_labels(model: nn.Module, **options) -> KFAC:
    """One step of it is that of the expectation over labels, nearly."""
    return KFAC(model, LOSS, momentum=0.0, labels=4000, kl_clip=1e9, **options)


@pytest.mark.parametrize("structured", [False, True], ids=["dense", "monarch"])
@pytest.mark.parametrize("inverse", [False, True], ids=["eigen", "inverse"])
def test_a_step_is_the_damped_natural_gradient(structured, inverse):
    model = network(structured)
    F = kfac(model, LOSS, data(), joint=False)
    damped = mg.curvature.damped(F, 0.1, "pi" if inverse else "tikhonov")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = many_labels(model, lr=1.0, damping=0.1, inverse=inverse)
    train(model, optimizer, 1)
    gradients = F.vector({n: p.grad for n, p in model.named_parameters()})
    wanted = F.tensors(mg.solve(damped, gradients))
    for name, p in model.named_parameters():
        if not name.endswith("bias"):
            assert_close(before[name] - p.detach(), wanted[name], rtol=0.1, atol=0.02)


def test_a_linear_model_is_solved_in_one_step():
    x, W = torch.randn(50, 4), torch.randn(3, 4)
    model, loss = nn.Linear(4, 3, bias=False), nn.MSELoss()
    options = {"damping": 1e-12, "momentum": 0.0, "labels": 20_000, "kl_clip": 1e9}
    optimizer = KFAC(model, loss, lr=1.0, inverse=False, **options)
    loss(model(x), x @ W.T).backward()
    optimizer.step()
    assert_close(model.weight.detach(), W, rtol=0.0, atol=0.05)


@pytest.mark.parametrize("options", [{}, {"inverse": False}], ids=str)
def test_it_trains(options):
    assert_it_trains(network(), options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"optimal": True}, {"inverse": False}], ids=str)
def test_it_trains_structured_layers(options):
    assert_it_trains(network(structured=True), options)


def assert_it_trains(model, options):
    losses = train(model, KFAC(model, LOSS, **options), 60)
    assert losses[-1] < 0.2 * losses[0]


def test_steps_are_shortened_together():
    models = [network(), network()]
    clips = (1e9, 1e-6)
    moved = []
    for model, clip in zip(models, clips, strict=True):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, KFAC(model, LOSS, kl_clip=clip, adam_lr=0.0), 1)
        pairs = zip(before, model.parameters(), strict=True)
        moved.append([b - p.detach() for b, p in pairs if p.ndim == 2])
    ratios = [float((short / long).mean()) for long, short in zip(*moved, strict=True)]
    assert max(ratios) < 0.2
    assert max(ratios) - min(ratios) < 1e-9


@pytest.mark.parametrize("cut", [3, 5, 7])
def test_it_resumes_exactly(cut):
    options = {"frequency": 5, "statistics_every": 2}
    whole = network()
    train(whole, KFAC(whole, LOSS, **options), 12)
    first = network()
    optimizer = KFAC(first, LOSS, **options)
    train(first, optimizer, cut)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(state["model"])
    other = KFAC(second, LOSS, **options)
    other.load_state_dict(state["optimizer"])
    train(second, other, 12 - cut)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nan_activations_never_reach_a_factor():
    model = network()
    optimizer = KFAC(model, LOSS)
    train(model, optimizer, 2)
    x, y = data()
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    optimizer.zero_grad()
    LOSS(model(x * torch.nan), y).backward()
    optimizer.step()
    assert optimizer.estimator is not None
    assert optimizer.estimator.rejected == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert all(bool(S.isfinite().all()) for e in optimizer.state.values() for S in e.values())
    assert train(model, optimizer, 30)[-1] < 0.5


def test_evaluation_is_not_watched():
    model = network()
    optimizer = KFAC(model, LOSS)
    x, _ = data()
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert optimizer.estimator is not None
    assert optimizer.estimator.take() == {}


def test_damping_follows_the_quadratic_model():
    model = network()
    optimizer = KFAC(model, LOSS, momentum=0.0, damping=0.05)
    (before,) = train(model, optimizer, 1)
    after = float(LOSS(model(data()[0]), data()[1]).detach())
    predicted = before - after
    assert optimizer.adapt_damping(before, before - 10 * predicted) < 0.05
    raised = optimizer.adapt_damping(before, before + 1.0)
    assert raised == pytest.approx(0.05)
    assert all(g["damping"] == raised for g in optimizer.param_groups)
    assert train(model, optimizer, 20)[-1] < before


def test_factors_can_be_told():
    W = nn.Parameter(torch.zeros(2, 3))
    optimizer = KFAC([W], lr=1.0, momentum=0.0, damping=1e-12, kl_clip=1e9, inverse=False)
    A, B = (
        torch.diag(torch.tensor([1.0, 2.0, 4.0]))[None],
        torch.diag(torch.tensor([1.0, 5.0]))[None],
    )
    optimizer.observe(W, A, B)
    W.grad = torch.ones(2, 3)
    optimizer.step()
    assert_close(W.detach(), -1 / torch.tensor([[1.0, 2.0, 4.0], [5.0, 10.0, 20.0]]))
    for wrong in ((A, B[:, :1, :1]), (A * torch.nan, B)):
        with pytest.raises(ValueError, match="observe was told"):
            optimizer.observe(W, *wrong)


def spd(b: int, k: int) -> torch.Tensor:
    X = torch.randn(b, k, 2 * k)
    return X @ X.mT / (2 * k)


@pytest.mark.parametrize("inverse", [False, True], ids=["eigen", "inverse"])
def test_a_stack_is_refreshed_as_each_of_its_blocks(inverse):
    """Two of three blocks are observed, one for the first time; the arguments stay as they are."""
    options = KFAC([nn.Parameter(torch.zeros(2, 2))], inverse=inverse).defaults | {"clock": 7}
    G, before, now = torch.randn(3, 2, 4), {"A": spd(3, 4), "B": spd(3, 2)}, (spd(3, 4), spd(3, 2))
    state = KFAC.init(G, options) | before | {"watched": torch.tensor([3.0, 0.0, 5.0])}
    state |= {"offset": torch.tensor([[7, 0], [1, 2], [0, 0]]), "step": torch.zeros(3)}
    state |= {"seen": torch.tensor([True, True, False]), "A_now": now[0], "B_now": now[1]}
    given = {name: S.clone() for name, S in state.items()}
    U, new = KFAC.direction(G, state, options)
    for name, S in given.items():
        assert_close(state[name], S, rtol=0, atol=0)
    assert_close(new["A"][0], before["A"][0].lerp(now[0][0], 0.25))
    assert_close(new["A"][1], now[0][1])
    assert_close(new["A"][2], before["A"][2])
    assert new["watched"].tolist() == [4.0, 1.0, 5.0]
    fresh = [not torch.equal(new["P"][i], state["P"][i]) for i in range(3)]
    assert fresh == [True, True, False]  # due, new, neither
    for i in range(3):
        one = {name: S[i : i + 1] for name, S in state.items()}
        if not one["seen"]:
            one = {k: S for k, S in one.items() if k not in {"seen", "A_now", "B_now"}}
        direction, alone = KFAC.direction(G[i : i + 1], one, options)
        assert_close(U[i], direction[0])
        assert_close(new["norm"][i], alone["norm"][0])


def test_a_plan_and_attach_are_the_model():
    one, two = network(), network()
    first = KFAC(one, LOSS)
    second = KFAC(plan(two, KFAC), LOSS)
    assert train(one, first, 5) == train(two, second, 5)
    three = network()
    third = KFAC(plan(three, KFAC).groups())
    third.param_groups[1]["lr"] = 3e-3
    third.attach(three, LOSS)
    four = network()
    assert train(three, third, 5) == train(four, KFAC(four, LOSS), 5)


def test_a_closure_is_seen_in_its_own_step():
    one, two = network(), network()
    x, y = data()
    first, second = KFAC(one, LOSS), KFAC(two, LOSS)
    for _ in range(4):
        train(one, first, 1)

        def closure() -> torch.Tensor:
            second.zero_grad()
            loss = LOSS(two(x), y)
            loss.backward()
            return loss

        second.step(closure)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_a_watch_ends_with_its_optimizer_and_does_not_follow_copies():
    model = network()
    optimizer = KFAC(model, LOSS)
    twin = copy.deepcopy(model)
    twin(data()[0])
    assert optimizer.estimator is not None
    assert optimizer.estimator.passes == 0
    with pytest.raises(ValueError, match="would watch nothing"):
        copy.deepcopy(optimizer)
    del optimizer
    gc.collect()
    model(data()[0])  # the hooks have nobody to tell
    torch.save(model, io.BytesIO())


def test_training_a_part_of_the_model_is_noticed():
    model = network()
    optimizer = KFAC(model, LOSS)
    x, y = data()
    for expected in (pytest.warns(RuntimeWarning, match="saw no forward pass"), nullcontext()):
        optimizer.zero_grad()
        hidden = model[1](model[0](x))
        LOSS(model[4](model[3](model[2](hidden))), y).backward()
        with expected:
            optimizer.step()


def test_fused_attention_takes_adam():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = KFAC(nn.Sequential(model, nn.Flatten(), nn.Linear(24, 3)), LOSS)
    matrices = set(optimizer.param_groups[0]["params"])
    assert model.linear1.weight in matrices
    assert model.self_attn.out_proj.weight not in matrices


def test_classes_must_be_where_the_loss_has_them():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    optimizer = KFAC(model, LOSS)
    x = torch.zeros(3, 5, dtype=torch.long)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x).transpose(1, 2), x)
    with pytest.raises(ValueError, match="the loss has them on axis 1"):
        loss.backward()  # the loss is not called, so that its outputs are not known


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KFAC(network()), "a loss is needed"),
        (lambda: KFAC(network(), nn.L1Loss()), "likelihood is not known"),
        (lambda: KFAC(network(), LOSS, damping=0.0), "damping=0.0"),
        (lambda: KFAC(network(), LOSS, decay=1.0), "decay=1.0"),
        (lambda: KFAC(network(), LOSS, labels=0), "labels=0"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
