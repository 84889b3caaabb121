"""Exact identities between the methods, and fixed numbers of their parts."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from matrigami.operators import averaged_gram, mirrored
from matrigami.optim import (
    CANS,
    POLAR_EXPRESS,
    QUINTIC,
    SOAP,
    Muon,
    Polynomial,
    Shampoo,
    cans,
    cans_root,
    eigh_root,
    measured_root,
    newton_root,
)
from matrigami.optim._polynomials import fastest_dtype, orthogonalised

EXACT = {"lr": 1.0, "weight_decay": 0.0}


def one_step(factory, G: torch.Tensor) -> torch.Tensor:
    p = nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    factory([p], **EXACT).step()
    return -p.detach()


@pytest.mark.parametrize(
    "factory",
    [
        partial(Shampoo, graft=None, epsilon=0.0),
        partial(Shampoo, graft=None, epsilon=0.0, one_sided=True),
        partial(SOAP, betas=(0.0, 0.0), eps=0.0),
        partial(SOAP, eps=0.0),
        partial(Muon, polynomials=cans(1e-4, steps=16), scale=lambda m, n: 1.0),
    ],
    ids=["shampoo", "one_sided", "soap_without_memory", "soap", "muon"],
)
def test_one_gradient_becomes_its_orthogonal_factor(factory):
    G = torch.randn(6, 4)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert (one_step(factory, G) - U @ Vh).abs().max() < 1e-10


def test_shampoo_with_halves_is_adafactor_in_the_eigenbasis():
    stream = [torch.randn(5, 4) for _ in range(30)]
    L, R = sum(G @ G.T for G in stream), sum(G.T @ G for G in stream)
    G = stream[-1]
    left = L.trace().sqrt() * eigh_root(L[None], -0.5)[0] @ G @ eigh_root(R[None], -0.5)[0]
    (a, P), (b, Q) = torch.linalg.eigh(L), torch.linalg.eigh(R)
    right = P @ ((P.T @ G @ Q) / (torch.outer(a, b) / a.sum()).sqrt()) @ Q.T
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_soap_without_bases_is_adamw():
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours = SOAP([p], lr=0.01, max_dim=1, eps=1e-12, betas=(0.9, 0.99))
    theirs = torch.optim.AdamW([q], lr=0.01, eps=1e-12, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(20):
        p.grad = torch.randn(4, 3)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert (p - q).abs().max() < 1e-9


def test_vectors_are_trained_by_adamw():
    p, q = (nn.Parameter(torch.ones(7)) for _ in range(2))
    ours = Muon([p], lr=0.01, weight_decay=0.1, adam_betas=(0.9, 0.99))
    theirs = torch.optim.AdamW([q], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(20):
        p.grad = torch.randn(7)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert (p - q).abs().max() < 1e-14


ROOTS = {"eigh": eigh_root, "newton": newton_root, "cans": cans_root}


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize(("p", "trace"), [(2, 11.011904001852697), (4, 9.897489292070635)])
def test_inverse_roots_of_a_toeplitz_matrix(name: str, p: int, trace: float):
    T = 2 * torch.eye(10) - torch.diag(torch.ones(9), 1) - torch.diag(torch.ones(9), -1)
    X = ROOTS[name](torch.stack([T, 3 * T]), -1 / p, 0.0)
    assert math.isclose(X[0].trace().item(), trace, rel_tol=1e-5)
    residual = torch.linalg.matrix_power(X[1], p) @ (3 * T) - torch.eye(10)
    assert residual.abs().max() < 1e-4


def test_newton_finds_cube_roots():
    X = newton_root(torch.diag(torch.tensor([8.0, 27.0]))[None], -1 / 3)[0]
    torch.testing.assert_close(X, torch.diag(torch.tensor([1 / 2, 1 / 3])), rtol=0, atol=1e-6)


def test_roots_damp_or_invert_on_the_range():
    shifted = eigh_root(torch.diag(torch.tensor([0.1, 3.1]))[None], -0.5, 1.0)[0]
    torch.testing.assert_close(shifted, torch.diag(torch.tensor([1.0, 0.5])))
    pseudo = eigh_root(torch.diag(torch.tensor([1.0, 4.0, 0.0]))[None], -0.5)[0]
    torch.testing.assert_close(pseudo, torch.diag(torch.tensor([1.0, 0.5, 0.0])))


@pytest.mark.parametrize("root", [newton_root, cans_root])
def test_iterations_refuse_what_they_cannot_do(root):
    with pytest.raises(ValueError, match="eigh_root"):
        root(torch.eye(2)[None], -0.3)
    with pytest.raises(ValueError, match="power of 2"):
        cans_root(torch.eye(2)[None], -1 / 3)


def test_the_probe_picks_a_root_that_is_right():
    root = measured_root(torch.device("cpu"), 40, -0.25)
    A = torch.diag(torch.linspace(0.1, 1, 40))[None]
    assert (root(A, -0.25, 0.0)[0].diagonal() - A[0].diagonal() ** -0.25).abs().max() < 1e-6
    assert fastest_dtype(torch.device("cpu")) in {torch.float32, torch.bfloat16}


def scalar(polynomials: tuple[Polynomial, ...], s: torch.Tensor) -> torch.Tensor:
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def test_newton_schulz_acts_on_singular_values():
    s = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.003])
    expected = torch.tensor([0.696436, 0.765439, 0.712120, 0.698917, 1.110357])
    torch.testing.assert_close(scalar(QUINTIC, s), expected, rtol=0, atol=1e-6)
    G = torch.diag(s / s.norm())[None]
    got = orthogonalised(G, QUINTIC, torch.float64)[0]
    torch.testing.assert_close(got, torch.diag(scalar(QUINTIC, s / s.norm())), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("polynomials", "smallest", "low", "high"),
    [
        (QUINTIC, 5e-3, 0.6818, 1.1543),
        (POLAR_EXPRESS, 1e-3, 0.876, 1.124),
        (CANS, 1e-3, 0.99, 1.01),
    ],
)
def test_ranges_of_the_polynomials(polynomials, smallest: float, low: float, high: float):
    values = scalar(polynomials, torch.logspace(math.log10(smallest), 0, 20_001))
    assert values.min() > low - 1e-3
    assert values.max() < high + 1e-3


def test_orthogonalisation_is_batched_and_commutes_with_transposition():
    G = torch.randn(3, 7, 4)
    whole = orthogonalised(G, CANS, torch.float64)
    torch.testing.assert_close(whole[1:2], orthogonalised(G[1:2], CANS, torch.float64))
    torch.testing.assert_close(whole, orthogonalised(G.mT, CANS, torch.float64).mT)
    assert orthogonalised(torch.zeros(1, 3, 2), CANS, torch.float64).abs().max() == 0


@pytest.mark.parametrize("m", [1, 5, 256, 300])
def test_half_of_a_symmetric_product_is_all_of_it(m: int):
    G, L = torch.randn(2, m, 7), torch.randn(2, m, m)
    L = L + L.mT
    got = mirrored(averaged_gram(L, G, 0.9, 0.1))
    torch.testing.assert_close(got, 0.9 * L + 0.1 * G @ G.mT)


def test_a_root_of_what_is_not_finite_is_not_finite_and_no_error():
    A = torch.stack([torch.eye(3), torch.full((3, 3), torch.inf)])
    first, second = eigh_root(A, -0.5)
    torch.testing.assert_close(first, torch.eye(3))
    assert second.isnan().all()


def test_the_kl_fixed_point_trains_a_deep_network():
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.arange(64) % 3
    model = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )
    optimizer = Shampoo(model, lr=3e-3, graft=None, kl=True)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
