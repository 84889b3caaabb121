"""Where the theory says that K-FAC is exact, it is."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, ggn, kfac, kfoc
from tests.curvature import reference

SIZES = [(6, 3, 1), (5, 4, 3), (4, 4)]
LOSSES = {"mse": nn.MSELoss, "ce": nn.CrossEntropyLoss, "bce": nn.BCEWithLogitsLoss}
METHODS = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}

reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
joints = pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def chain(*sizes, activation=None, bias=True):
    layers = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m, bias=bias), *([activation()] if activation else [])]
    return nn.Sequential(*(layers[:-1] if activation else layers))


def targets(loss, n, c, *more):
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(c, (n, *more))
    drawn = torch.randn(n, c, *more)
    return drawn if isinstance(loss, nn.MSELoss) else (drawn > 0).to(drawn.dtype)


def check_exact(F, model, loss, batches, tolerance=1e-10):
    full = reference.gauss_newton(model, loss, batches)
    assert_close(F.dense(), reference.assembled(full, model, F), atol=tolerance, rtol=tolerance)


@reductions
@joints
@methods
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_deep_linear_network_with_a_squared_error(sizes, method, joint, reduction):
    model, loss = chain(*sizes), nn.MSELoss(reduction=reduction)
    batches = [(torch.randn(n, sizes[0]), torch.randn(n, sizes[-1])) for n in (5, 2)]
    check_exact(method(model, loss, batches, joint=joint), model, loss, batches)


@reductions
@joints
@methods
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_one_datum_and_any_network(loss, method, joint, reduction):
    model, loss = chain(4, 5, 3, activation=nn.Tanh), loss(reduction=reduction)
    batches = [(torch.randn(1, 4), targets(loss, 1, 3))]
    check_exact(method(model, loss, batches, joint=joint), model, loss, batches)


@joints
def test_the_last_layer_with_a_squared_error(joint):
    model, loss = chain(4, 5, 3, activation=nn.Tanh), nn.MSELoss()
    batches = [(torch.randn(n, 4), torch.randn(n, 3)) for n in (6, 3)]
    F = kfac(model, loss, batches, joint=joint)
    full = reference.gauss_newton(model, loss, batches)
    for names, value in list(zip(F.names, F.blocks, strict=True))[1 if joint else 2 :]:
        assert_close(value.dense(), reference.block(full, model, names), atol=1e-12, rtol=1e-12)


def test_a_loss_at_every_position_is_exact_by_counting_positions():
    model, loss = nn.Sequential(chain(4, 5, 3), nn.Flatten()), nn.MSELoss()
    batches = [(torch.randn(n, 6, 4), torch.randn(n, 18)) for n in (5, 2)]
    check_exact(kfac(model, loss, batches), model, loss, batches)
    assert (
        reference.distance(
            kfac(model, loss, batches, reduce=True).dense(),
            kfac(model, loss, batches).dense(),
        )
        > 0.1
    )


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_averaged_positions_are_exact_by_reducing():
    model, loss = nn.Sequential(chain(4, 5, 3), Mean()), nn.MSELoss()
    batches = [(torch.randn(n, 6, 4), torch.randn(n, 3)) for n in (5, 2)]
    check_exact(kfac(model, loss, batches, reduce=True), model, loss, batches)


@joints
def test_a_convolution_with_a_global_pool_is_exact_by_reducing(joint):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.append(nn.Linear(3, 2))
    loss = nn.MSELoss()
    batches = [(torch.randn(n, 2, 5, 4), torch.randn(n, 2)) for n in (4, 2)]
    check_exact(kfac(model, loss, batches, reduce=True, joint=joint), model, loss, batches)


def test_a_convolution_with_a_loss_at_every_pixel_is_exact_by_counting():
    model, loss = nn.Conv2d(2, 3, 2), nn.MSELoss()
    batches = [(torch.randn(n, 2, 4, 3), torch.randn(n, 3, 3, 2)) for n in (4, 2)]
    check_exact(kfac(model, loss, batches), model, loss, batches)


@reductions
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss], ids=["ce", "mse"])
def test_a_sequence_of_labels_with_one_linear_layer(loss, reduction):
    """Cross entropy: one position of each example has nothing to share, so one example is exact."""
    model, loss = nn.Conv1d(4, 3, 1), loss(reduction=reduction)
    batches = [(torch.randn(1, 4, 1), targets(loss, 1, 3, 1))]
    check_exact(kfac(model, loss, batches), model, loss, batches)
    batches = [(torch.randn(4, 4, 5), targets(loss, 4, 3, 5))]
    full = reference.gauss_newton(model, loss, batches)
    F = ekfac(model, loss, batches)
    assert_close(mg.trace(F), full.trace())
    sums = reference.pair_sums(model, loss, batches)["weight", "bias"]
    assert_close(sums, reference.block(full, model, ("weight", "bias")))


@pytest.mark.parametrize(
    "structure", [mg.Monarch(2), mg.BlockTensorTrain(), mg.LowRank(2)], ids=str
)
def test_cores_that_share_nothing_are_exact_block_by_block(structure):
    loss = nn.MSELoss()
    model = nn.Sequential(
        mg.nn.StructuredLinear(4, 6, structure), mg.nn.StructuredLinear(6, 4, structure)
    )
    batches = [(torch.randn(n, 4), torch.randn(n, 4)) for n in (5, 2)]
    check_exact(kfac(model, loss, batches), model, loss, batches)


def test_one_linear_layer_has_the_gauss_newton_matrix_as_its_block():
    model, loss = nn.Linear(4, 3), nn.MSELoss()
    batches = [(torch.randn(7, 4), torch.randn(7, 3))]
    F = kfac(model, loss, batches)
    order = reference.places(model, ("weight", "bias"))[0]
    assert_close(ggn(model, loss, batches).dense()[order][:, order], F["weight"].dense()[0])


@joints
def test_one_newton_step_lands_on_least_squares(joint):
    model, loss = nn.Linear(5, 3, bias=joint), nn.MSELoss()
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    F = kfac(model, loss, (x, y), joint=joint)
    gradient = torch.autograd.grad(loss(model(x), y), tuple(model.parameters()))
    step = F.tensors(mg.solve(F, F.vector(dict(zip(F.order, gradient, strict=True)))))
    X = torch.cat([x, torch.ones(20, 1)], 1) if joint else x
    best = torch.linalg.lstsq(X, y).solution.mT
    assert_close(model.weight - step["weight"], best[:, :5], atol=1e-10, rtol=1e-10)
