"""Functions of a multiple of the identity with an update of low rank, small and at a million."""

import pytest
import torch

from matrigami import LowRankMatrix, direct_sum, exp, kron, kron_sum, lstsq, norm, pinv, power, sqrt
from matrigami.operators import DiagonalMatrix, LinearOperator, eigh, shift, svdvals
from matrigami.testing._derivative_laws import along_a_line, expect_derivatives, squares

MILLION = 10**6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(got, wanted, tolerance=1e-9):
    got = got.dense() if isinstance(got, LinearOperator) else got
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def definite(n, seed=0):
    F = random(n, n, seed=seed)
    return F @ F.mT / n + torch.eye(n, dtype=F.dtype)


def updates(dtype, batch=()):
    """General, Hermitian and zero ones of rank 3 in size 20, with three multiples."""
    U, V = (random(*batch, 20, 3, seed=i, dtype=dtype) / 4 for i in (1, 2))
    for low in (LowRankMatrix(U, V), LowRankMatrix(U, U.conj()), LowRankMatrix(0 * U, V)):
        yield from (shift(low, c) if c else low for c in (0.0, 2.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_functions_of_the_core_equal_those_of_the_dense_matrix(dtype, batch):
    for A in updates(dtype, batch):
        D = A.dense()
        close(exp(A), torch.linalg.matrix_exp(D))
        close(svdvals(A), torch.linalg.svdvals(D))
        close(norm(A, 1), torch.linalg.matrix_norm(D, "nuc"))
        close(pinv(A), torch.linalg.pinv(D), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_real_powers_of_hermitian_updates(dtype):
    U = random(20, 3, dtype=dtype)
    for A in (LowRankMatrix(U, U.conj()), shift(LowRankMatrix(U, U.conj()), 0.5)):
        root = sqrt(A)
        close(root @ root, A.dense())
        assert not hasattr(root, "entries")
    close(power(A, -0.25) @ power(A, 0.25), torch.eye(20, dtype=dtype))
    with pytest.raises(ValueError, match="does not equal its adjoint"):
        sqrt(LowRankMatrix(U, random(20, 3, seed=9, dtype=dtype)))
    with pytest.raises(ValueError, match="smallest eigenvalue"):
        sqrt(LowRankMatrix(U, -U.conj()))


def test_what_is_negligible_beside_the_multiple_has_no_inverse():
    u = random(20, 1)
    A = shift(LowRankMatrix(u, -u / u.square().sum()), 1.0)  # a projector
    close(pinv(A), A.dense())


@pytest.mark.parametrize("zero", [False, True])
def test_exponentials_have_derivatives_where_the_update_vanishes(zero):
    U, V = random(8, 2, seed=1) * (not zero), random(8, 2, seed=2)
    for A in (LowRankMatrix(U, V), shift(LowRankMatrix(U, V), 0.5)):
        line = along_a_line(A, lambda M: squares(exp(M / 4) @ torch.ones(8, 1, dtype=U.dtype)))
        expect_derivatives(line, "exp")


def test_an_exponential_of_a_million_rows():
    u = random(MILLION, 1)
    u = u / u.norm()
    A = shift(LowRankMatrix(3 * u, u), -2.0)  # eigenvalues 1 (along u) and -2
    x = random(MILLION)
    along = (u.mT @ x) * u[:, 0]
    close(
        exp(A) @ x,
        torch.tensor(1.0).exp() * along + torch.tensor(-2.0).double().exp() * (x - along),
        1e-6,
    )
    B = shift(A, 3.0)  # 4 and 1
    close(sqrt(B) @ x, 2 * along + (x - along))
    close(power(B, 3) @ x, 64 * along + (x - along))
    close(pinv(B) @ x, along / 4 + (x - along))
    close(norm(B, 2), torch.tensor(4.0).double())


def test_derivatives_of_a_large_power_are_known_or_refused():
    u = random(10**4, 1).requires_grad_()
    root = sqrt(shift(LowRankMatrix(u, u), 1.0)) @ torch.ones(10**4, dtype=u.dtype)
    (g,) = torch.autograd.grad(root.square().sum(), u)  # |A^(1/2) 1|^2 = n + (u.1)^2
    close(g, 2 * u.sum().detach() * torch.ones_like(u), 1e-7)
    zero = torch.zeros(10**4, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="dependent columns"):
        sqrt(shift(LowRankMatrix(zero, zero), 1.0))


def test_big_hermitian_values_have_the_functions_of_their_eigenpairs():
    F, G = definite(60, 1), definite(50, 2)
    A, x = kron(F, G), random(3000)
    values, Q = eigh(A)
    wanted = Q @ (values.exp() * (Q.H @ x))
    close(exp(A) @ x, wanted, 1e-7 * float(wanted.abs().max()))
    S = kron_sum(F, G)
    close(pinv(S) @ (S @ x), x, 1e-8)
    wide = kron(random(3000, 2), random(3000, 3))
    y = random(6)
    close(lstsq(wide, wide @ y), y)


def test_direct_sums_answer_block_by_block():
    F, U = definite(4), random(6, 2)
    A = direct_sum(F, DiagonalMatrix(torch.ones(3, dtype=F.dtype)), kron(F, F))
    values, Q = eigh(A, 5)
    close(values, torch.linalg.eigvalsh(A.dense()).flip(0)[:5])
    close(A @ Q.dense(), Q.dense() * values)
    B = direct_sum(1e-20 * F, LowRankMatrix(U, U))
    close(pinv(B), torch.linalg.pinv(B.dense()), 1e-7)
