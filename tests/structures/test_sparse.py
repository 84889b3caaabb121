"""Sparse matrices stay sparse under what a user of SciPy does to them, a million rows too."""

import math

import pytest
import torch
from torch.testing import assert_close

from matrigami import (
    Banded,
    BandedMatrix,
    BlockDiagonal,
    BlockDiagonalMatrix,
    Circulant,
    DiagonalMatrix,
    LowRankMatrix,
    SparseMatrix,
    Toeplitz,
    ToeplitzMatrix,
    from_scipy,
    hadamard,
    identity,
    norm,
    slogdet,
    solve,
)

scipy_sparse = pytest.importorskip("scipy.sparse")


def small(dtype: torch.dtype = torch.float64) -> SparseMatrix:
    """Four entries of 3x3, two of them in one place."""
    entries = torch.tensor([1.0, 2.0, 3.0, -4.0]).to(dtype)
    if dtype.is_complex:
        entries = entries * (1 + 2j)
    columns, pointers = torch.tensor([1, 1, 0, 2]), torch.tensor([0, 2, 3, 4])
    return SparseMatrix(entries, columns, pointers, (3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_sums_and_products_with_diagonals_are_sparse_and_right(dtype: torch.dtype):
    S, d = small(dtype), torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    D, I = DiagonalMatrix(d), identity(3, dtype=torch.float64)
    for found, wanted in (
        (S + D, S.dense() + d.diag()),
        (D + S, S.dense() + d.diag()),
        (S - 2 * I, S.dense() - 2 * torch.eye(3)),
        (D @ S, d[:, None] * S.dense()),
        (S @ D, S.dense() * d),
    ):
        assert isinstance(found, SparseMatrix)
        assert_close(found.dense(), wanted.to(dtype))
    assert_close(norm(S), torch.linalg.matrix_norm(S.dense()))
    assert_close(norm(S, 2), torch.linalg.matrix_norm(S.dense(), 2))


def test_diagonals_of_a_stack_and_their_derivatives():
    S, d = small(), torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    found = (DiagonalMatrix(d) @ S + DiagonalMatrix(d)).dense()
    assert_close(found, d[..., None] * S.dense() + torch.diag_embed(d))
    assert torch.autograd.gradcheck(lambda d: norm(S + DiagonalMatrix(d)), d)


def test_a_million_unknowns():
    n = 1_000_000
    S = from_scipy(scipy_sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)))
    assert float(norm(S)) == pytest.approx(math.sqrt(4 * n + 2 * (n - 1)))
    d = torch.full((n,), -1.0, dtype=torch.float64)
    A = S + DiagonalMatrix(d)
    b = torch.ones(n, dtype=torch.float64)
    assert float((A @ solve(A, b) - b).norm()) < 1e-9
    root = (3 + math.sqrt(5)) / 2  # the determinant of -A follows from u_{k+1} = 3 u_k - u_{k-1}
    sign, log = slogdet(A)
    assert sign == (-1) ** n
    assert float(log) == pytest.approx((n + 1) * math.log(root) - math.log(root - 1 / root))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_products_powers_and_elementwise_products_are_sparse_and_right(dtype: torch.dtype):
    S = small(dtype)
    B = BandedMatrix(torch.arange(1.0, 6.0, dtype=torch.float64), 1, 0, (3, 3))
    D, E, K = S.dense(), B.dense().to(dtype), LowRankMatrix(*torch.randn(2, 3, 1, dtype=dtype))
    for found, wanted in (
        (S @ S, D @ D),
        (S.T @ S, D.mT @ D),
        (S.H @ S, D.mH @ D),
        (S**3, D @ D @ D),
        (abs(S), D.abs()),
        (S + B, D + E),
        (B - S, E - D),
        (S @ B, D @ E),
        (B @ S, E @ D),
        (hadamard(S, S.T), D * D.mT),
        (hadamard(K, S), K.dense() * D),
    ):
        assert isinstance(found, SparseMatrix)
        assert_close(found.dense(), wanted)
    assert_close(S[[2, 0]], D[[2, 0]])
    assert_close(S[[2, 0], [2, 1]], D[[2, 0], [2, 1]])
    assert_close(S[:, 1], D[:, 1])
    assert_close(S.sum(0), D.sum(0))


def test_products_of_sparse_matrices_have_derivatives_and_stacks():
    S, e = small(), torch.rand(2, 4, dtype=torch.float64, requires_grad=True)

    def product(e: torch.Tensor) -> torch.Tensor:
        A = SparseMatrix(e, S.columns, S.pointers, S.size)
        return (A @ A.T).dense()

    A = SparseMatrix(e, S.columns, S.pointers, S.size).dense()
    assert_close(product(e), A @ A.mT)
    assert torch.autograd.gradcheck(product, e)
    assert torch.autograd.gradgradcheck(product, e)


def test_closures_of_diagonal_families():
    d = DiagonalMatrix(torch.arange(1.0, 7.0))
    band, blocks = Banded().init(6, 6), BlockDiagonal(blocks=2).init(6, 6)
    toeplitz, circulant = Toeplitz().init(6, 6), Circulant().init(6, 6)
    for found, wanted, kind in (
        (band @ d, band.dense() @ d.dense(), BandedMatrix),
        (d @ band, d.dense() @ band.dense(), BandedMatrix),
        (blocks + d, blocks.dense() + d.dense(), BlockDiagonalMatrix),
        (d - blocks, d.dense() - blocks.dense(), BlockDiagonalMatrix),
        (blocks @ d, blocks.dense() @ d.dense(), BlockDiagonalMatrix),
        (d @ blocks, d.dense() @ blocks.dense(), BlockDiagonalMatrix),
        (toeplitz + circulant, toeplitz.dense() + circulant.dense(), ToeplitzMatrix),
        (circulant - toeplitz, circulant.dense() - toeplitz.dense(), ToeplitzMatrix),
    ):
        assert isinstance(found, kind)
        assert_close(found.dense(), wanted)
