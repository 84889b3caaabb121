"""Muon: steps of products, inputs that are watched, orthogonalisation by small Gram matrices."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matrigami import BlockTensorTrain, LowRank, Monarch
from matrigami.curvature import capture
from matrigami.nn import StructuredLinear, StructuredMoE, param_groups
from matrigami.operators import NormTerm, named_tensors, norm_terms, with_tensors
from matrigami.optim import CANS, POLAR_EXPRESS, QUINTIC, Muon, plan, spectral
from matrigami.optim._polynomials import _step, orthogonalised
from matrigami.optim._product_bound import largest_move, norm_at_most
from matrigami.structures import EXAMPLES
from matrigami.testing._expectations import random

SIZES = dict.fromkeys(("diagonal", "circulant", "kronecker_sum"), (12, 12))
"""Structures of square matrices."""

ENTRYWISE = {"diagonal", "banded", "circulant", "toeplitz"}
"""Structures without a stack of matrices: Adam moves them, the bound only shortens."""


def layer_of(name: str, seed: int, size: float) -> StructuredLinear:
    """A layer with random factors, some of them large."""
    rows, columns = SIZES.get(name, (12, 24))
    layer = StructuredLinear(columns, rows, EXAMPLES[name], bias=False, dtype=torch.float64)
    for i, p in enumerate(layer.parameters()):
        p.data = size ** (i + 1) * random(*p.shape, seed=seed + i)
    return layer


def gradients_of(layer: nn.Module, seed: int) -> None:
    """Entries of very different size."""
    for i, p in enumerate(layer.parameters()):
        p.grad = random(*p.shape, seed=seed + i) * random(*p.shape, seed=seed + i + 50).exp()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_of_a_product_stays_below_the_bound(name: str):
    largest = 0.0
    for i, (size, lr) in enumerate(((0.1, 2.0), (1.0, 0.1), (3.0, 1e-3), (3.0, 2.0))):
        layer = layer_of(name, 7 * i, size)
        optimizer = Muon(layer, lr=lr, weight_decay=0.1 / lr, scale=spectral, bound=True)
        step = lr * spectral(layer.out_features, layer.in_features)
        for t in range(2):
            with torch.no_grad():
                value = layer.matrix()
                kept = [0.9 * x for x in named_tensors(value).values()]  # after weight decay
            gradients_of(layer, 100 * i + 10 * t)
            optimizer.step()
            moved = [p.detach() - x for p, x in zip(layer.parameters(), kept, strict=True)]
            first = derivative(value, kept, moved)
            whole = layer.weight.detach() - with_tensors(value, iter(kept)).dense()
            for change in (first, whole):
                ratio = torch.linalg.matrix_norm(change, 2).item() / step
                largest = max(largest, ratio)
                assert ratio <= 1 + 1e-9
    assert largest > (0.0 if name in ENTRYWISE else 0.02 if name == "hadamard" else 0.2)


def derivative(value, tensors: list[Tensor], along: list[Tensor]) -> Tensor:
    """The change of a matrix to first order."""

    def dense(*ts: Tensor) -> Tensor:
        """The matrix of some tensors."""
        return with_tensors(value, iter(ts)).dense()

    return torch.func.jvp(dense, tuple(tensors), tuple(along))[1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_terms_bound_the_norm_and_every_change(name: str):
    layer = layer_of(name, 3, 1.0)
    A = layer.matrix()
    assert {i for term in norm_terms(A) for i in term.factors} == set(range(len(named_tensors(A))))


def test_without_the_bound_the_step_grows_with_the_weights():
    def moved(**options) -> float:
        layer = layer_of("lowrank", 0, 5.0)
        before = layer.weight.detach().clone()
        gradients_of(layer, 1)
        Muon(layer, lr=0.1, scale=spectral, weight_decay=0.0, **options).step()
        return torch.linalg.matrix_norm(layer.weight.detach() - before, 2).item()

    assert moved() > 30 * 0.1
    assert 0.05 < moved(bound=True) <= 0.1


def test_two_factors_move_at_least_as_spectron_lets_them():
    for s, t, step in ((1.0, 2.0, 0.1), (0.0, 0.0, 0.5), (30.0, 0.1, 1.0)):
        r = largest_move([NormTerm(1.0, (0, 1))], [s, t], step)
        assert step / (s + t + 1) <= r * (1 + 1e-9)
        assert r * (s + t + r) == pytest.approx(step, rel=1e-6)
        assert r * (s + t + r) <= step * (1 + 1e-12)


def test_norms_are_bounded_from_above_and_closely():
    for seed, shape in enumerate([(1, 1, 1), (3, 5, 4), (2, 1, 7), (1, 40, 60)]):
        for scale in (1e-20, 1.0, 1e20):
            X = scale * random(*shape, seed=seed)
            true, bound = torch.linalg.matrix_norm(X, 2).max(), norm_at_most(X)
            assert true * (1 - 1e-12) <= bound <= true * min(shape[1:]) ** (1 / 64) * (1 + 1e-12)
    assert norm_at_most(torch.zeros(2, 3, 3)) == 0


def test_factors_of_one_layer_in_groups_of_their_own_move_together():
    model = nn.Sequential(StructuredLinear(16, 16, Monarch(blocks=4)), nn.Linear(16, 2))
    routes = plan(model, partial(Muon, bound=True))
    groups = param_groups(model, 0.1, base_width=8, width=16, rules=routes.rules)
    rates = {id(p): g["lr"] for g in routes.groups(groups) for p in g["params"]}
    assert rates[id(model[0].left)] == rates[id(model[0].right)]
    optimizer = Muon(routes.groups(groups), bound=True, weight_decay=0.0, scale=spectral)
    before = model[0].weight.detach().clone()
    model(torch.ones(3, 16)).square().sum().backward()
    optimizer.step()
    change = torch.linalg.matrix_norm(model[0].weight.detach() - before, 2).item()
    assert 0.2 * rates[id(model[0].left)] < change <= rates[id(model[0].left)]


def test_a_plan_without_the_bound_knows_the_products():
    model = nn.Sequential(StructuredLinear(8, 8, LowRank(rank=2)), nn.Linear(8, 2))
    model[0].U.data *= 100
    optimizer = Muon(plan(model, "muon"), lr=0.1, weight_decay=0.0, scale=spectral, bound=True)
    before = model[0].weight.detach().clone()
    model(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_norm(model[0].weight.detach() - before, 2) <= 0.1
    saved = optimizer.state_dict()
    assert all("wholes" not in group for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert any(optimizer.param_groups[0]["wholes"])


def test_products_that_share_a_factor_are_both_bounded():
    first, second = (StructuredLinear(8, 8, LowRank(rank=2), bias=False) for _ in range(2))
    second.U = first.U
    second.V.data *= 30
    model, before = nn.Sequential(first, second), [first.weight.detach(), second.weight.detach()]
    before = [W.clone() for W in before]
    model(torch.ones(3, 8)).square().sum().backward()
    Muon(plan(model, Muon, head=()), 0.1, weight_decay=0.0, scale=spectral, bound=True).step()
    for layer, W in zip(model, before, strict=True):
        assert 0.01 < torch.linalg.matrix_norm(layer.weight.detach() - W, 2) <= 0.1


def test_a_frozen_factor_counts():
    layer = StructuredLinear(8, 8, LowRank(rank=2), bias=False)
    layer.U.requires_grad_(False).mul_(10)
    before = layer.weight.detach().clone()
    layer(torch.ones(3, 8)).square().sum().backward()
    Muon(layer, lr=0.1, weight_decay=0.0, scale=spectral, bound=True).step()
    assert torch.linalg.matrix_norm(layer.weight.detach() - before, 2) <= 0.1


@pytest.mark.parametrize("polynomials", [QUINTIC, POLAR_EXPRESS, CANS])
@pytest.mark.parametrize("shape", [(2, 4, 8), (1, 30, 9), (2, 5, 6), (1, 1, 4)])
def test_gram_matrices_orthogonalise_as_the_plain_iteration(polynomials, shape):
    G = random(*shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    G = U * torch.logspace(0, -4, S.shape[-1], dtype=torch.float64) @ Vh
    X = G / torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    X = X.mT if shape[1] > shape[2] else X
    for p in polynomials:
        X = _step(X, p)
    X = X.mT if shape[1] > shape[2] else X
    torch.testing.assert_close(
        orthogonalised(G, polynomials, torch.float64), X, rtol=1e-10, atol=1e-11
    )
    single = orthogonalised(G.float(), polynomials, torch.float32)
    torch.testing.assert_close(single.double(), X, rtol=0, atol=2e-3)


class Calls(nn.Module):
    """Every way in which layers with inputs are called."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.first, self.twice = nn.Linear(75, 8), nn.Linear(8, 8)
        self.core = StructuredLinear(8, 12, Monarch(blocks=4))
        self.train_ = StructuredLinear(12, 8, BlockTensorTrain(rank=2))
        self.experts = StructuredMoE(8, 8, LowRank(rank=2), experts=3, active=2)
        self.lstm, self.head = nn.LSTM(8, 4), nn.Linear(4, 3)

    def inner(self, h: Tensor) -> Tensor:
        """Twice the same layer, and two products."""
        return self.train_(torch.tanh(self.core(self.twice(torch.tanh(self.twice(h))))))

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        h = self.first(self.up(torch.tanh(self.conv(x))).flatten(1))
        h = checkpoint(self.inner, h, use_reentrant=self.reentrant)
        return self.head(self.lstm(self.experts(h))[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_are_those_of_a_capture(reentrant: bool):
    torch.manual_seed(0)
    model, x = Calls(reentrant), torch.randn(10, 4, 4, 4)
    optimizer = Muon(model, inputs=True)
    twin = copy.deepcopy(model)
    twin.lstm.requires_grad_(False)
    with capture(twin) as expected, torch.no_grad():
        for part in x.split([6, 4]):
            read(twin, part)
    for part in x.split([6, 4]):
        model(part).square().sum().backward()
    model.eval()(x)
    optimizer.step()
    checked = 0
    for name, p in model.named_parameters():
        if "A" in optimizer.state[p] and "lstm" not in name:
            torch.testing.assert_close(
                optimizer.state[p]["A"], expected[name].inputs.dense(), rtol=1e-4, atol=1e-5
            )
            checked += 1
        elif "A" in optimizer.state[p]:
            assert not optimizer.state[p]["watched"].any()
    assert checked == 11


def read(model: nn.Module, x: Tensor) -> None:
    """The layers of `Calls` but the LSTM, which a capture refuses."""
    h = model.first(model.up(torch.tanh(model.conv(x))).flatten(1))
    model.head(model.lstm(model.experts(model.inner(h)))[0])


def test_a_step_is_that_of_the_preconditioned_gradient():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    before, x = layer.weight.detach().clone(), torch.randn(20, 5, dtype=torch.float64)
    optimizer = Muon(layer, 0.1, inputs=True, weight_decay=0.0, scale=spectral, polynomials=CANS)
    layer(x)
    G = layer.weight.grad = torch.randn(3, 5, dtype=torch.float64)
    optimizer.step()
    A = x.mT @ x / 20
    K = A + 0.2 * A.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G @ torch.linalg.inv(K), full_matrices=False)
    torch.testing.assert_close(before - layer.weight.detach(), 0.1 * U @ Vh, rtol=0, atol=2e-3)


def test_batches_are_watched_every_so_many_steps_and_averaged():
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    optimizer = Muon(layer, inputs=True, statistics_every=3, decay=0.5)
    expected, seen = torch.zeros(2, 2, dtype=torch.float64), 0
    for t in range(10):
        x = random(4, 2, seed=t)
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if t % 3 == 0:
            seen += 1
            expected = expected.lerp(x.mT @ x / 4, max(1 / seen, 0.5))
        torch.testing.assert_close(optimizer.state[layer.weight]["A"][0], expected)
    with pytest.raises(ValueError, match="it watches a model"):
        copy.deepcopy(optimizer)


def test_a_watched_run_resumes_exactly():
    def model_of() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        return model, Muon(model, lr=0.05, inputs=True, statistics_every=3)

    def train(model: nn.Module, optimizer: Muon, steps: range) -> None:
        for t in steps:
            optimizer.zero_grad()
            model(random(8, 4, seed=t)).square().mean().backward()
            optimizer.step()

    whole, optimizer = model_of()
    train(whole, optimizer, range(8))
    for cut in (2, 3, 4):
        first, early = model_of()
        train(first, early, range(cut))
        second, late = model_of()
        second.load_state_dict(first.state_dict())
        late.load_state_dict(early.state_dict())
        train(second, late, range(cut, 8))
        for p, q in zip(whole.parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q)


def test_who_watches_and_who_cannot():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Muon(plan(model, partial(Muon, inputs=True)).groups(), inputs=True)
    assert optimizer.estimator is None
    assert optimizer.reads_gradients_only
    optimizer.attach(model)
    assert set(optimizer._names) == {"0.weight"}  # the head takes Adam
    assert not optimizer.reads_gradients_only
    for wrong in (optimizer, Muon(model)):
        with pytest.raises(ValueError, match="watches one model, once"):
            wrong.attach(model)
    model[0](torch.ones(1, 3)).sum().backward()
    with pytest.warns(RuntimeWarning, match="Muon saw no forward pass"):
        optimizer.step()
    with pytest.raises(ValueError, match="out of range"):
        Muon(model, gamma=0.0)
