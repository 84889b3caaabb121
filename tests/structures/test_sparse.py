"""Sparse matrices stay sparse under what a user of SciPy does to them, a million rows too."""

import math

import pytest
import torch
from torch.testing import assert_close

from matrigami import DiagonalMatrix, SparseMatrix, from_scipy, identity, norm, slogdet, solve

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
