"""Hessian, Gauss-Newton and Fisher matrices against their definitions."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, fisher, ggn, hessian
from matrigami.krylov import largest_eigenpairs, stochastic_logdet

LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss, lambda n, g: torch.randint(0, 3, (n,), generator=g)),
    "squared error": (nn.MSELoss, lambda n, g: torch.randn(n, 3, generator=g)),
    "binary": (
        nn.BCEWithLogitsLoss,
        lambda n, g: torch.randint(0, 2, (n, 3), generator=g).double(),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def network(structure: mg.Structure | None = None) -> nn.Module:
    torch.manual_seed(3)
    first = nn.Linear(4, 6) if structure is None else mg.nn.StructuredLinear(4, 6, structure)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3, bias=False))


def data(name: str, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    return x, LOSSES[name][1](n, g)


def flat(model: nn.Module):
    """The model as a function of one vector, and that vector."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    v = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def f(v, x):
        parts = {k: t.view(named[k].shape) for k, t in zip(named, v.split(sizes), strict=True)}
        return functional_call(model, parts, (x,))

    return f, v


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_is_the_second_derivative(name, reduction):
    model, (x, y) = network(), data(name)
    loss = LOSSES[name][0](reduction=reduction)
    f, v = flat(model)
    exact = torch.func.hessian(lambda w: loss(f(w, x), y))(v)
    H = hessian(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert_close(H.dense(), exact, atol=1e-12, rtol=1e-10)
    X = torch.randn(len(v), 3)
    assert_close(H @ X, exact @ X, atol=1e-12, rtol=1e-10)
    assert_close(H @ X[:, :0], X[:, :0])


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ggn_and_exact_fisher_are_the_same_definition(name, reduction):
    model, (x, y) = network(), data(name)
    loss = LOSSES[name][0](reduction=reduction)
    f, v = flat(model)
    J = jacrev(lambda w: f(w, x).flatten())(v)
    H = torch.func.hessian(lambda z: loss(z.view(8, 3), y))(f(v, x).flatten())
    assert_close(ggn(model, loss, (x, y)).dense(), J.mT @ H @ J, atol=1e-12, rtol=1e-10)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    assert_close(fisher(model, loss, batches).dense(), J.mT @ H @ J, atol=1e-12, rtol=1e-10)


def test_ggn_is_the_hessian_of_a_linear_model():
    x, y = data("cross entropy")
    model = nn.Linear(4, 3)
    matrices = [m(model, nn.CrossEntropyLoss(), (x, y)).dense() for m in (ggn, hessian)]
    assert_close(*matrices, atol=1e-12, rtol=1e-10)


@every_loss
def test_empirical_fisher_is_the_mean_outer_product_of_the_gradients(name):
    model, (x, y) = network(), data(name)
    f, v = flat(model)
    mean = LOSSES[name][0]()
    rows = [
        torch.func.grad(lambda w, i=i: mean(f(w, x[i : i + 1]), y[i : i + 1]))(v) for i in range(8)
    ]
    outputs = 3 if name != "cross entropy" else 1  # terms that one example averages
    exact = sum(torch.outer(r, r) for r in rows) / 8 * outputs
    assert_close(
        fisher(model, mean, (x, y), labels="empirical").dense(), exact, atol=1e-12, rtol=1e-9
    )


@every_loss
def test_sampled_fisher_converges_to_the_exact_one(name):
    model, batch = network(), data(name)
    loss = LOSSES[name][0]()
    exact = fisher(model, loss, batch).dense()
    errors = []
    for samples in (16, 4096):
        found = fisher(model, loss, batch, labels=samples).dense()
        errors.append(
            float(torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact))
        )
    assert errors[1] < 0.1
    assert (
        errors[1] < errors[0] / 4
    )  # sixteen times less variance is expected from 256 times the samples


def test_curvature_of_a_structured_layer():
    model, (x, y) = network(mg.Monarch(blocks=2)), data("cross entropy")
    f, v = flat(model)
    loss = nn.CrossEntropyLoss()
    exact = torch.func.hessian(lambda w: loss(f(w, x), y))(v)
    assert_close(hessian(model, loss, (x, y)).dense(), exact, atol=1e-12, rtol=1e-10)


def test_a_sequence_of_labels_counts_every_position():
    model = nn.Conv1d(4, 3, 1)
    x, y = torch.randn(5, 4, 7), torch.randint(0, 3, (5, 7))
    loss = nn.CrossEntropyLoss()
    assert_close(
        fisher(model, loss, (x, y)).dense(), ggn(model, loss, (x, y)).dense(), atol=1e-12, rtol=1e-9
    )


def test_the_functions_of_the_algebra_apply():
    model, batch = network(), data("squared error")
    G = ggn(model, nn.MSELoss(), batch)
    D = G.dense()
    assert_close(mg.trace(G), D.trace())
    assert_close(mg.diagonal(G), D.diagonal())
    damped = G + mg.DiagonalMatrix(torch.full((len(D),), 0.1))
    b = torch.randn(len(D))
    assert_close(damped @ mg.solve(damped, b), b)
    assert_close(mg.logdet(damped), torch.logdet(damped.dense()))
    values, _ = largest_eigenpairs(G, 3)
    assert_close(values, torch.linalg.eigvalsh(D).flip(0)[:3])
    found = stochastic_logdet(damped, probes=64)
    assert (found.value - torch.logdet(damped.dense())).abs() < 4 * found.error


def test_the_model_is_left_alone():
    model, batch = network(), data("cross entropy")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hessian(model, nn.CrossEntropyLoss(), batch).dense()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused():
    x, y = data("cross entropy")
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="has no trainable parameters"):
        hessian(frozen, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ValueError, match="no data"):
        ggn(network(), nn.CrossEntropyLoss(), [])
    with pytest.raises(ValueError, match="batch 1 holds NaN"):
        ggn(network(), nn.CrossEntropyLoss(), [(x, y), (x * torch.nan, y)])
    for loss in (
        nn.L1Loss(),
        nn.HuberLoss(),
        nn.functional.l1_loss,
    ):
        with pytest.raises(ValueError, match="likelihood is not known"):
            fisher(network(), loss, (x, y))
    for labels in (0, "type2", 1.5):
        with pytest.raises((ValueError, TypeError)):
            fisher(network(), nn.CrossEntropyLoss(), (x, y), labels=labels)


@pytest.mark.parametrize("make", [hessian, ggn, fisher])
def test_a_layer_in_two_places_stays_in_the_model_and_counts_twice(make):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    x, y = data("cross entropy")
    found = make(model, nn.CrossEntropyLoss(), (x, y)).dense()
    assert isinstance(layer.weight, nn.Parameter)
    twin = copy.deepcopy(layer)
    twin.weight, twin.bias = layer.weight, layer.bias
    tied = nn.Sequential(layer, nn.Tanh(), twin, nn.Tanh(), model[4])
    assert_close(found, make(tied, nn.CrossEntropyLoss(), (x, y)).dense())
    model(x).sum().backward()
    assert layer.weight.grad is not None


def test_rows_without_gradients_are_not_in_the_gauss_newton_matrix():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.tensor([[0, 1], [2, 0], [3, 4], [1, 1]]), torch.tensor([0, 1, 2, 1])
    G, loss = ggn(model, nn.CrossEntropyLoss(), (x, y)).dense(), nn.CrossEntropyLoss()
    rows = [
        torch.autograd.grad(o, list(model.parameters()), retain_graph=True)
        for o in model(x).flatten()
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    H = torch.func.hessian(lambda o: loss(o.view(4, 3), y))(model(x).detach().flatten())
    assert_close(G, J.mT @ H @ J)
    assert G[:4].abs().max() == 0
    assert_close(mg.trace(ekfac(model, loss, (x, y))), G.trace())
