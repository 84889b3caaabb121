"""The same matrices by curvlinops and BackPACK, which `make setup` installs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, fisher, ggn, hessian, kfac

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
backpack = pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")

LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
joints = pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 3),
    )


def data(loss, sizes=(5, 3)):
    if loss is nn.MSELoss:
        return [(torch.randn(n, 4), torch.randn(n, 3)) for n in sizes]
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


def dense(operator, model, loss, batches, **options):
    """A matrix of curvlinops."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    A = operator(model, loss, parameters, batches, check_deterministic=False, **options)
    return A @ torch.eye(A.shape[1])


@losses
@reductions
def test_hessian_and_gauss_newton(loss, reduction):
    model, batches, loss = mlp(), data(loss), loss(reduction=reduction)
    H = dense(curvlinops.HessianLinearOperator, model, loss, batches)
    assert_close(hessian(model, loss, batches).dense(), H, atol=1e-10, rtol=1e-10)
    G = dense(curvlinops.GGNLinearOperator, model, loss, batches)
    for product in (ggn, fisher):
        assert_close(product(model, loss, batches).dense(), G, atol=1e-10, rtol=1e-10)


@losses
@reductions
@joints
@pytest.mark.parametrize("net", [mlp, convolution], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_factored_curvature(name, net, joint, reduction, loss):
    """EKFAC squares the sum over positions, here as there, so convolutions agree, too."""
    model, batches, loss = net(), data(loss), loss(reduction=reduction)
    theirs = dense(
        getattr(curvlinops, f"{name}LinearOperator"),
        model,
        loss,
        batches,
        fisher_type="type-2",
        separate_weight_and_bias=not joint,
    )
    ours = {"KFAC": kfac, "EKFAC": ekfac}[name](model, loss, batches, joint=joint)
    assert_close(ours.dense(), theirs, atol=1e-10, rtol=1e-10)


@losses
def test_empirical_labels(loss):
    model, batches, loss = mlp(), data(loss), loss()
    options = {"fisher_type": "empirical", "separate_weight_and_bias": True}
    theirs = dense(curvlinops.KFACLinearOperator, model, loss, batches, **options)
    ours = kfac(model, loss, batches, labels="empirical", joint=False)
    assert_close(ours.dense(), theirs, atol=1e-10, rtol=1e-10)


def test_averaged_positions():
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.MSELoss()
    model.append(nn.Flatten()).append(nn.Linear(30, 3))
    batches = [(torch.randn(n, 6, 4), torch.randn(n, 3)) for n in (4, 2)]
    for reduce, approximation in ((True, "reduce"), (False, "expand")):
        options = {"fisher_type": "type-2", "kfac_approx": approximation}
        theirs = dense(curvlinops.KFACLinearOperator, model, loss, batches, **options)
        ours = kfac(model, loss, batches, reduce=reduce, joint=False)
        assert_close(ours.dense(), theirs, atol=1e-10, rtol=1e-10)


@losses
@reductions
def test_kflr_and_the_diagonal(loss, reduction):
    from backpack.extensions import KFLR, DiagGGNExact

    model, ((x, y),), loss = mlp(), data(loss, (6,)), loss(reduction=reduction)
    ours = kfac(model, loss, (x, y), joint=False)
    diagonal = mg.diagonal(fisher(model, loss, (x, y)))
    extended, criterion = backpack.extend(model), backpack.extend(loss)
    with backpack.backpack(KFLR(), DiagGGNExact()):
        criterion(extended(x), y).backward()
    for name, p in model.named_parameters():
        theirs = p.kflr[0] if len(p.kflr) == 1 else torch.kron(*p.kflr)
        assert_close(ours[name].dense()[0], theirs, atol=1e-10, rtol=1e-10)
    theirs = torch.cat([p.diag_ggn_exact.reshape(-1) for p in model.parameters()])
    assert_close(diagonal, theirs, atol=1e-10, rtol=1e-10)
