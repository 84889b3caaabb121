"""H2 and tiles from products or entries alone: accuracy, number of products, refusals."""

import pytest
import torch
from torch import Tensor

from matrigami import DenseMatrix, DiagonalMatrix, LinearOperator, cost, diagonal, logdet, solve
from matrigami.geometry import block_low_rank, hierarchical, relative_error
from matrigami.geometry._nested_bases import near_boxes
from matrigami.geometry._ordered import bisected
from matrigami.geometry.particles._cross import cross_factors
from matrigami.structures import BlockLowRankMatrix, H2Matrix


class Counted(LinearOperator):
    """A matrix that counts its products."""

    def __init__(self, entries: Tensor, count: list[int]) -> None:
        self.entries, self.count = entries, count

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.entries.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        return self.entries.device

    def matmat(self, X: Tensor) -> Tensor:
        self.count[0] += X.shape[-1]
        return self.entries @ X

    def dense(self) -> Tensor:
        return self.entries

    @property
    def T(self) -> "Counted":
        return Counted(self.entries.mT, self.count)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-2 * (x - y).norm(dim=-1))


def inner(A: LinearOperator) -> LinearOperator:
    """Without the order of the rows, and the rows of nobody."""
    B = getattr(A, "matrix", A)
    return getattr(B, "padded", B)


def test_near_boxes_are_those_that_touch():
    grid = torch.cartesian_prod(*[torch.arange(32, dtype=torch.float64)] * 2)
    near = near_boxes(grid[bisected(grid, 6)], 6)[0]  # 64 boxes of 4 x 4 points
    assert near.boxes.shape == (64, 9)
    assert int(near.there.sum()) == (8 + 2 * 7) ** 2
    t = torch.arange(64)[:, None].expand_as(near.boxes)
    assert torch.equal(near.boxes[near.boxes, near.back][near.there], t[near.there])


@pytest.mark.parametrize("of_entries", [False, True])
def test_points_of_the_plane_make_nested_bases(of_entries: bool):
    n, tol = 500, 1e-2
    x = torch.rand(n, 2, dtype=torch.float64)
    D, count = kernel(x[:, None], x), [0]
    A = (lambda i, j: kernel(x[i], x[j])) if of_entries else Counted(D, count)
    H = hierarchical(A, x, tol=tol, leaf=6)
    assert isinstance(inner(H), H2Matrix)
    assert float((H.dense() - D).norm() / D.norm()) < 2 * tol
    torch.testing.assert_close(H.T.dense(), H.dense().mT)
    torch.testing.assert_close(diagonal(H), H.dense().diagonal())
    assert cost(H).params < 0.4 * n**2
    if not of_entries:
        assert count[0] < n
        b = torch.randn(n, dtype=torch.float64)
        y = solve(H + DiagonalMatrix(torch.ones(n)), b)
        assert float((D @ y + y - b).norm() / b.norm()) < 100 * tol


@pytest.mark.slow
def test_the_number_of_products_does_not_grow_with_the_size():
    counts = []
    for n in (1000, 4000):
        x, count = torch.rand(n, 2, dtype=torch.float64), [0]
        hierarchical(Counted(kernel(x[:, None], x), count), x, tol=1e-2, leaf=12)
        counts.append(count[0])
    assert counts[1] < 1.5 * counts[0] < 0.8 * 4000


def test_unsymmetric_and_complex_matrices_have_two_bases():
    x = torch.rand(500, 2, dtype=torch.float64)
    D = kernel(x[:, None], x) * (1 + x[:, :1]) * (1 + 0.5j * x[:, 0])
    H = hierarchical(DenseMatrix(D), x, tol=1e-2, leaf=6)
    assert isinstance(inner(H), H2Matrix)
    assert float((H.dense() - D).norm() / D.norm()) < 2e-2
    torch.testing.assert_close(H.T.dense(), H.dense().mT)


def test_few_points_of_the_plane_are_halved():
    x = torch.rand(300, 2, dtype=torch.float64)
    H = hierarchical(DenseMatrix(kernel(x[:, None], x)), x, tol=1e-4)
    assert not isinstance(inner(H), H2Matrix)


def test_what_does_not_compress_between_boxes_is_refused():
    x = torch.rand(400, 2, dtype=torch.float64)
    noise = DenseMatrix(torch.randn(400, 400, dtype=torch.float64))
    with pytest.raises(ValueError, match="boxes that are apart") as caught:
        hierarchical(noise, x, leaf=5)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("n", [0, 1, 5, 130, 400])
@pytest.mark.parametrize("d", [1, 2])
def test_tiles_from_products_and_entries(n: int, d: int):
    x = torch.rand(n, d, dtype=torch.float64)
    D = kernel(x[:, None], x) + 0.1 * torch.eye(n)
    for A in (DenseMatrix(D), lambda i, j: D[i, j]):
        T = block_low_rank(A, x, tol=1e-6)
        assert n == 0 or isinstance(inner(T), BlockLowRankMatrix)
        assert float((T.dense() - D).norm()) <= 2e-6 * float(D.norm())
        if n == 400 and d == 1:
            assert cost(T).params < 0.35 * n**2
            torch.testing.assert_close(logdet(T), torch.logdet(D), rtol=1e-4, atol=0)


def test_a_tile_is_crossed_until_nothing_but_roundings_is_left():
    """Of the last tile three columns are inside: its crosses end when these are taken."""
    x = torch.rand(20, 22, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = torch.zeros(20, 19, 19, dtype=torch.float64)
    A[:, :, :3] = torch.exp(-2 * torch.cdist(x[:, :19], x[:, 19:]))
    tile = torch.arange(20)[:, None, None]
    places = torch.arange(19.0, dtype=torch.float64)[:, None].expand(20, -1, 1)

    def entries(X: Tensor, Y: Tensor) -> Tensor:
        return A[tile, X.long()[..., :, None, 0], Y.long()[..., None, :, 0]]

    U, V = cross_factors(entries, places, places, 1e-14)
    torch.testing.assert_close(U @ V.mT, A, rtol=0, atol=1e-12)


def test_tiles_of_complex_and_unsymmetric_products():
    x = torch.rand(200, dtype=torch.float64).sort().values
    D = torch.exp(-2 * (x[:, None] - x).abs()) * (1 + x) * (1 + 0.5j * x[:, None])
    T = block_low_rank(DenseMatrix(D), tol=1e-9, tile=25)
    assert float((T.dense() - D).norm() / D.norm()) < 2e-9


@pytest.mark.slow
def test_tiles_of_a_hierarchy_solve_directly():
    """Few products with the matrix, and more with its hierarchy."""
    x, count = torch.rand(1200, 2, dtype=torch.float64), [0]
    D = kernel(x[:, None], x) + torch.eye(1200)
    H = hierarchical(Counted(D, count), x, tol=1e-3, leaf=12)
    T = block_low_rank(H, x, tol=1e-3)
    assert count[0] < 1200
    assert relative_error(DenseMatrix(D), T) < 3e-3
    torch.testing.assert_close(logdet(T), torch.logdet(D), rtol=1e-2, atol=0)


@pytest.mark.usefixtures("unchecked")
def test_tiles_refuse_what_the_others_refuse():
    A = DenseMatrix(torch.randn(40, 40, dtype=torch.float64))
    for call in (
        lambda: block_low_rank(A, torch.rand(39, 2)),
        lambda: block_low_rank(A, tile=0),
        lambda: block_low_rank(A, tol=2.0),
        lambda: block_low_rank(lambda i, j: i - j),
        lambda: block_low_rank(DenseMatrix(torch.full((40, 40), torch.nan, dtype=torch.float64))),
    ):
        with pytest.raises(ValueError, match=r"block_low_rank\(") as caught:
            call()
        assert 2 <= len(str(caught.value).splitlines()) <= 3
    with pytest.raises(TypeError, match="block_low_rank"):
        block_low_rank(torch.eye(3))
