"""Finite differences: closed forms, orders, boundaries, derivatives, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

import matrigami as mg
from matrigami.geometry.mesh import DiffusionMatrix, Grid, SecondDifferenceMatrix, multigrid
from matrigami.testing import check_operator

ENDS = ("dirichlet", "neumann", "periodic")


@pytest.mark.parametrize(
    "end", ["periodic", *(pytest.param(end, marks=pytest.mark.slow) for end in ENDS[:2])]
)
def test_second_differences_obey_the_laws(end):
    check_operator(SecondDifferenceMatrix(torch.tensor(2.5), 5, end))


@pytest.mark.slow
@pytest.mark.parametrize("ends", [("dirichlet", "periodic"), ("neumann", "dirichlet")])
def test_diffusion_obeys_the_laws(ends):
    sizes = ((5, 3), (4, 3)) if ends[1] == "periodic" else ((3, 3), (4, 4))
    faces = tuple(torch.rand(*size) + 0.5 for size in sizes)
    check_operator(DiffusionMatrix(faces, (4, 3), ends))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_eigenpairs_are_the_closed_form(end, n):
    A = SecondDifferenceMatrix(torch.tensor(3.0), n, end)
    values, Q = mg.eigh(A)
    dense = A.dense()
    assert torch.allclose(dense @ Q.dense(), Q.dense() * values, atol=1e-12)
    assert torch.allclose(Q.dense().mT @ Q.dense(), torch.eye(n), atol=1e-12)
    assert torch.allclose(values.sort().values, torch.linalg.eigvalsh(dense), atol=1e-12)


def test_eigenvalues_of_a_grid_are_sums_of_sines():
    grid = Grid((5, 4), (1.0, 2.0))
    values = mg.eigh(grid.stiffness()).values.sort().values
    h, k = grid.spacings
    wanted = [
        4 / h**2 * math.sin(i * math.pi / 12) ** 2 + 4 / k**2 * math.sin(j * math.pi / 10) ** 2
        for i in range(1, 6)
        for j in range(1, 5)
    ]
    assert torch.allclose(values, torch.tensor(sorted(wanted)), rtol=1e-12)


@pytest.mark.parametrize("ends", [ENDS, ENDS[::-1], ("periodic",) * 3])
def test_stiffness_is_the_square_of_the_gradient(ends):
    grid = Grid((4, 3, 2), (1.0, 2.0, 0.5), ends)
    wanted = sum(G.dense().mT @ G.dense() for G in grid.gradient())
    assert torch.allclose(grid.stiffness().dense(), wanted)
    ones = grid.stiffness(torch.ones(4, 3, 2))
    assert torch.allclose(ones.dense(), wanted)
    assert torch.allclose(ones.sparse().dense(), wanted)


def test_a_difference_is_a_row():
    (D,) = Grid((2,), 3.0).gradient()
    f = torch.tensor([5.0, 7.0])
    assert torch.equal(D @ f, torch.tensor([5.0, 2.0, -7.0]))


@pytest.mark.parametrize(
    ("ends", "u"),
    [
        ("dirichlet", lambda x, y: torch.sin(math.pi * x) * torch.sin(2 * math.pi * y)),
        (
            ("periodic", "dirichlet"),
            lambda x, y: torch.cos(2 * math.pi * x) * torch.sin(math.pi * y),
        ),
        (
            ("neumann", "dirichlet"),
            lambda x, y: torch.cos(math.pi * x) * torch.sin(2 * math.pi * y),
        ),
    ],
)
def test_the_error_is_of_second_order(ends, u):
    errors = []
    factor = 5 * math.pi**2
    for n in (16, 32, 64):
        grid = Grid((n, n), 1.0, ends)
        error = mg.solve(grid.stiffness(), factor * grid.load(u)) - grid.values(u)
        errors.append(float(grid.norm(error)))
    spacings = [Grid((n, n), 1.0, ends).spacings[-1] for n in (32, 64)]
    order = math.log(errors[1] / errors[2]) / math.log(spacings[0] / spacings[1])
    assert order == pytest.approx(2.0, abs=0.05)


def test_a_varying_coefficient_is_of_second_order():
    """-((1 + x) u')' = f for u = sin(pi x)."""
    errors = []
    for n in (63, 127):
        grid = Grid((n,))
        x = grid.points()[:, 0]
        u = torch.sin(math.pi * x)
        f = (1 + x) * math.pi**2 * u - math.pi * torch.cos(math.pi * x)
        error = mg.solve(grid.stiffness(lambda x: 1 + x), f) - u
        errors.append(float(grid.norm(error)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


def test_multigrid_takes_as_many_steps_on_every_grid():
    steps = []
    for n in (64, 127, 256):
        grid = Grid((n, n))
        A = grid.stiffness(lambda x, y: 1 + 10 * x * x + torch.sin(5 * y).abs())
        M = multigrid(A)
        b = grid.load(lambda x, y: torch.sin(3 * x) * y)[:, None]
        found = mg.krylov.cg(A, b, tol=1e-8, preconditioner=M.matmat)
        assert found.converged.all()
        steps.append(found.steps)
    assert max(steps) - min(steps) <= 2
    assert max(steps) <= 10


@pytest.mark.parametrize("ends", ["dirichlet", ("neumann", "dirichlet"), ("periodic", "dirichlet")])
def test_a_cycle_is_symmetric_and_definite(ends):
    M = multigrid(Grid((33, 30), 1.0, ends).stiffness(lambda x, y: 1 + x)).dense()
    assert torch.allclose(M, M.mT, atol=1e-12)
    assert torch.linalg.eigvalsh(M).min() > 0


def test_a_preconditioner_is_kept_and_a_guess_is_used():
    grid = Grid((40, 40))
    A = grid.stiffness(lambda x, y: 1 + x * y)
    M, b = multigrid(A), grid.load(lambda x, y: x)
    u = mg.solve(A, b)
    assert torch.allclose(mg.solve(A, b, preconditioner=M), u)
    assert torch.allclose(mg.solve(A, b, tol=1e-6, preconditioner=M, x0=u), u, rtol=1e-12)
    loose = mg.solve(A, b, tol=1e-2, preconditioner=M)
    assert 1e-9 < float((A @ loose - b).norm() / b.norm()) <= 1e-2
    coarse = mg.solve(mg.DenseMatrix(A.dense()), b, tol=1e-9)
    assert torch.allclose(coarse, u, atol=1e-8)


def test_a_tolerance_and_a_guess_leave_the_method_to_the_value():
    grid = Grid((160, 160))  # MINRES would take a thousand steps
    f = grid.load(lambda x, y: torch.exp(x) * y)
    for A in (grid.stiffness(), grid.stiffness(lambda x, y: 1 + 100 * x)):
        u = mg.solve(A, f)
        assert torch.equal(mg.solve(A, f, tol=1e-9), u)
        v = mg.solve(A, f, x0=0.9 * u, tol=1e-9)
        assert float((A @ v - f).norm() / f.norm()) < 1e-10
        with pytest.raises(RuntimeError, match=r"residual of .*, no less"):
            mg.solve(A, f, tol=1e-18)


def test_coefficients_may_be_complex():
    grid = Grid((6, 5))
    A = grid.stiffness(lambda x, y: (1 + x) * (1 + 0.5j))
    assert torch.allclose(A.dense(), grid.stiffness(lambda x, y: 1 + x).dense() * (1 + 0.5j))
    b = grid.load(lambda x, y: x * y)
    assert torch.allclose(A @ mg.solve(A, b), b + 0j)


def test_large_grids_are_solved_by_multigrid():
    grid = Grid((160, 160))
    A = grid.stiffness(lambda x, y: 2 + torch.cos(6 * x))
    b = grid.load(lambda x, y: y)
    assert float((A @ mg.solve(A, b) - b).norm() / b.norm()) < 1e-9


def test_derivatives_in_coefficients():
    grid = Grid((3, 2), 1.0, ("dirichlet", "neumann"))
    b = torch.arange(6.0)
    field = (torch.rand(3, 2) + 0.5).requires_grad_()
    each = (torch.rand(2) + 0.5).requires_grad_()
    solution = lambda c: mg.solve(grid.stiffness(c), b)  # noqa: E731
    assert torch.autograd.gradcheck(solution, field)
    assert torch.autograd.gradcheck(solution, each)


@pytest.mark.parametrize("end", ["neumann", "periodic"])
@pytest.mark.parametrize("coefficient", [1.0, lambda x, y: 1 + x])
def test_without_a_fixed_value_there_is_no_unique_solution(end, coefficient):
    grid = Grid((6, 5), 1.0, end)
    A, b = grid.stiffness(coefficient), grid.load(lambda x, y: torch.cos(math.pi * x))
    with pytest.raises(torch.linalg.LinAlgError, match="Use lstsq"):
        mg.solve(A, b)
    b = b - b.mean()
    u = mg.lstsq(A, b)
    assert torch.allclose(A @ u, b)
    assert abs(float(u.mean())) < 1e-10


def test_mass_and_norm_are_integrals():
    grid = Grid((300, 300), 2.0, "neumann")
    u = grid.values(lambda x, y: x)
    assert float(u @ (grid.mass() @ u)) == pytest.approx(16 / 3, rel=1e-4)
    assert float(grid.norm(u)) ** 2 == pytest.approx(16 / 3, rel=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid((0, 3)), "at least 1"),
        (lambda: Grid((3, 3), (1.0,)), "2 sizes but 1 lengths"),
        (lambda: Grid((3,), -1.0), "lengths must be positive"),
        (lambda: Grid((3,), float("nan")), "must be positive.\nFor"),
        (lambda: Grid((3, 3)).stiffness(torch.ones(4, 4)), "one for each of the 9"),
        (lambda: Grid((3, 3)).stiffness(lambda x, y: x - 0.5), "smallest value is -0.25"),
        (lambda: Grid((2, 2)).stiffness(torch.tensor([[1.0, float("nan")], [1, 1]])), "finite"),
        (lambda: multigrid(mg.DenseMatrix(torch.eye(3))), "must be a DiffusionMatrix"),
    ],
)
def test_refusals(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("boundary", ["periodic", "neumann"])
def test_a_line_without_a_fixed_end_is_singular(boundary: str):
    A = Grid((8,), boundary=boundary).stiffness()
    with pytest.raises(torch.linalg.LinAlgError, match="Use lstsq"):
        mg.solve(A, torch.ones(8, dtype=torch.float64))


def test_a_long_line_is_solved_by_sines():
    grid = Grid((200_000,))
    A, f = grid.stiffness(), grid.load(lambda x: torch.sin(torch.pi * x))
    u = mg.solve(A, f)
    assert float(grid.norm(u - f / torch.pi**2)) < 1e-10


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="GiB") as caught:
        Grid((10**6, 10**6)).load(lambda x, y: x + y)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("sizes", [(5,), (3, 4)], ids=str)
def test_a_complex_multiple_is_solved_as_it_is(sizes, end):
    A = (1 + 2j) * Grid(sizes, boundary=end).stiffness()
    n, shifted = A.shape[0], mg.shift(A, 1.5)
    b = torch.arange(float(n)).to(A.dtype)
    assert_close(shifted.dense(), A.dense() + 1.5 * torch.eye(n))
    assert_close(shifted.dense() @ mg.solve(shifted, b), b)
    if end == "dirichlet":
        assert_close(A @ mg.solve(A, b), b)
        assert_close(mg.logdet(A).exp(), torch.linalg.det(A.dense()))
