"""Monarch: the layouts, the paper's reference product, the Fourier transform, exact solves."""

import pytest
import torch

from matrigami import Monarch, MonarchMatrix, cost, kron, logdet, project, solve
from matrigami.structures import BlockTensorTrain


def tile_values(W: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """Singular values of each tile of a matrix with axes (i, j) x (g, a), tiles over (i, g)."""
    grid = W.reshape(*rows, *columns).permute(0, 2, 1, 3)
    return torch.linalg.svdvals(grid.flatten(0, 1))


def reference_product(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Two batched products with permutations between, after Dao et al. (2022); x (tokens, n)."""
    k, _, p = w1.shape
    l, s, r = w2.shape
    out1 = torch.bmm(x.reshape(-1, k, p).transpose(0, 1), w1.transpose(-1, -2))  # k tokens q
    out1 = out1.transpose(0, 1).reshape(-1, r, l).permute(2, 0, 1)  # l tokens r
    out2 = torch.bmm(out1, w2.transpose(-1, -2))  # l tokens s
    return out2.permute(1, 2, 0).reshape(-1, s * l)


@pytest.mark.parametrize(("b", "q"), [(2, 2), (2, 4), (4, 4), (4, 8), (3, 6)])
def test_is_the_reference_product(b, q):
    """The published layer with `b` blocks is ours of rank `q / b`, interleaved."""
    p, s, rank = 5, 3, q // b
    w1, w2 = torch.randn(b, q, p), torch.randn(b, s, b * rank)
    x = torch.randn(7, b * p)
    wanted = reference_product(x, w1, w2)
    right = w1.reshape(b, rank, b, p)  # rows of a first block: (r, i), i fastest
    left = w2.reshape(b, s, b, rank)  # columns of a second block: (g, r)
    A = MonarchMatrix(left, right)
    torch.testing.assert_close((A @ x.T).T, wanted)


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_every_tile_has_the_rank(blocks):
    A = Monarch(blocks=blocks, rank=2, interleaved=False).init(12 * blocks, 6 * blocks)
    S = tile_values(A.dense(), (blocks, 12), (blocks, 6))
    assert float((S[:, 2] / S[:, 0]).max()) < 1e-12
    assert float((S[:, 1] / S[:, 0]).min()) > 1e-3


def test_fourier_transform_is_monarch_interleaved_and_not_blocked():
    """DFT of 36 points with rows and columns interleaved: tiles of rank one."""
    k = torch.arange(36, dtype=torch.float64)
    F = torch.exp(-2j * torch.pi * k[:, None] * k / 36)
    rows = F.reshape(6, 6, 36).transpose(0, 1).reshape(36, 36)
    both = rows.reshape(36, 6, 6).transpose(1, 2).reshape(36, 36)
    S = tile_values(both, (6, 6), (6, 6))
    assert float((S[:, 1] / S[:, 0]).max()) < 1e-12
    blocked = tile_values(F.reshape(36, 6, 6).transpose(1, 2).reshape(36, 36), (6, 6), (6, 6))
    assert float((blocked[:, 1] / blocked[:, 0]).max()) > 0.1


def test_fourier_transform_is_a_member():
    k = torch.arange(36, dtype=torch.float64)
    F = torch.exp(-2j * torch.pi * k[:, None] * k / 36)
    shuffled = F.reshape(36, 6, 6).transpose(1, 2).reshape(36, 36)
    A = project(Monarch(blocks=6, rank=1), shuffled)
    torch.testing.assert_close(A.dense(), shuffled, atol=1e-12, rtol=0)
    x = torch.randn(36, dtype=torch.complex128)
    order = torch.arange(36).reshape(6, 6).T.flatten()
    torch.testing.assert_close(A @ x[order], torch.fft.fft(x), atol=1e-11, rtol=0)


def test_kronecker_product_has_rank_one_tiles_only_interleaved():
    W = kron(torch.randn(5, 6), torch.randn(4, 3)).dense()  # 20 x 18
    interleaved = W.reshape(5, 4, 18).transpose(0, 1).reshape(20, 18)
    S = tile_values(interleaved, (4, 5), (6, 3))
    assert float((S[:, 1] / S[:, 0]).max()) < 1e-12
    blocked = tile_values(W, (4, 5), (6, 3))
    assert float((blocked[:, 2] / blocked[:, 0]).min()) > 1e-3  # full rank


def test_kronecker_product_is_found_exactly():
    W = kron(torch.randn(6, 4), torch.randn(4, 5)).dense()
    found = project(Monarch(blocks=4, rank=1), W)  # interleaved: rows (6, 4), columns (4, 5)
    torch.testing.assert_close(found.dense(), W)
    blocked = project(Monarch(blocks=4, rank=1, interleaved=False), W)
    assert float((blocked.dense() - W).norm() / W.norm()) > 0.1


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("n", "blocks"), [(36, 6), (64, 8)])
def test_square_blocks_are_solved_exactly(n, blocks, interleaved):
    A = Monarch(blocks=blocks, interleaved=interleaved).init(n, n)
    D, B = A.dense(), torch.randn(n, 3)
    torch.testing.assert_close(solve(A, B), torch.linalg.solve(D, B), atol=1e-8, rtol=1e-8)
    sign, log = torch.linalg.slogdet(D)
    torch.testing.assert_close(logdet(A).nan_to_num(0), torch.where(sign > 0, log, 0.0))


@pytest.mark.parametrize("n", [8, 12])
def test_monarch_with_root_n_blocks_has_the_parameters_of_the_paper(n):
    A = Monarch(blocks=n).init(n * n, n * n, device="meta")
    assert sum(t.numel() for t in (A.left, A.right)) == 2 * n**3


def test_is_a_block_tensor_train():
    A = Monarch(blocks=4, interleaved=False).init(16, 16)
    found = project(BlockTensorTrain(rank=1), A.dense())
    torch.testing.assert_close(found.dense(), A.dense())


@pytest.mark.parametrize("blocks", [0, 3, 5, 100])
def test_blocks_that_do_not_divide(blocks):
    for call in (
        lambda: Monarch(blocks=blocks).init(16, 16),
        lambda: project(Monarch(blocks=blocks), torch.ones(16, 16)),
    ):
        with pytest.raises(ValueError, match=rf"Monarch\(blocks={blocks}") as caught:
            call()
        assert len(str(caught.value).splitlines()) in {2, 3}


def test_padding_is_counted():
    A = Monarch(blocks=4, pad=True).init(15, 13)
    full = Monarch(blocks=4).init(16, 16)
    assert A.shape == (15, 13)
    assert cost(A) == cost(full)
