"""Errors of approximations against their definitions, and the figures that show them."""

import pytest
import torch
from torch import nn

import matrigami as mg
from matrigami.curvature import compare, dense_block, ggn, kfac, kfoc, positions
from matrigami.plots import plot_blocks, plot_errors


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(20, 5), torch.arange(20) % 3)


def test_errors_are_those_of_the_definition(problem):
    exact, F = ggn(*problem), kfac(*problem)
    first, second = compare(exact, {"kfac": F}, damping=0.01)
    D, E = (M.dense()[:24, :24] for M in (exact, F))
    assert (first.block, first.size, second.size) == (("0.weight", "0.bias"), 24, 15)
    places = positions(F)["0.weight", "0.bias"]
    assert torch.equal(places, torch.arange(24))
    assert torch.allclose(dense_block(exact, places), D)
    assert first.frobenius == pytest.approx(float((E - D).norm() / D.norm()))
    assert first.spectral == pytest.approx(
        float(torch.linalg.matrix_norm(E - D, 2) / torch.linalg.matrix_norm(D, 2))
    )
    assert first.trace == pytest.approx(float(E.trace() / D.trace()))
    R = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    eye = 0.01 * torch.eye(24)
    X, Y = (torch.linalg.solve(M + eye, R) for M in (E, D))
    assert first.solve == pytest.approx(float((X - Y).norm() / Y.norm()))


def test_large_blocks_are_left_out_and_progress_is_told(problem):
    told: list[tuple[int, int]] = []
    found = compare(
        ggn(*problem),
        {"kfac": kfac(*problem)},
        largest=20,
        progress=lambda *done: told.append(done),
    )
    assert [e.size for e in found] == [15]
    assert told == [(15, 15)]


def test_without_damping_the_pseudo_inverse_is_compared(problem):
    F = kfac(*problem)
    found = compare(F, {"itself": F}, damping=0.0)
    assert max(e.solve for e in found) < 1e-8


def test_what_cannot_be_compared(problem):
    with pytest.raises(ValueError, match="no approximations"):
        compare(ggn(*problem), {})
    both = {"joint": kfac(*problem), "separate": kfac(*problem, joint=False)}
    with pytest.raises(ValueError, match="same `joint`"):
        compare(ggn(*problem), both)
    with pytest.raises(ValueError, match="same `joint`"):
        compare(mg.DenseMatrix(torch.eye(3)), {"kfac": kfac(*problem)})


def test_figures(problem, tmp_path):
    exact = ggn(*problem)
    found = {"kfac": kfac(*problem), "kfoc": kfoc(*problem)}
    errors = compare(exact, found)
    figure = plot_errors({"now": errors, "again": errors}, tmp_path / "errors.png", title="t")
    assert figure.read_bytes().startswith(b"\x89PNG")
    blocks = {name: F.dense() for name, F in {"exact": exact, **found}.items()}
    assert b"<svg" in plot_blocks(blocks, tmp_path / "blocks.svg").read_bytes()
