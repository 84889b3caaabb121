"""Block low rank: the same numbers as Monarch and BTT, and the best ranks for a partition."""

import pytest
import torch

from matrigami import BlockTensorTrain, Monarch, cost, norm, project
from matrigami.operators import Places
from matrigami.structures import (
    BlockLowRank,
    BlockLowRankMatrix,
    PermutedMatrix,
    as_block_low_rank,
    as_monarch,
)
from matrigami.testing import check_operator


def tiles(D, p, q):
    return D.unflatten(0, (-1, p)).unflatten(2, (-1, q)).transpose(1, 2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_monarch_is_block_low_rank_after_a_shuffle(interleaved: bool, rank: int):
    A = Monarch(blocks=3, rank=rank, interleaved=interleaved).init(12, 15, dtype=torch.float64)
    B = as_block_low_rank(A)
    torch.testing.assert_close(B.dense(), A.dense(), rtol=0, atol=1e-14)
    assert cost(B).params == cost(A).params
    inner = B.matrix if isinstance(B, PermutedMatrix) else B
    values = torch.linalg.svdvals(tiles(inner.dense(), 4, 5))
    assert float((values[..., rank] / values[..., 0]).max()) < 1e-14
    assert isinstance(B, PermutedMatrix) is interleaved


@pytest.mark.parametrize("rank", [1, 2])
def test_block_tensor_train_is_block_low_rank_of_its_rank(rank: int):
    A = BlockTensorTrain(rank=rank).init(16, 24, dtype=torch.float64)
    B = as_block_low_rank(A)
    assert isinstance(B, BlockLowRankMatrix)
    assert B.rank == rank
    torch.testing.assert_close(B.dense(), A.dense(), rtol=0, atol=1e-14)
    again = as_monarch(B)
    torch.testing.assert_close(again.dense(), A.dense(), rtol=0, atol=1e-14)
    torch.testing.assert_close(as_block_low_rank(again).left, B.left, rtol=0, atol=0)


def test_three_cores_and_different_ranks_are_refused():
    with pytest.raises(ValueError, match="3 cores"):
        as_block_low_rank(BlockTensorTrain(cores=3).init(8, 8))
    mixed = project(BlockLowRank(tile=2, tol=0.3), torch.randn(4, 4))
    with pytest.raises(ValueError, match="differ in rank"):
        as_monarch(mixed)


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-3])
def test_tolerance_is_met_and_no_singular_value_could_be_spared(tol: float):
    W = torch.randn(24, 16, dtype=torch.float64)
    W = W * torch.linspace(0, 3, 24, dtype=torch.float64).exp()[:, None]
    A = project(BlockLowRank(tile=8, tol=tol), W)
    error = float((A.dense() - W).norm() / W.norm())
    values = torch.linalg.svdvals(tiles(W, 8, 8)).flatten().sort(descending=True).values
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / W.norm()
    count = int((tails > tol).sum())
    assert error <= tol
    assert error == pytest.approx(float(tails[count]) if count < len(tails) else 0.0, abs=1e-12)


def test_budget_beats_every_equal_rank_of_the_same_size():
    x = torch.linspace(0, 1, 32, dtype=torch.float64)
    W = 1 / (0.05 + (x[:, None] - x).abs())
    equal = project(BlockLowRank(tile=8, rank=2), W)
    mixed = project(BlockLowRank(tile=8, budget=cost(equal).params / W.numel()), W)
    assert float((mixed.dense() - W).norm()) < 0.6 * float((equal.dense() - W).norm())


def test_values_of_differing_ranks_obey_the_laws():
    W = torch.randn(6, 3, dtype=torch.float64)
    check_operator(project(BlockLowRank(tile=3, budget=0.4), W))


@pytest.mark.slow
def test_permuted_squares_obey_the_laws():
    W = torch.randn(4, 4, dtype=torch.float64)
    order, other = Places(torch.tensor([2, 0, 3, 1])), Places(torch.tensor([3, 0, 2, 1]))
    square = project(BlockLowRank(tile=2, rank=1), W)
    check_operator(project(BlockLowRank(tile=2, tol=0.3), W))
    check_operator(PermutedMatrix(square, order, other))
    check_operator(PermutedMatrix(square, order))


def test_stack_shares_its_ranks():
    W = torch.randn(3, 8, 8, dtype=torch.float64)
    A = project(BlockLowRank(tile=4, tol=0.2), W)
    assert float((norm(A - W) / torch.linalg.matrix_norm(W)).max()) < 0.3
    assert A.shape == (3, 8, 8)


@pytest.mark.parametrize("recipe", [BlockLowRank(tile=2), BlockLowRank(tile=0, rank=1)])
def test_incomplete_recipes_are_refused(recipe: BlockLowRank):
    for call in (lambda: recipe.init(4, 4), lambda: project(recipe, torch.ones(4, 4))):
        with pytest.raises(ValueError, match="one of rank, budget and tol"):
            call()


def test_members_without_a_rank_cannot_be_drawn():
    with pytest.raises(ValueError, match="the ranks follow from a matrix"):
        BlockLowRank(tile=2, tol=0.1).init(4, 4)


def test_no_other_ranks_reach_a_tolerance_with_fewer_numbers():
    """Near tiles of full rank take part: their small singular values are the error, too."""
    x = torch.linspace(0, 1, 24, dtype=torch.float64)
    W = torch.exp(-8 * (x[:, None] - x).abs())
    tol, tile = 0.05, 6
    P = project(BlockLowRank(tile=tile, tol=tol), W)
    assert float((P.dense() - W).norm() / W.norm()) <= tol
    kept = int((P.link.index < P.right.shape[-3] * P.right.shape[-1]).sum())
    tiles = W.unflatten(0, (4, tile)).unflatten(-1, (4, tile)).transpose(1, 2)
    values = torch.linalg.svdvals(tiles).flatten().sort(descending=True).values
    rest = values.square().flip(0).cumsum(0).flip(0)
    assert kept == int((rest > (tol * W.norm()) ** 2).sum())  # the fewest, of whichever tiles
