"""Block LU of tiles: solutions, determinants and their derivatives against dense ones."""

import pytest
import torch

from matrigami import BlockLowRank, logdet, project, slogdet, solve
from matrigami.structures import BlockLowRankMatrix, _block_low_rank as block_low_rank
from matrigami.structures._block_low_rank_factors import compressed, factorized, tiles_of

RECIPES = (
    BlockLowRank(48, tol=1e-8),
    BlockLowRank(40, tol=1e-9),
    BlockLowRank(40, rank=40),
    BlockLowRank(160, tol=1e-8),
)


@pytest.fixture(autouse=True)
def always_large(monkeypatch):
    """Tiles at any size."""
    monkeypatch.setattr(block_low_rank, "is_large", lambda A: True)


def covariance(n: int = 160) -> torch.Tensor:
    x = torch.rand(n, dtype=torch.float64).sort().values
    return torch.exp(-3 * (x[:, None] - x).abs()) + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_solutions_and_determinants(recipe: BlockLowRank):
    D = covariance()
    for W in (D, -D, D + 0.02 * torch.randn(160, 160, dtype=torch.float64), D * (1 + 0.5j)):
        A, B = project(recipe, W), torch.randn(160, 2, dtype=torch.float64).to(W.dtype)
        assert float((A.dense() @ solve(A, B) - B).norm() / B.norm()) < 1e-9
        sign, log = slogdet(A)
        wanted = torch.linalg.slogdet(A.dense())
        assert float((sign - wanted.sign).abs()) < 1e-10
        torch.testing.assert_close(log, wanted.logabsdet, rtol=1e-10, atol=0)


def test_the_factors_of_a_smooth_kernel_stay_of_low_rank():
    A = project(BlockLowRank(64, tol=1e-8), covariance(512))
    factors = factorized(tiles_of(A, 512), 1e-8)
    assert max(X.shape[-1] for X, _ in (*factors.lower, *factors.upper)) <= 4
    B = torch.randn(512, 1, dtype=torch.float64)
    assert float((A @ factors.solve(B) - B).norm() / B.norm()) < 1e-5  # before refinement


def test_a_sketch_is_as_good_as_asked_or_the_tile_is_kept():
    D = covariance(256)
    for T in (D[:64, 128:192][None], torch.randn(2, 64, 64, dtype=torch.float64)):
        X, Y = compressed(T, 1e-9, 1)
        assert float((X @ Y.mT - T).norm(dim=(-2, -1)).max()) < 1e-9


def test_gradients_of_a_solution():
    A = project(BlockLowRank(4, tol=1e-8), covariance(12))
    b = torch.randn(12, 1, dtype=torch.float64)

    def solution(left: torch.Tensor) -> torch.Tensor:
        return solve(BlockLowRankMatrix(left, A.right, A.link), b)

    assert torch.autograd.gradcheck(solution, (A.left.clone().requires_grad_(),))


def test_a_determinant_that_needs_pivots_between_tiles_is_refused():
    W = torch.zeros(8, 8, dtype=torch.float64)
    W[:4, 4:] = W[4:, :4] = torch.eye(4, dtype=torch.float64)
    A = project(BlockLowRank(4, rank=4), W)
    with pytest.raises(ValueError, match="no pivoting between tiles") as caught:
        logdet(A)
    assert len(str(caught.value).splitlines()) == 3
    b = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(W @ solve(A, b), b)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_gradients_of_a_determinant(recipe: BlockLowRank):
    """Of both sides of the tiles, whose size may not divide that of the matrix."""
    W = covariance(150) + 0.02 * torch.randn(150, 150, dtype=torch.float64)
    A = project(recipe, W)
    tiles = getattr(A, "padded", A)
    sides = [t.clone().requires_grad_() for t in (tiles.left, tiles.right)]

    def matrix():
        B = BlockLowRankMatrix(*sides, tiles.link)
        return B if A is tiles else type(A)(B, 150, 150)

    found = torch.autograd.grad(3 * logdet(matrix()), sides)
    wanted = torch.autograd.grad(3 * torch.logdet(matrix().dense()), sides)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8 * float(w.abs().max()))
