"""Kronecker products and sums: the identities of the textbook, also for rectangular factors."""

import pytest
import torch

from matrigami import (
    Diagonal,
    DiagonalMatrix,
    Kronecker,
    KroneckerMatrix,
    KroneckerSumMatrix,
    LowRankMatrix,
    cost,
    diagonal,
    eigh,
    inverse,
    kron,
    kron_sum,
    logdet,
    norm,
    power,
    project,
    slogdet,
    solve,
    svdvals,
    trace,
)


def positive_definite(n: int) -> torch.Tensor:
    F = torch.randn(n, n)
    return F @ F.T + torch.eye(n)


def test_agrees_with_torch():
    A, B = torch.randn(3, 2), torch.randn(4, 5)
    torch.testing.assert_close(kron(A, B).dense(), torch.kron(A, B))
    C = torch.randn(2, 2)
    torch.testing.assert_close(kron(A, B, C).dense(), torch.kron(A, torch.kron(B, C)))


def test_vec_trick_is_row_major():
    """`kron(B, A) vec(W) = vec(B W A.T)`."""
    A, B, W = torch.randn(3, 4), torch.randn(2, 5), torch.randn(5, 4)
    torch.testing.assert_close(kron(B, A) @ W.flatten(), (B @ W @ A.T).flatten())


def test_mixed_product():
    """`(A (x) B) (C (x) D) = AC (x) BD`, and it stays a Kronecker product."""
    A, B, C, D = torch.randn(2, 3), torch.randn(4, 2), torch.randn(3, 2), torch.randn(2, 5)
    product = kron(A, B) @ kron(C, D)
    assert isinstance(product, KroneckerMatrix)
    torch.testing.assert_close(product.dense(), torch.kron(A @ C, B @ D))


@pytest.mark.parametrize("sizes", [((2, 3), (3, 2)), ((1, 4), (4, 1)), ((6, 2), (2, 6))], ids=str)
def test_square_product_of_rectangular_factors(sizes):
    """Its trace and diagonal are not those of the factors: a classic bug."""
    A, B = (torch.randn(*size) for size in sizes)
    K, D = kron(A, B), torch.kron(A, B)
    torch.testing.assert_close(diagonal(K), D.diagonal())
    torch.testing.assert_close(trace(K), D.trace())
    torch.testing.assert_close(svdvals(K), torch.linalg.svdvals(D), atol=1e-10, rtol=1e-8)
    assert float(slogdet(K + DiagonalMatrix(torch.full((len(D),), 9.0)))[0]) == 1.0


def test_log_determinant_of_a_product():
    """`logdet(A (x) B) = n_B logdet(A) + n_A logdet(B)`."""
    A, B = positive_definite(3), positive_definite(4)
    torch.testing.assert_close(logdet(kron(A, B)), 4 * torch.logdet(A) + 3 * torch.logdet(B))


@pytest.mark.parametrize(("left", "right"), [(1, -1), (-1, 1), (-1, -1)])
def test_sign_of_a_determinant(left, right):
    A, B = left * torch.eye(3), right * torch.eye(2)
    assert float(slogdet(kron(A, B))[0]) == float(torch.linalg.slogdet(torch.kron(A, B))[0])


def test_factors_are_inverted_and_solved():
    A, B = positive_definite(3), positive_definite(4)
    K, X = kron(A, B), torch.randn(12, 2)
    assert isinstance(inverse(K), KroneckerMatrix)
    torch.testing.assert_close(solve(K, X), torch.linalg.solve(torch.kron(A, B), X))


def test_powers_and_eigenpairs_are_factorwise():
    A, B = positive_definite(3), positive_definite(2)
    K = kron(A, B)
    root = power(K, -0.25)
    assert isinstance(root, KroneckerMatrix)
    wanted = torch.linalg.matrix_power(root.dense(), 4) @ torch.kron(A, B)
    torch.testing.assert_close(wanted, torch.eye(6))
    values, vectors = eigh(K)
    assert isinstance(vectors, KroneckerMatrix)
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(torch.kron(A, B)))


def test_two_negative_factors_make_a_positive_product():
    A, B = positive_definite(3), positive_definite(2)
    torch.testing.assert_close(power(kron(-A, -B), 0.5).dense(), power(kron(A, B), 0.5).dense())
    with pytest.raises(ValueError, match="positive"):
        power(kron(-A, B), 0.5)
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="positive"):
        power(kron(indefinite, indefinite), 0.5)


def test_norms_multiply():
    A, B = torch.randn(3, 4), torch.randn(2, 5)
    for order in (None, 1, 2, torch.inf):
        wanted = {None: "fro", 1: "nuc", 2: 2, torch.inf: 2}[order]
        torch.testing.assert_close(
            norm(kron(A, B), order), torch.linalg.matrix_norm(torch.kron(A, B), wanted)
        )


def test_factors_may_be_any_values():
    low = LowRankMatrix(torch.randn(4, 1), torch.randn(3, 1))
    K = kron(low, Diagonal().init(5, 5))
    X = torch.randn(15, 2)
    torch.testing.assert_close(K @ X, K.dense() @ X)
    assert cost(K).params == 4 + 3 + 5


@pytest.mark.parametrize(
    ("sizes", "macs"),
    [
        (((2, 3), (4, 5)), min(4 * 5 * 3 + 2 * 3 * 4, 2 * 3 * 5 + 4 * 5 * 2)),
        (((10, 1), (2, 8)), min(2 * 8 * 1 + 10 * 1 * 2, 10 * 1 * 8 + 2 * 8 * 10)),
    ],
)
def test_cheaper_order_is_taken(sizes, macs):
    assert cost(kron(*(torch.ones(size) for size in sizes))).macs == macs


def test_projection_is_the_rank_one_svd_of_the_rearrangement():
    W = torch.randn(12, 20)
    recipe = Kronecker(factors=((3, 4), (4, 5)))
    tiles = W.reshape(3, 4, 4, 5).permute(0, 2, 1, 3).reshape(12, 20)
    S = torch.linalg.svdvals(tiles)
    error = (project(recipe, W).dense() - W).square().sum()
    torch.testing.assert_close(error, S[1:].square().sum())


def test_three_factors_are_found():
    W = torch.kron(torch.randn(2, 2), torch.kron(torch.randn(2, 3), torch.randn(3, 2)))
    recipe = Kronecker(factors=((2, 2), (2, 3), (3, 2)))
    torch.testing.assert_close(project(recipe, W).dense(), W)


def test_kronecker_sum_is_the_sum():
    A, B = torch.randn(3, 3), torch.randn(2, 2)
    S = kron_sum(A, B)
    wanted = torch.kron(A, torch.eye(2)) + torch.kron(torch.eye(3), B)
    torch.testing.assert_close(S.dense(), wanted)
    torch.testing.assert_close(
        torch.linalg.matrix_exp(wanted), kron(A.matrix_exp(), B.matrix_exp()).dense()
    )


def test_kronecker_sum_of_symmetric_terms_is_solved_by_its_eigenpairs():
    A, B = positive_definite(3), positive_definite(4)
    S, X = kron_sum(A, B), torch.randn(12, 2)
    assert isinstance(S, KroneckerSumMatrix)
    torch.testing.assert_close(solve(S, X), torch.linalg.solve(S.dense(), X))
    values, vectors = eigh(S)
    assert isinstance(vectors, KroneckerMatrix)
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(S.dense()))


@pytest.mark.usefixtures("unchecked")
def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="multiply to 6x6") as caught:
        Kronecker(factors=((2, 3), (3, 2))).init(6, 7)
    assert len(str(caught.value).splitlines()) in {2, 3}
    with pytest.raises(ValueError, match="at least two factors"):
        Kronecker(factors=1).init(4, 4)
    with pytest.raises(ValueError, match="square"):
        kron_sum(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(TypeError, match="a matrix has two axes"):
        kron(torch.ones(2, 2), torch.ones(2))
