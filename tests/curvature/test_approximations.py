"""EKFAC and KFOC: how near each approximation is, and the optimum it must reach."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import _moments, _passes, ekfac, kfac, kfoc
from matrigami.operators import SpectralMatrix
from matrigami.structures import KroneckerMatrix
from tests.curvature import reference

NETS = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "relu": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 3),
    ),
    "wide": lambda: nn.Sequential(
        nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)
    ),
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
losses = pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])


def data(loss, sizes=(7, 4)):
    if isinstance(loss, nn.MSELoss):
        return [(torch.randn(n, 4), torch.randn(n, 3)) for n in sizes]
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


@pytest.fixture
def streaming(monkeypatch):
    """As if nothing could be kept from one pass to the next."""
    monkeypatch.setattr(_passes, "KEPT", 0)


def compared(net, loss, *values):
    """The distance of each value from the matrix, for each of its blocks."""
    model, batches = net, data(loss)
    full = reference.gauss_newton(model, loss, batches)
    found = [value(model, loss, batches) for value in values]
    for names in found[0].names:
        exact = reference.block(full, model, names)
        yield [reference.distance(F[names[0]].dense(), exact) for F in found]


def optimum(model, loss, batches, names):
    """The error of the best Kronecker product, by a dense decomposition."""
    exact = reference.block(reference.gauss_newton(model, loss, batches), model, names)
    m = dict(model.named_parameters())[names[0]].shape[0]
    best = reference.nearest_product(exact[0], m, exact.shape[-1] // m)
    return exact, reference.distance(best, exact[0])


@every_net
@losses
def test_each_refinement_is_at_least_as_near(net, loss):
    def both(model, *rest):
        return ekfac(model, *rest, basis=kfoc(model, *rest))

    for plain, corrected, nearest, both_errors in compared(net(), loss, kfac, ekfac, kfoc, both):
        assert corrected <= plain + 1e-12
        assert nearest <= plain + 1e-12
        assert both_errors <= nearest + 1e-12


@every_net
@losses
def test_the_trace_and_the_diagonal_in_the_basis_of_ekfac_are_those_of_the_block(net, loss):
    model, batches = net(), data(loss)
    full = reference.gauss_newton(model, loss, batches)
    F = ekfac(model, loss, batches)
    for names, value in zip(F.names, F.blocks, strict=True):
        Q, exact = value.vectors.dense()[0], reference.block(full, model, names)[0]
        assert_close(value.values[0], (Q.mT @ exact @ Q).diagonal(), atol=1e-13, rtol=1e-9)
        assert_close(mg.trace(value)[0], exact.trace())


@every_net
@losses
def test_kfoc_is_within_a_hundredth_of_the_optimum_after_two_iterations(net, loss):
    model, batches = net(), data(loss)
    F = kfoc(model, loss, batches)
    for names in F.names:
        exact, best = optimum(model, loss, batches, names)
        assert reference.distance(F[names[0]].dense(), exact) <= 1.01 * best + 1e-12


@pytest.mark.parametrize(
    ("net", "kept"),
    [
        ("relu", True),
        pytest.param("conv", False, marks=pytest.mark.slow),
        pytest.param("relu", False, marks=pytest.mark.slow),
    ],
)
def test_kfoc_reaches_the_optimum(net, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(_passes, "KEPT", 0)
    model, loss = NETS[net](), nn.CrossEntropyLoss()
    batches = data(loss)
    F = kfoc(model, loss, batches, iterations=50)
    for names in F.names:
        exact, best = optimum(model, loss, batches, names)
        assert abs(reference.distance(F[names[0]].dense(), exact) - best) < 1e-6


def test_gram_matrices_and_streaming_give_one_answer(streaming, monkeypatch):
    """Two orders of the same iteration, so their limits agree."""
    model, loss = NETS["wide"](), nn.CrossEntropyLoss()
    batches = data(loss, (2, 2))
    streamed = kfoc(model, loss, batches, iterations=30)
    monkeypatch.undo()
    kept = kfoc(model, loss, batches, iterations=30)
    assert_close(kept.dense(), streamed.dense(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "streaming"])
def test_small_gradients_do_not_underflow(kept, monkeypatch):
    """Fourth powers of gradients are below the smallest number in single precision."""
    if not kept:
        monkeypatch.setattr(_passes, "KEPT", 0)
    model, loss = NETS["wide"]().float(), nn.CrossEntropyLoss()
    model[4].weight.data.mul_(1e-11)
    batches = [(x.float(), y) for x, y in data(loss, (2, 2))]
    F = kfoc(model, loss, batches)["2.weight"]
    exact = kfoc(model.double(), loss, [(x.double(), y) for x, y in batches])["2.weight"]
    assert reference.distance(F.dense()[0].double(), exact.dense()[0]) < 1e-4


def test_kfoc_is_symmetric_and_positive():
    loss = nn.CrossEntropyLoss()
    for net in NETS.values():
        for block in kfoc(net(), loss, data(loss)).blocks:
            assert isinstance(block, KroneckerMatrix)
            for factor in block.factors:
                F = factor.dense()
                assert_close(F, F.mT)
                values = torch.linalg.eigvalsh(F)
                assert values.min() > -1e-12 * values.max()


def test_values_of_ekfac_are_not_negative_and_its_basis_is_orthonormal():
    loss = nn.CrossEntropyLoss()
    for block in ekfac(NETS["relu"](), loss, data(loss)).blocks:
        assert isinstance(block, SpectralMatrix)
        Q = block.vectors.dense()[0]
        assert_close(Q.mT @ Q, torch.eye(len(Q)))
        assert block.values.min() >= 0


def test_a_basis_of_ekfac_may_be_used_again():
    model, loss = NETS["tanh"](), nn.CrossEntropyLoss()
    batches = data(loss)
    F = ekfac(model, loss, batches)
    assert_close(ekfac(model, loss, batches, basis=F).dense(), F.dense())
    assert_close(ekfac(model, loss, batches, basis=kfac(model, loss, batches)).dense(), F.dense())


def test_passes_that_are_not_kept_give_the_same(streaming, monkeypatch):
    model, loss = NETS["conv"](), nn.CrossEntropyLoss()
    batches = data(loss)
    for labels in ("exact", 2):
        streamed = ekfac(model, loss, batches, labels=labels)
        monkeypatch.undo()
        assert_close(ekfac(model, loss, batches, labels=labels).dense(), streamed.dense())


def test_columns_in_turns_give_the_same(monkeypatch):
    model, loss = NETS["relu"](), nn.CrossEntropyLoss()
    batches = data(loss)
    whole = [method(model, loss, batches) for method in (kfac, ekfac)]
    monkeypatch.setattr(_passes, "ENTRIES", 1)
    for method, F in zip((kfac, ekfac), whole, strict=True):
        assert_close(method(model, loss, batches).dense(), F.dense(), rtol=1e-9, atol=1e-12)


def test_zero_gradients_make_zero_blocks():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].bias.data.fill_(-100.0)
    loss = nn.CrossEntropyLoss()
    for method in (kfac, ekfac, kfoc):
        F = method(model, loss, data(loss))
        assert torch.equal(F["0.weight"].dense(), torch.zeros(1, 25, 25))
        assert mg.trace(F) > 0


@pytest.mark.parametrize(
    "shape", [(1, 64, 256), (2, 200, 300), (1, 600, 1030), (3, 5, 700)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gram_matrix_equals_its_transpose_in_every_bit(shape, dtype):
    X = torch.randn(shape, dtype=dtype)
    G = _moments.gram(X)
    assert torch.equal(G, G.mT)
    assert_close(G, X.mT @ X, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-5)
