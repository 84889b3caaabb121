"""The products against dense formulas, and the identities that make them useful."""

import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.operators import DirectSumMatrix


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, C, D = random(3, 2), random(4, 5), random(2, 3), random(5, 2)
S, T = random(3, 3) + 4 * torch.eye(3), random(4, 4) + 4 * torch.eye(4)


def test_kron_is_torch_kron():
    assert_close(mg.kron(A, B).dense(), torch.kron(A, B))
    assert_close(mg.kron(A, B, C).dense(), torch.kron(torch.kron(A, B), C))


def test_mixed_product():
    product = mg.kron(A, B) @ mg.kron(C, D)
    assert isinstance(product, mg.KroneckerMatrix)
    assert_close(product.dense(), torch.kron(A @ C, B @ D))


def test_vec_trick_is_row_major():
    W = random(2, 5)
    assert_close(mg.kron(A, B) @ W.flatten(), (A @ W @ B.mT).flatten())


def test_kron_of_values_keeps_their_structure():
    P = mg.kron(mg.DiagonalMatrix(torch.arange(1.0, 4)), mg.kron_sum(S, T))
    assert_close(P.dense(), torch.kron(torch.diag(torch.arange(1.0, 4)), mg.kron_sum(S, T).dense()))
    X = random(36, 2)
    assert_close(P @ mg.solve(P, X), X)


def test_determinant_and_inverse_of_a_kronecker_product():
    P = mg.kron(S, T)
    assert_close(mg.logdet(P), 4 * torch.logdet(S) + 3 * torch.logdet(T))
    assert_close(mg.inverse(P).dense(), torch.kron(torch.linalg.inv(S), torch.linalg.inv(T)))


def test_trace_of_a_square_product_of_rectangles():
    P = mg.kron(random(2, 3), random(6, 4))
    assert_close(mg.trace(P), P.dense().trace())
    assert_close(mg.diagonal(P), P.dense().diagonal())


def test_kron_sum_spectrum_and_exponential():
    L, R = S + S.mT, T + T.mT
    K = mg.kron_sum(L, R)
    assert_close(K.dense(), torch.kron(L, torch.eye(4)) + torch.kron(torch.eye(3), R))
    assert_close(mg.eigh(K).values.sort().values, torch.linalg.eigvalsh(K.dense()))
    product = torch.kron(torch.linalg.matrix_exp(L), torch.linalg.matrix_exp(R))
    assert_close(torch.linalg.matrix_exp(K.dense()), product)
    X = random(12, 2)
    assert_close(K @ mg.solve(K, X), X)
    assert_close(mg.kron_sum(S, T) @ mg.solve(mg.kron_sum(S, T), X), X)


def test_khatri_rao_and_face_split():
    X, Y = random(3, 4), random(2, 4)
    columns = torch.stack([torch.kron(X[:, c], Y[:, c]) for c in range(4)], 1)
    assert_close(mg.khatri_rao(X, Y).dense(), columns)
    rows = torch.stack([torch.kron(X.mT[i], Y.mT[i]) for i in range(4)])
    assert_close(mg.face_split(X.mT, Y.mT).dense(), rows)
    for P in (mg.khatri_rao(X, Y), mg.face_split(X.mT, Y.mT)):
        assert_close(P @ torch.eye(P.shape[1]), P.dense())
        assert_close(P.T.dense(), P.dense().mT)
        assert_close(P.T @ torch.eye(P.shape[0]), P.dense().mT)


def test_khatri_rao_vec_identity():
    X, Y, d = random(3, 4), random(2, 4), random(4)
    assert_close(mg.khatri_rao(X, Y) @ d, (X @ torch.diag(d) @ Y.mT).flatten())


def test_khatri_rao_gram_is_the_hadamard_product_of_grams():
    X, Y = random(3, 4), random(2, 4)
    K = mg.khatri_rao(X, Y).dense()
    gram = mg.hadamard(mg.DenseMatrix(X.mT @ X), mg.DenseMatrix(Y.mT @ Y)).dense()
    assert_close(K.mT @ K, gram)


def test_hadamard_of_low_ranks_is_a_product_of_face_splits():
    P, Q = (mg.LowRankMatrix(random(6, r, seed=r), random(5, r, seed=r + 9)) for r in (2, 3))
    H = mg.hadamard(P, Q)
    assert isinstance(H, mg.HadamardMatrix)
    assert_close(H.dense(), P.dense() * Q.dense())
    assert_close(H.dense(), mg.face_split(P.U, Q.U).dense() @ mg.face_split(P.V, Q.V).dense().mT)
    assert torch.linalg.matrix_rank(H.dense()) == 5  # up to 2 * 3


def test_hadamard_keeps_diagonals_and_kronecker_products():
    P, Q = mg.kron(A, B), mg.kron(A.sin(), B.cos())
    assert isinstance(mg.hadamard(P, Q), mg.KroneckerMatrix)
    assert_close(mg.hadamard(P, Q).dense(), P.dense() * Q.dense())
    diagonal = mg.hadamard(mg.DiagonalMatrix(torch.ones(3)), mg.DenseMatrix(S))
    assert isinstance(diagonal, mg.DiagonalMatrix)
    assert_close(diagonal.diagonal, S.diagonal())
    with pytest.raises(ValueError, match="same rows and columns"):
        mg.hadamard(mg.DenseMatrix(A), mg.DenseMatrix(B))


def test_outer_is_rank_one():
    u, v = random(3), random(4)
    assert_close(mg.outer(u, v).dense(), torch.outer(u, v))
    assert mg.cost(mg.outer(u, v)).macs == 7


def test_direct_sum():
    P = mg.direct_sum(A, mg.LowRankMatrix(random(4, 1), random(5, 1)))
    exact = torch.block_diag(A, P.blocks[1].dense())
    X = random(7, 3)
    assert_close(P.dense(), exact)
    assert_close(P @ X, exact @ X)
    assert_close(P.T.dense(), exact.mT)
    assert_close(mg.svdvals(P), torch.linalg.svdvals(exact))
    assert mg.cost(P).macs == 6 + 9


def test_direct_sum_of_squares_answers_block_by_block():
    P = mg.direct_sum(S, mg.DiagonalMatrix(torch.arange(1.0, 4)))
    exact = torch.block_diag(S, torch.diag(torch.arange(1.0, 4)))
    X = random(6, 2)
    assert_close(mg.solve(P, X), torch.linalg.solve(exact, X))
    assert_close(mg.logdet(P), torch.logdet(exact))
    assert_close(mg.diagonal(P), exact.diagonal())
    assert isinstance(mg.inverse(P), DirectSumMatrix)
    assert_close(mg.inverse(P).dense(), torch.linalg.inv(exact))
    assert isinstance(P @ P, DirectSumMatrix)
    assert_close((P @ P).dense(), exact @ exact)
    assert_close(
        mg.power(mg.direct_sum(S @ S.mT), 0.5).dense()
        @ mg.power(mg.direct_sum(S @ S.mT), 0.5).dense(),
        S @ S.mT,
    )


@pytest.mark.usefixtures("unchecked")
def test_wrong_products_are_refused():
    with pytest.raises(TypeError, match="a matrix has two axes"):
        mg.kron(A, torch.ones(3))
    with pytest.raises(ValueError, match="square"):
        mg.kron_sum(A, B)
    with pytest.raises(ValueError, match="columns"):
        mg.khatri_rao(A, B)
    with pytest.raises(ValueError, match="rows"):
        mg.face_split(A, B)
    with pytest.raises(ValueError, match="no blocks"):
        mg.direct_sum()
