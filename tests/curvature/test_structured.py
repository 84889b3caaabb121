"""Cores of structured layers: stacks of small Kronecker products."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, kfac, kfoc
from matrigami.operators import contractions
from matrigami.structures import EXAMPLES
from tests.curvature import reference

every_structure = pytest.mark.parametrize("name", EXAMPLES)


def network(structure, n=6, m=6):
    layer = mg.nn.StructuredLinear(n, m, structure)
    for p in layer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(m, 3))


def data(n=6, sizes=(4, 3), *positions):
    return [(torch.randn(k, *positions, n), torch.randint(3, (k, *positions))) for k in sizes]


@every_structure
def test_the_sum_over_examples_and_positions_is_the_block_of_each_core(name):
    model, batches, loss = network(EXAMPLES[name]), data(), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    found = reference.pair_sums(model, loss, batches)
    names = {f"0.{core}" for core in model[0].factor_names} | {"0.bias"}
    assert {key[0] for key in found} == names | {"2.weight"}
    for keys, sums in found.items():
        expected = reference.block(full, model, keys, len(sums))
        assert_close(sums, expected, atol=1e-12, rtol=1e-9)


@every_structure
def test_the_size_of_the_blocks_is_that_of_the_contraction(name):
    model, batches = network(EXAMPLES[name]), data()
    F = kfac(model, nn.CrossEntropyLoss(), batches)
    parts = contractions(model[0].matrix())
    for core, part in zip(model[0].factor_names, parts, strict=True):
        b, o, i = part.matrix.blocks().shape
        assert F[f"0.{core}"].shape == (b, o * i, o * i)


@every_structure
def test_closer_methods_are_closer_on_every_core(name):
    model, batches, loss = network(EXAMPLES[name]), data(), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    plain = kfac(model, loss, batches)
    best = kfoc(model, loss, batches, iterations=4)
    corrected = ekfac(model, loss, batches)
    assert_close(mg.trace(corrected), full.trace(), rtol=1e-10, atol=0)
    for names in plain.names:
        start, nearest, basis = (F[names[0]].dense() for F in (plain, best, corrected))
        exact = reference.block(full, model, names, len(start))
        for one in range(len(start)):
            errors = [float((F[one] - exact[one]).norm()) for F in (start, nearest, basis)]
            assert errors[1] <= errors[0] + 1e-12
            assert errors[2] <= errors[0] + 1e-12


def test_a_cropped_structure_is_that_of_its_larger_matrix():
    model, batches, loss = network(mg.Monarch(2, pad=True), 5, 5), data(5), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    for keys, sums in reference.pair_sums(model, loss, batches).items():
        expected = reference.block(full, model, keys, len(sums))
        assert_close(sums, expected, atol=1e-12, rtol=1e-9)


def test_one_block_is_a_dense_layer():
    dense = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches, loss = data(), nn.CrossEntropyLoss()
    for structure, core in ((mg.Dense(), "entries"), (mg.BlockDiagonal(1), "blocks")):
        layer = mg.nn.StructuredLinear(6, 5, structure)
        layer.load_matrix(mg.project(structure, dense[0].weight.detach()))
        layer.bias.data.copy_(dense[0].bias.detach())
        model = nn.Sequential(layer, *dense[1:])
        for method in (kfac, ekfac, kfoc):
            ours = method(model, loss, batches, joint=False)
            other = method(dense, loss, batches, joint=False)
            assert_close(ours[f"0.{core}"].dense(), other["0.weight"].dense())
            assert_close(ours["0.bias"].dense(), other["0.bias"].dense())


def test_low_rank_is_two_layers():
    layer = mg.nn.StructuredLinear(6, 5, mg.LowRank(2))
    one = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))
    A = layer.matrix()
    first, second = nn.Linear(6, 2, bias=False), nn.Linear(2, 5)
    U, V = list(layer.parameters())[:2]
    thin, wide = (U, V) if U.shape == (5, 2) else (V, U)
    second.weight.data.copy_(thin.detach())
    first.weight.data.copy_(wide.detach() if wide.shape == (2, 6) else wide.detach().mT)
    second.bias.data.copy_(layer.bias.detach())
    assert_close(A.dense(), second.weight @ first.weight)
    two = nn.Sequential(first, second, nn.Tanh(), one[2])
    batches, loss = data(), nn.CrossEntropyLoss()
    F = kfac(one, loss, batches, joint=False)
    G = kfac(two, loss, batches, joint=False)
    names = layer.factor_names
    assert_close(mg.trace(F[f"0.{names[0]}"]), mg.trace(G["1.weight"]))
    assert_close(mg.trace(F[f"0.{names[1]}"]), mg.trace(G["0.weight"]))
    assert_close(mg.norm(F[f"0.{names[0]}"]), mg.norm(G["1.weight"]))
    assert_close(mg.norm(F[f"0.{names[1]}"]), mg.norm(G["0.weight"]))


def test_sharing_favours_the_nearest_product():
    """A Kronecker factor acts at many positions: the nearest product gains most there."""
    model, batches, loss = network(mg.Kronecker()), data(), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    errors = {}
    for method in (kfac, kfoc):
        F = method(model, loss, batches)
        key = f"0.{model[0].factor_names[0]}"
        exact = reference.block(full, model, (key,))
        errors[method] = reference.distance(F[key].dense(), exact)
    assert float(errors[kfoc]) < 0.8 * float(errors[kfac])


def test_positions_of_a_sequence_and_those_of_a_core_are_alike():
    loss = nn.MSELoss()
    model = nn.Sequential(mg.nn.StructuredLinear(6, 6, mg.Kronecker()), nn.Tanh())
    batches = [(torch.randn(n, 4, 6), torch.randn(n, 4, 6)) for n in (3, 2)]
    full = reference.gauss_newton(model, loss, batches)
    for keys, sums in reference.pair_sums(model, loss, batches).items():
        expected = reference.block(full, model, keys, len(sums))
        assert_close(sums, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_a_cap_is_refused():
    layer = mg.nn.StructuredLinear(6, 6, mg.LowRank(2), rms_cap=True)
    with pytest.raises(TypeError, match="rms_cap"):
        kfac(layer, nn.MSELoss(), (torch.randn(3, 6), torch.randn(3, 6)))
