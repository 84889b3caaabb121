"""Searches among several structures for one matrix."""

import pytest
import torch

from matrigami import BlockTensorTrain, Monarch
from matrigami.nn import _candidates as candidates, hopeful
from matrigami.operators import project

RECIPES = [
    BlockTensorTrain(rank=2),
    Monarch(blocks=2, rank=4),
    Monarch(blocks=4, rank=2),
    Monarch(blocks=8, rank=1),
]


@pytest.fixture
def searches(monkeypatch):
    """The structures that are searched for, with the most steps where they are told."""
    made = []

    def counted(recipe, W, *, left=None, right=None, **how):
        made.append((recipe, how.get("steps")))
        return project(recipe, W, left=left, right=right, **how)

    monkeypatch.setattr(candidates, "project", counted)
    return made


def _problem(m, n):
    """A matrix with a moment of its inputs, and the loss in it."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator)
    X = torch.randn(n, 3 * n, generator=generator)
    right = X @ torch.diag(torch.linspace(0.1, 2, 3 * n).to(X)) @ X.mT

    def lost(A):
        E = W - A.dense()
        return float((E @ right * E).sum())

    return W, right, lost


def test_few_are_carried_through_and_the_best_is_among_them(searches):
    W, right, lost = _problem(16, 16)
    found = hopeful(RECIPES, W, lost, right=right)
    every = [lost(project(recipe, W, right=right)) for recipe in RECIPES]
    assert min(lost(A) for _, A in found) == pytest.approx(min(every), rel=1e-9)
    through = [recipe for recipe, steps in searches if steps is None]
    assert through == [recipe for recipe, _ in found]
    assert len(through) < len(RECIPES)
    assert len(searches) == len(RECIPES) + len(through)


def test_one_structure_is_searched_for_once(searches):
    W, right, lost = _problem(16, 16)
    hopeful(RECIPES[:1], W, lost, right=right)
    assert searches == [(RECIPES[0], None)]


def test_without_a_metric_all_are_projected_once(searches):
    W, _, lost = _problem(16, 16)
    assert [recipe for recipe, _ in hopeful(RECIPES, W, lost)] == RECIPES
    assert len(searches) == len(RECIPES)
