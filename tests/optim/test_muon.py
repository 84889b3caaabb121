"""Muon: steps of products stay below the bound, and orthogonalisation by small Gram matrices."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from matrigami import LowRank, Monarch
from matrigami.nn import StructuredLinear, param_groups
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
