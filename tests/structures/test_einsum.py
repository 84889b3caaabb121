"""The seven-index family holds the named structures, with their ranks, costs and projections."""

import math

import pytest
import torch

from matrigami import (
    BlockTensorTrainMatrix,
    Einsum,
    EinsumMatrix,
    KroneckerMatrix,
    LowRankMatrix,
    MonarchMatrix,
    TensorTrainMatrix,
    cost,
    project,
)

SHAPES = (
    (2, 1, 3, 1, 4, 2, 1),  # BTT of rank 1
    (3, 1, 2, 1, 3, 4, 2),  # BTT of rank 2
    (2, 3, 1, 3, 2, 1, 1),  # Kronecker
    (2, 3, 1, 3, 2, 1, 3),  # sum of three Kronecker products
    (6, 1, 1, 1, 8, 1, 3),  # low rank
    (2, 2, 2, 2, 2, 2, 2),  # all seven
    (2, 3, 2, 3, 2, 2, 3),  # all seven, uneven
    (1, 1, 6, 1, 1, 5, 1),  # dense
)
"""Sizes alpha, beta, gamma, delta, eps, phi, rho."""

each_shape = pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: "-".join(map(str, dims)))


def member(dims: tuple[int, ...], *, interleaved: bool = False) -> EinsumMatrix:
    alpha, beta, gamma, delta, eps, phi, _ = dims
    recipe = Einsum(dims=dims, interleaved=interleaved)
    A = recipe.init(phi * eps * delta, gamma * beta * alpha)
    assert isinstance(A, EinsumMatrix)
    return A


@each_shape
def test_entries_are_the_formula_of_the_paper(dims):
    """`W[(phi eps delta), (gamma beta alpha)] = sum_rho A[..] B[..]`, by loops."""
    alpha, beta, gamma, delta, eps, phi, rho = dims
    E = member(dims)
    W = torch.zeros(phi, eps, delta, gamma, beta, alpha)
    for r in range(rho):
        A = E.A[:, r].permute(1, 2, 0, 3)  # phi delta gamma alpha
        B = E.B[..., r]  # phi eps gamma beta
        W += A[:, None, :, :, None, :] * B[:, :, None, :, :, None]
    torch.testing.assert_close(E.dense(), W.reshape(E.shape))


def test_dense_corner_is_a_hadamard_product():
    E = member((1, 1, 6, 1, 1, 5, 1))
    A, B = E.A[:, 0, :, 0, 0], E.B[:, 0, :, 0, 0]
    torch.testing.assert_close(E.dense(), A.T * B)


def test_low_rank_corner():
    E = member((6, 1, 1, 1, 8, 1, 3))
    V, U = E.A[0, :, 0, 0, :].T, E.B[0, :, 0, 0, :]
    torch.testing.assert_close(E.dense(), LowRankMatrix(U, V).dense())


def test_kronecker_corner():
    E = member((2, 3, 1, 3, 2, 1, 1))
    right, left = E.A[0, 0, 0], E.B[0, :, 0, :, 0]
    torch.testing.assert_close(E.dense(), KroneckerMatrix(left, right).dense())


def test_tensor_train_corner():
    E = member((2, 3, 1, 3, 2, 1, 3))
    first = E.B[0, :, 0][None]  # 1 eps beta rho
    second = E.A[0, :, 0][..., None]  # rho delta alpha 1
    torch.testing.assert_close(E.dense(), TensorTrainMatrix((first, second)).dense())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(2, 1, 3, 1, 4, 2, 1), (3, 1, 2, 1, 3, 4, 2)])
def test_monarch_and_block_tensor_train_corner(dims, interleaved):
    E = member(dims, interleaved=interleaved)
    right = E.A[:, :, :, 0, :]  # gamma rho phi alpha
    left = E.B[..., 0, :]  # phi eps gamma rho
    monarch = MonarchMatrix(left, right, interleaved_rows=interleaved)
    torch.testing.assert_close(E.dense(), monarch.dense())
    cores = (right[:, None, :, :, :, None], left[None, :, None])
    train = BlockTensorTrainMatrix(cores, reversed_rows=interleaved)
    torch.testing.assert_close(E.dense(), train.dense())


@each_shape
def test_rank_formula_is_attained(dims):
    alpha, beta, gamma, delta, eps, phi, rho = dims
    a_first = min(
        gamma * beta * min(alpha, delta * phi * rho), phi * delta * min(eps, beta * gamma * rho)
    )
    b_first = min(
        gamma * alpha * min(beta, eps * phi * rho), phi * eps * min(delta, alpha * gamma * rho)
    )
    assert int(torch.linalg.matrix_rank(member(dims).dense())) == min(a_first, b_first)


@each_shape
def test_cost_is_the_cheaper_order(dims):
    alpha, beta, gamma, delta, eps, phi, rho = dims
    m, n = phi * eps * delta, gamma * beta * alpha
    a_first = n * phi * delta * rho + m * gamma * beta * rho
    b_first = n * phi * eps * rho + m * gamma * alpha * rho
    params = phi * delta * rho * gamma * alpha + phi * eps * rho * gamma * beta
    assert cost(member(dims)) == (params, min(a_first, b_first), 8 * params)


@pytest.mark.parametrize(
    ("dims", "first"), [((4, 1, 2, 1, 4, 2, 1), "A"), ((1, 4, 2, 4, 1, 2, 1), "B")]
)
def test_both_contraction_orders_are_taken(dims, first):
    alpha, beta, gamma, delta, eps, phi, rho = dims
    m, n = phi * eps * delta, gamma * beta * alpha
    orders = {
        "A": rho * (n * phi * delta + m * gamma * beta),
        "B": rho * (n * phi * eps + m * gamma * alpha),
    }
    assert min(orders, key=orders.__getitem__) == first
    E = member(dims)
    assert cost(E).macs == orders[first]
    X = torch.randn(n, 3)
    torch.testing.assert_close(E @ X, E.dense() @ X)


@each_shape
def test_projection_error_is_the_discarded_singular_values(dims):
    alpha, beta, gamma, delta, eps, phi, rho = dims
    W = torch.randn(phi * eps * delta, gamma * beta * alpha)
    tiles = W.reshape(phi, eps, delta, gamma, beta, alpha).permute(0, 3, 2, 5, 1, 4)
    S = torch.linalg.svdvals(tiles.reshape(phi * gamma, delta * alpha, eps * beta))
    error = (project(Einsum(dims=dims), W).dense() - W).square().sum()
    torch.testing.assert_close(error, S[:, rho:].square().sum(), atol=1e-12, rtol=1e-9)


def test_full_rank_reproduces_any_matrix():
    W = torch.randn(8, 12)
    full = Einsum(dims=(2, 3, 2, 2, 2, 2, 4))
    torch.testing.assert_close(project(full, W).dense(), W)


def test_taxonomy():
    """Omega (sharing), psi (rank), nu (compute) of the rows of the table."""
    rows = {
        (0, 0, 1, 0, 0, 1, 0): (0.0, 1.0, 1.0),  # dense
        (1, 0, 0, 0, 1, 0, 0.5): (0.0, 0.5, 0.5),  # low rank
        (0.5, 0.5, 0, 0.5, 0.5, 0, 0): (0.5, 1.0, 0.5),  # Kronecker
        (0.5, 0, 0.5, 0, 0.5, 0.5, 0): (0.0, 1.0, 0.5),  # Monarch
        (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25): (0.0, 1.0, 0.75),  # BTT
    }
    for theta, wanted in rows.items():
        family = Einsum(theta=theta)
        assert (family.omega, family.psi, family.nu) == pytest.approx(wanted)


@pytest.mark.parametrize("d", [64, 256])
def test_taxonomy_predicts_the_counts(d):
    """`macs = d^(1 + nu)` up to the two factors, and `macs / params = d^omega`."""
    for theta in ((0.5, 0, 0.5, 0, 0.5, 0.5, 0), (0.5, 0.5, 0, 0.5, 0.5, 0, 0)):
        family = Einsum(theta=theta)
        params, macs, _ = cost(family.init(d, d, device="meta"))
        assert macs == pytest.approx(2 * d ** (1 + family.nu))
        assert macs / params == pytest.approx(d**family.omega)


def test_exponents_give_balanced_sizes():
    E = Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0)).init(1024, 256, device="meta")
    assert isinstance(E, EinsumMatrix)
    assert E.dims == (16, 1, 16, 1, 32, 32, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"theta": (0.5, 0, 0.5, 0, 0.5, 0.5, 0), "dims": (1,) * 7},
        {"theta": (0.5, 0.5)},
        {"theta": (0.5, 0, 0.6, 0, 0.5, 0.5, 0)},
        {"theta": (1.5, 0, -0.5, 0, 0.5, 0.5, 0)},
        {"theta": (math.nan, 0, 0.5, 0, 0.5, 0.5, 0)},
        {"dims": (1, 2, 3)},
        {"dims": (0, 1, 1, 1, 1, 1, 1)},
    ],
    ids=str,
)
def test_families_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match=r"Einsum\(") as caught:
        Einsum(**options)
    assert len(str(caught.value).splitlines()) in {2, 3}


def test_sizes_must_multiply_to_the_matrix_and_rank_be_below_full():
    with pytest.raises(ValueError, match="4x8"):
        Einsum(dims=(2, 1, 2, 1, 2, 2, 1)).init(4, 8)
    with pytest.raises(ValueError, match="rank 3"):
        Einsum(dims=(2, 1, 2, 1, 2, 2, 3)).init(4, 4)
