"""SOAP against its published algorithm, and its own identities."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from matrigami.optim import SOAP
from matrigami.optim._bases import _gram_schmidt, orthogonal, refreshed
from tests.optim.reference_soap import ReferenceSOAP


def gradients(steps: int, m: int, n: int) -> list[torch.Tensor]:
    scale = torch.rand(m, 1) + 0.1
    return [scale * torch.randn(m, n) for _ in range(steps)]


def trained(p: nn.Parameter, optimizer: torch.optim.Optimizer, stream: list[torch.Tensor]):
    for G in stream:
        p.grad = G.clone()
        optimizer.step()


@pytest.mark.parametrize(("m", "n"), [(7, 5), (6, 6), (3, 12)])
def test_trajectory_is_that_of_the_reference(m: int, n: int):
    W, (first, *stream) = torch.randn(m, n), gradients(51, m, n)
    p = nn.Parameter(W.clone())
    ours = SOAP([p], lr=0.0, stagger=False)
    trained(p, ours, [first])
    reference = ReferenceSOAP(W, first, 0.02, (0.95, 0.95), 10)
    state = ours.state[p]
    for name in "LRPQ":  # the first gradient is a step of ours, but not of theirs
        setattr(reference, name, state[name][0].clone())
    for name in ("M", "V", "step"):
        state[name].zero_()
    ours.param_groups[0].update(lr=0.02, clock=0)

    for G in stream:
        trained(p, ours, [G])
        reference.step(G, 0.01)
    assert (p.detach() - reference.W).abs().max() < 1e-8
    torch.testing.assert_close(state["V"][0], reference.V)


def test_momentum_is_the_same_in_the_old_and_in_the_new_basis():
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = SOAP([p], stagger=False, frequency=4, betas=(0.9, 0.99))
    stream = gradients(4, 6, 5)
    trained(p, optimizer, stream[:3])
    old = {k: S.clone() for k, S in optimizer.state[p].items()}
    trained(p, optimizer, stream[3:])  # a refresh
    new = optimizer.state[p]
    H = old["P"].mT @ stream[3] @ old["Q"]
    M = 0.9 * old["M"] + 0.1 * H
    torch.testing.assert_close(old["P"] @ M @ old["Q"].mT, new["P"] @ new["M"] @ new["Q"].mT)
    assert (new["P"] - old["P"]).abs().max() > 1e-3
    V = 0.99 * old["V"] + 0.01 * H**2
    torch.testing.assert_close(new["V"].flatten().sort().values, V.flatten().sort().values)


def test_each_refresh_comes_nearer_to_the_eigenbasis():
    A = torch.randn(2, 8, 8)
    L, Q = A @ A.mT, torch.linalg.qr(torch.randn(2, 8, 8)).Q
    off = []
    for _ in range(30):
        Q = refreshed(L, Q).basis
        D = Q.mT @ L @ Q
        off.append((D - torch.diag_embed(D.diagonal(dim1=-2, dim2=-1))).norm().item())
    assert off[29] < 0.1 * off[0]
    assert all(b <= a * 1.01 for a, b in pairwise(off[3:]))


def test_an_ill_conditioned_refresh_falls_back_to_householder():
    Q = torch.linalg.qr(torch.randn(1, 40, 40)).Q
    L = Q @ torch.diag(torch.logspace(0, -14, 40)) @ Q.mT
    result = refreshed(L, torch.eye(40)[None])
    assert result.sound.all()
    assert (result.basis.mT @ result.basis - torch.eye(40)).abs().max() < 1e-11


@pytest.mark.parametrize("m", [63, 64, 65, 150])
def test_blocks_of_columns_become_what_householder_makes_of_them(m):
    Q, R = torch.linalg.qr(torch.randn(3, m, m))
    scales = torch.logspace(0, -3, m)  # small columns lean on the large ones, as in a refresh
    X = (Q + 0.3 * Q[..., :1]) * scales
    basis = _gram_schmidt(X)
    Q, R = torch.linalg.qr(X)
    torch.testing.assert_close(basis, Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None])
    assert (basis.mT @ basis - torch.eye(m)).abs().max() < 1e-12


def test_one_pass_is_enough_for_columns_of_condition_1e3_in_single_precision():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(1, 150, 150)).Q
    L = Q @ torch.diag(torch.logspace(0, -5, 150)) @ Q.mT
    X = (L @ (Q + 1e-3 * torch.randn(150, 150))).float()
    X = X / X.norm(dim=-2, keepdim=True)
    C = torch.linalg.cholesky(X.mT @ X)
    assert not orthogonal(torch.linalg.solve_triangular(C.mT, X, upper=True, left=False)).all()
    assert orthogonal(_gram_schmidt(X)).all()


def test_a_failed_refresh_keeps_the_basis_and_is_counted():
    p = nn.Parameter(torch.zeros(4, 3))
    optimizer = SOAP([p], stagger=False, frequency=3)
    trained(p, optimizer, gradients(2, 4, 3))
    before = optimizer.state[p]["P"].clone()
    optimizer.state[p]["L"].fill_(float("nan"))  # as a broken device would
    trained(p, optimizer, gradients(1, 4, 3))
    state = optimizer.state[p]
    assert torch.equal(state["P"], before)
    assert state["failures"].tolist() == [1]
    assert p.isfinite().all()
    assert not orthogonal(torch.full((1, 3, 3), float("nan")))[0]


def test_refreshes_are_spread_over_the_cycle():
    ps = [nn.Parameter(torch.zeros(*shape)) for shape in [(8, 8), (8, 8), (8, 4)]]
    optimizer = SOAP(ps, frequency=6)
    trained_once = [torch.randn_like(p) for p in ps]
    for p, G in zip(ps, trained_once, strict=True):
        p.grad = G
    optimizer.step()
    turns = [turn for p in ps for turn in optimizer.state[p]["offset"].flatten().tolist()]
    assert sorted(turns) == [0, 1, 2, 3, 4, 5]
