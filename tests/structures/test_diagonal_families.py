"""Toeplitz, circulant and banded matrices: against SciPy, at sizes without a dense matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch

from matrigami import (
    Banded,
    BandedMatrix,
    Circulant,
    CirculantMatrix,
    Toeplitz,
    ToeplitzMatrix,
    cost,
    diagonal,
    eigh,
    logdet,
    power,
    project,
    shift,
    slogdet,
    solve,
    svd,
)
from matrigami.structures import FourierMatrix, SineMatrix, _banded as banded, _toeplitz as toeplitz
from matrigami.testing import LAWS, check_operator, check_structure
from matrigami.testing._algebra_laws import ALGEBRA_LAWS
from matrigami.testing._question_laws import QUESTION_LAWS


def covariance(n: int) -> ToeplitzMatrix:
    k = torch.arange(n, dtype=torch.float64)
    return ToeplitzMatrix.of(torch.exp(-k / 20) + 0.01 * (k == 0))


def residual(A, x: torch.Tensor, b: torch.Tensor) -> float:
    return float((A @ x - b).norm() / b.norm())


def test_they_are_what_scipy_has():
    c, r = torch.randn(5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert np.array_equal(ToeplitzMatrix.of(c, r).dense(), scipy.linalg.toeplitz(c, r))
    assert np.array_equal(CirculantMatrix(c).dense(), scipy.linalg.circulant(c))
    z = torch.randn(4, dtype=torch.complex128)
    assert np.array_equal(ToeplitzMatrix.of(z).dense().tril(), np.tril(scipy.linalg.toeplitz(z)))
    dft = scipy.linalg.dft(7, scale="sqrtn")
    F = FourierMatrix(torch.empty(0, dtype=torch.complex128), 7)
    np.testing.assert_allclose(F.dense(), dft, atol=1e-14)
    np.testing.assert_allclose(F.H.dense(), dft.conj().T, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", [FourierMatrix, SineMatrix])
def test_transforms_obey_the_laws(kind: type, dtype: torch.dtype):
    check_operator(kind(torch.empty(0, dtype=dtype), 4), [*ALGEBRA_LAWS, *QUESTION_LAWS])


@pytest.mark.parametrize(("lower", "upper"), [(0, 2), (3, 1)])
def test_other_bandwidths_obey_the_laws(lower: int, upper: int):
    chosen = {"products", "sums", "traces", "solutions", "determinants", "members_are_found_again"}
    laws = [law for law in LAWS if law.__name__ in chosen]
    assert len(laws) == len(chosen)
    check_structure(Banded(lower, upper), [(1, 1), (2, 3), (5, 5), (6, 4)], laws)


def test_a_million_circulant_unknowns_in_closed_form():
    n = 10**6
    k = torch.arange(n, dtype=torch.float64)
    A = CirculantMatrix(torch.exp(-torch.minimum(k, n - k)) + 0.5 * (k == 0))
    b = torch.randn(n, dtype=torch.float64)
    assert residual(A, solve(A, b), b) < 1e-13
    values, vectors = eigh(A)
    assert float((A @ vectors[:, 17] - values[17] * vectors[:, 17]).norm()) < 1e-12
    torch.testing.assert_close(logdet(A), values.log().sum())
    torch.testing.assert_close(power(A, 0.5) @ (power(A, 0.5) @ b), A @ b)
    assert cost(A).macs < 200 * n


def test_singular_values_of_a_circulant_matrix_have_real_vectors():
    A = Circulant().init(6, 6, dtype=torch.float64)
    U, values, V = svd(A)
    assert not U.dtype.is_complex
    torch.testing.assert_close(U.dense() * values @ V.dense().mT, A.dense())


def test_a_periodic_laplacian_is_singular():
    A = CirculantMatrix(torch.tensor([2.0, -1.0, 0, 0, 0, 0, -1.0]))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        solve(A, torch.ones(7))
    assert logdet(A) == -torch.inf
    assert float(slogdet(A)[0]) == 0.0


def test_toeplitz_systems_by_recursion_and_by_iteration(monkeypatch):
    b = torch.randn(700, 2, dtype=torch.float64)
    A = covariance(700)
    exact = np.linalg.solve(A.dense().numpy(), b.numpy())
    np.testing.assert_allclose(solve(A, b), exact, atol=1e-10)
    monkeypatch.setattr(toeplitz, "is_large", lambda A: True)
    np.testing.assert_allclose(solve(A, b), exact, atol=1e-8)
    k = torch.arange(700, dtype=torch.float64)
    skew = ToeplitzMatrix.of(0.5**k + 3 * (k == 0), -(0.4**k))
    assert residual(skew, solve(skew, b), b) < 1e-9


def test_a_large_toeplitz_system():
    n = 50_000
    A, b = covariance(n), torch.randn(n, dtype=torch.float64)
    assert residual(A, solve(A, b), b) < 1e-9


def test_a_zero_on_the_diagonal_of_a_toeplitz_matrix_needs_pivots():
    A = ToeplitzMatrix.of(torch.randn(200, dtype=torch.float64), torch.randn(200))
    A = shift(A, -diagonal(A)[0])
    b = torch.randn(200, dtype=torch.float64)
    assert residual(A, solve(A, b), b) < 1e-10


def test_gradients_of_a_toeplitz_solution(monkeypatch):
    monkeypatch.setattr(toeplitz, "DIRECT", 2)
    A, b = covariance(6), torch.randn(6, 2, dtype=torch.float64)
    t = A.diagonals.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: solve(ToeplitzMatrix(t, 6), b), (t,))


def test_the_nearest_circulant_matrix_of_a_toeplitz_matrix_needs_no_dense_one():
    for n in (1, 2, 7):
        A = Toeplitz().init(n, n, dtype=torch.float64)
        found = project(Circulant(), A).column
        torch.testing.assert_close(found, project(Circulant(), A.dense()).column)


@pytest.mark.parametrize(("n", "lower", "upper"), [(37, 2, 1), (64, 1, 3), (9, 0, 0), (5, 0, 2)])
def test_cyclic_reduction_is_the_determinant_and_its_derivative(n: int, lower: int, upper: int):
    A = shift(Banded(lower, upper).init(n, n, dtype=torch.float64), -4.0)
    band = A.band.clone().requires_grad_()
    A = BandedMatrix(band, lower, upper, (n, n))
    got, wanted = banded.reduced_slogdet(*banded._blocks(A)), torch.linalg.slogdet(A.dense())
    torch.testing.assert_close(got, tuple(wanted))
    grads = [torch.autograd.grad(log, band)[0] for _, log in (got, wanted)]
    torch.testing.assert_close(*grads)


def test_a_large_banded_determinant_has_a_derivative():
    n = 20_000
    A = BandedMatrix.of([-1.0, -1.0, 5.0, -1.0, -1.0], 2, (n, n), dtype=torch.float64)
    x = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    log = logdet(shift(A, x - 5.0))
    torch.testing.assert_close(log, logdet(A))
    (slope,) = torch.autograd.grad(log, x)
    theta = torch.arange(1, 4001, dtype=torch.float64) * torch.pi / 4001
    symbol = 5 - 2 * theta.cos() - 2 * (2 * theta).cos()  # Szego: the mean of 1 / symbol
    assert float(slope / n) == pytest.approx(float((1 / symbol).mean()), rel=1e-3)


def test_a_derivative_that_needs_pivots_is_refused():
    n = 5000
    below, main, above = (torch.randn(m, dtype=torch.float64) for m in (n - 1, n, n - 1))
    A = BandedMatrix.of([below, 1e-12 * main, above], 1, (n, n))
    band = A.band.clone().requires_grad_()
    with pytest.raises(ValueError, match="without pivoting") as caught:
        slogdet(BandedMatrix(band, 1, 1, (n, n)))
    assert len(str(caught.value).splitlines()) == 3


def test_banded_sums_and_products_stay_banded():
    A, B = Banded(1, 0).init(5, 6), Banded(0, 2).init(5, 6)
    assert [(C.lower, C.upper) for C in (A + B, A @ B.T, A.T @ B)] == [(1, 2), (3, 0), (0, 3)]
    torch.testing.assert_close((A @ B.T).dense(), A.dense() @ B.dense().mT)
    torch.testing.assert_close((A.T @ B).dense(), A.dense().mT @ B.dense())


def test_what_is_no_band_is_refused():
    with pytest.raises(ValueError, match="negative number of diagonals"):
        Banded(lower=-1).init(4, 4)
    for diagonals, lower in (([1.0], 2), ([torch.ones(5), torch.ones(9)], 1)):
        with pytest.raises(ValueError, match="constant diagonal") as caught:
            BandedMatrix.of(diagonals, lower, (3, 3))
        assert len(str(caught.value).splitlines()) == 3
    singular = BandedMatrix.of([1.0, 0.0, 0.0], 1, (4, 4))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        solve(singular, torch.ones(4))


def test_nan_is_named():
    nan = torch.full((300,), torch.nan, dtype=torch.float64)
    banded_nan = BandedMatrix.of([torch.nan] * 3, 1, (300, 300), dtype=torch.float64)
    for A in (ToeplitzMatrix.of(nan), CirculantMatrix(nan), banded_nan):
        with pytest.raises(ValueError, match="is not finite"):
            solve(A, torch.ones(300))
