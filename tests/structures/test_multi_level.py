"""Multi-level low rank: which pairs see which level, HODLR, and what projections find."""

import pytest
import torch

from matrigami import logdet, norm, project, solve
from matrigami.operators import _memory
from matrigami.structures import (
    LowRank,
    MultiLevelLowRank,
    MultiLevelLowRankMatrix,
    as_hodlr,
    parse,
)
from matrigami.testing import STRUCTURE_LAWS, check_structure
from matrigami.testing._structure_laws import projection_is_nearest


def drawn(*ranks: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> MultiLevelLowRankMatrix:
    generator = torch.Generator().manual_seed(seed)
    return MultiLevelLowRank(ranks=ranks).init(*size, generator=generator, dtype=torch.float64)


def test_far_pairs_see_the_coarse_levels_only():
    A = drawn(2, 1, 2, size=(8, 16))
    D = A.dense()
    coarse = A.left[0][0] @ A.right[0][0].mT
    torch.testing.assert_close(D[:4, 8:], coarse[:4, 8:])
    middle = A.left[1][1] @ A.right[1][1].mT  # the second half
    torch.testing.assert_close(D[4:6, 12:], coarse[4:6, 12:] + middle[:2, 4:])


def test_one_level_is_low_rank_and_projects_as_it():
    W = torch.randn(12, 9, dtype=torch.float64)
    one, low = (project(r, W).dense() for r in (MultiLevelLowRank(ranks=(3,)), LowRank(rank=3)))
    torch.testing.assert_close(one, low)


def test_is_hodlr_with_ranks_that_add_up():
    A = drawn(3, 2, 2)
    H = as_hodlr(A)
    torch.testing.assert_close(H.dense(), A.dense())
    assert [U.shape[-1] for U in H.left] == [3, 5]
    assert H.leaves.shape == (4, 8, 8)


def test_large_ones_are_solved_and_measured_level_by_level(monkeypatch):
    monkeypatch.setattr(_memory, "BIG", 100)
    A = drawn(6, 6, 5)
    b = torch.randn(32, 2, dtype=torch.float64)
    torch.testing.assert_close(A.dense() @ solve(A, b), b)
    torch.testing.assert_close(logdet(A.T @ A), torch.logdet(A.dense().mT @ A.dense()))
    torch.testing.assert_close(norm(A), torch.linalg.norm(A.dense()))


def test_members_are_found_again():
    A = drawn(2, 2, 2, size=(64, 64)).dense()
    P = project(MultiLevelLowRank(ranks=(2, 2, 2)), A)
    assert float((P.dense() - A).norm() / A.norm()) < 1e-3


def test_another_level_makes_a_kernel_nearer():
    x = torch.linspace(0, 1, 64, dtype=torch.float64)
    K = torch.exp(-5 * (x[:, None] - x).abs())
    few, many = (project(MultiLevelLowRank(ranks=r), K).dense() for r in ((6,), (2, 2, 2)))
    errors = [float((K - D).norm() / K.norm()) for D in (few, many)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_three_levels_obey_the_laws():
    check_structure(MultiLevelLowRank(ranks=(1, 1, 1)), [(4, 4)], STRUCTURE_LAWS)


def test_text_names_the_ranks():
    assert parse("mlr(4, 2, 1)") == MultiLevelLowRank(ranks=(4, 2, 1))


@pytest.mark.parametrize("ranks", [(), (5, 1), (1, 3)])
def test_refuses_ranks_that_do_not_fit(ranks):
    with pytest.raises(ValueError, match=r"Give one rank|full rank of this shape"):
        MultiLevelLowRank(ranks=ranks).init(4, 4)


def test_three_levels_obey_the_laws_of_projections():
    check_structure(MultiLevelLowRank(ranks=(1, 1, 1)), [(16, 16)], [projection_is_nearest])
