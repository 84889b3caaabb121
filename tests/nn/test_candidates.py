"""Searches among several structures for one matrix."""

import pytest
import torch

from matrigami import BlockTensorTrain, LowRank, Monarch
from matrigami.nn import _candidates as candidates, hopeful
from matrigami.nn._candidates import begun
from matrigami.operators import Target, metric_of, nearing, project

RECIPES = [
    BlockTensorTrain(rank=2),
    Monarch(blocks=2, rank=4),
    Monarch(blocks=4, rank=2),
    Monarch(blocks=8, rank=1),
]


@pytest.fixture
def searches(monkeypatch):
    """The structures that are searched for, with where the search began and its most steps."""
    made = []

    def counted(recipe, target, *, start, steps, progress):
        made.append((recipe, start, steps))
        return nearing(recipe, target, start=start, steps=steps, progress=progress)

    monkeypatch.setattr(candidates, "nearing", counted)
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
    assert min(lost(A) for _, A in found) == pytest.approx(min(every), rel=1e-2)
    through = [recipe for recipe, _, steps in searches if steps == candidates.ROUNDS]
    assert set(through) <= {recipe for recipe, _ in found}
    assert len(found) < len(RECIPES)


def test_each_search_goes_on_where_it_was(searches):
    """Only the first begins anew."""
    W, right, lost = _problem(16, 16)
    hopeful(RECIPES, W, lost, right=right)
    assert [(recipe, steps) for recipe, start, steps in searches if start is None] == [
        (recipe, candidates.FEW) for recipe in RECIPES
    ]
    assert len(searches) > len(RECIPES)


def test_a_search_that_begins_at_a_member_is_not_worse_than_it():
    W, right, lost = _problem(16, 16)
    target = Target(W, metric_of(W, None, right))
    (first,) = begun(RECIPES[1:2], target, lost)
    (again,) = begun(RECIPES[1:2], target, lost, {RECIPES[1]: first.found})
    assert again.loss < first.loss < lost(project(RECIPES[1], W))


def test_what_has_ended_is_not_searched_for_again(searches):
    """A closed form."""
    W, right, lost = _problem(16, 16)
    ((_, A),) = hopeful([LowRank(rank=2)], W, lost, right=right)
    torch.testing.assert_close(A.dense(), project(LowRank(rank=2), W, right=right).dense())
    assert len(searches) == 1


def test_without_a_metric_all_are_projected(searches):
    W, _, lost = _problem(16, 16)
    assert [recipe for recipe, _ in hopeful(RECIPES, W, lost)] == RECIPES
    assert not searches
