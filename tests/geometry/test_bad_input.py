"""Bad input to particles, hierarchies and meshes: two or three lines that say what to do."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from matrigami import DenseMatrix, cholesky, solve
from matrigami.geometry import block_low_rank, hierarchical
from matrigami.geometry.mesh import Grid, Simplices, multigrid
from matrigami.geometry.particles import error_estimate, forces, kernel_matrix, potential_energy

X = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = DenseMatrix(torch.eye(30, dtype=torch.float64))
CORNERS = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
PURE = Grid((8, 8), boundary="neumann")


def meshio_like(points: np.ndarray, **cells: list[list[int]]) -> SimpleNamespace:
    """A mesh as meshio has it."""
    return SimpleNamespace(points=points, cells_dict={k: np.array(v) for k, v in cells.items()})


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "coincident points": (lambda: kernel_matrix(0 * X, "laplace"), "30 points coincide"),
    "four coordinates": (lambda: kernel_matrix(torch.rand(5, 4), "rbf"), "1, 2 or 3 coordinates"),
    "three axes": (lambda: kernel_matrix(X[None], "rbf"), "1, 2 or 3 coordinates"),
    "other targets": (lambda: kernel_matrix(X, "rbf", targets=X[:, 0]), "have 2 coordinates"),
    "NaN": (lambda: kernel_matrix(X * torch.nan, "rbf"), "NaN, infinite"),
    "infinite": (lambda: kernel_matrix(X / 0, "rbf"), "NaN, infinite"),
    "squares overflow": (lambda: kernel_matrix(X * 1e200, "rbf"), "rescale"),
    "NaN target": (lambda: kernel_matrix(X, "rbf", targets=X * torch.nan), "targets"),
    "bool points": (lambda: kernel_matrix(X > 0.5, "rbf"), "must be real numbers"),
    "complex points": (lambda: kernel_matrix(X * 1j, "rbf"), "must be real numbers"),
    "words": (lambda: kernel_matrix("abc", "rbf"), "must be real numbers"),
    "ragged lists": (lambda: kernel_matrix([[1, 2], [3]], "rbf"), "must be real numbers"),
    "too many points": (lambda: kernel_matrix(X[:1].expand(10**8, 2), "rbf"), "GiB are free"),
    "tol of single": (lambda: kernel_matrix(X.float(), "rbf", tol=1e-12), "ten roundings"),
    "tol 0": (lambda: kernel_matrix(X, "rbf", tol=0), "ten roundings"),
    "tol 2": (lambda: kernel_matrix(X, "rbf", tol=2), "below 1"),
    "tol NaN": (lambda: kernel_matrix(X, "rbf", tol=torch.nan), "below 1"),
    "scale 0": (lambda: kernel_matrix(X, "rbf", scale=0.0), "Give a positive number"),
    "scale -1": (lambda: kernel_matrix(X, "rbf", scale=-1.0), "Give a positive number"),
    "scale NaN": (lambda: kernel_matrix(X, "rbf", scale=torch.nan), "Give a positive number"),
    "two scales": (lambda: kernel_matrix(X, "rbf", scale=torch.ones(2)), "Give a positive number"),
    "kernel name": (lambda: kernel_matrix(X, "laplac"), "Did you mean 'laplace'?"),
    "kernel of one number": (lambda: kernel_matrix(X, lambda r: 1.0), "Give a name"),
    "complex kernel": (lambda: kernel_matrix(X, lambda r: r * 1j), "two matrices"),
    "kernel that is NaN": (lambda: kernel_matrix(X, lambda r: (r - 9).log()), "between two points"),
    "no positive definite": (
        lambda: cholesky(kernel_matrix(X[:, 0], "helmholtz")),
        "not positive definite",
    ),
    "charges for others": (lambda: forces(X, torch.ones(29), "rbf"), "shape (29,)"),
    "complex charges": (lambda: forces(X, torch.ones(30) * 1j, "rbf"), "must be real"),
    "NaN charges": (
        lambda: potential_energy(X, X[:, 0] * torch.nan, "rbf"),
        "30 of them NaN or infinite",
    ),
    "vector for others": (lambda: kernel_matrix(X, "rbf") @ torch.ones(3), "X has shape (3,)"),
    "system for others": (lambda: solve(kernel_matrix(X, "rbf"), torch.ones(3)), "B has shape"),
    "error of others": (
        lambda: error_estimate(kernel_matrix(X, "rbf"), X[1:], "rbf"),
        "X has shape (29, 1)",
    ),
    "points of NaN": (lambda: hierarchical(EYE, X * torch.nan), "NaN, infinite"),
    "entries that are none": (lambda: hierarchical(lambda i, j: None, size=300), "is NoneType"),
    "entries of a shape": (lambda: block_low_rank(lambda i, j: X, size=300), "is (30, 2)"),
    "a kernel that fails": (
        lambda: kernel_matrix(X, lambda r: r.eros()),
        "failed in line",
    ),
    "a kernel that fails later": (
        lambda: kernel_matrix(X, lambda r: r.view(2)),
        "given (1,) torch",
    ),
    "a coefficient that fails": (lambda: Grid((4, 4)).load(lambda x, y: x @ [y]), "TypeError"),
    "entries that fail": (lambda: hierarchical(lambda i, j: i / None, size=300), "TypeError"),
    "no size": (lambda: hierarchical(lambda i, j: i - j), "no points"),
    "no grid": (lambda: Grid((0,)), "whole number of at least 1"),
    "lengths for others": (lambda: Grid((4, 4), lengths=(1.0,)), "1 lengths"),
    "no length": (lambda: Grid((4,), lengths=0.0), "must be positive"),
    "no rows": (lambda: error_estimate(EYE, X, "rbf", rows=0), "no row is looked at"),
    "function of others": (lambda: Grid((4, 4)).load(lambda x: x), "in 2 dimensions"),
    "values of others": (
        lambda: Grid((4, 4)).stiffness(lambda x, y: torch.ones(3)),
        "shape (3,) at 16 points",
    ),
    "infinite values": (lambda: Grid((4,)).load(lambda x: 1 / (0 * x)), "at 4 of 4 points"),
    "a word": (lambda: Grid((4,)).stiffness("stiff"), "Give a number"),
    "function on elements": (lambda: Simplices.box((2, 2)).mass(lambda x: x), "in 2 dimensions"),
    "negative vertex": (lambda: Simplices(CORNERS, torch.tensor([[0, 1, -1]])), "vertex -1"),
    "no mesh": (lambda: Simplices.read("none.msh"), "none.msh"),
    "a surface": (
        lambda: Simplices.read(
            meshio_like(torch.eye(3, dtype=torch.float64).numpy(), triangle=[[0, 1, 2]])
        ),
        "Surfaces and curves",
    ),
    "a complex hierarchy": (
        lambda: multigrid(Grid((4, 4)).stiffness(lambda x, y: 1 + 1j * x)),
        "is complex",
    ),
    "no complex damping": (
        lambda: Grid((4,)).stiffness(lambda x: 1j * (1 + x)),
        "smallest value is 0",
    ),
    "negative coefficient": (lambda: Grid((4,)).stiffness(lambda x: x - 9), "smallest value is"),
    "NaN coefficient": (
        lambda: Grid((4,)).stiffness(torch.full((4,), torch.nan)),
        "is nan",
    ),
    "inverted triangle": (
        lambda: Simplices(CORNERS, torch.tensor([[0, 1, 2], [1, 2, 3]])[:, [0, 0, 2]]),
        "have no volume",
    ),
    "pure Neumann": (
        lambda: solve(PURE.stiffness(), torch.ones(64, dtype=torch.float64)),
        "lstsq(A, B)",
    ),
}
"""What is called, and what its message has in it."""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError, ImportError, torch.linalg.LinAlgError)) as caught:
        call()
    said = str(caught.value)
    assert message in said, said
    assert 2 <= len(said.splitlines()) <= 3


def test_the_error_of_a_user_s_function_is_kept():
    with pytest.raises(ValueError, match=r"failed in line \d+ of .*test_bad_input.py") as caught:
        kernel_matrix(X, lambda r: r.eros())
    assert isinstance(caught.value.__cause__, AttributeError)


def test_the_numbers_of_a_mesh_may_have_another_byte_order():
    mesh = meshio_like(np.eye(3)[:, :2].astype(">f8"), triangle=[[0, 1, 2]])
    mesh.cells_dict["triangle"] = mesh.cells_dict["triangle"].astype(">i8")
    assert Simplices.read(mesh, "neumann").volumes.tolist() == [0.5]


def test_what_is_strange_and_right():
    """No points, one point, points far outside the unit box, whole numbers, half precision."""
    assert kernel_matrix(X[:0], "laplace").shape == (0, 0)
    assert kernel_matrix(X[:1], "laplace").dense().tolist() == [[0.0]]
    far = kernel_matrix(1e12 * X, "laplace") @ torch.ones(30, dtype=torch.float64)
    near = kernel_matrix(X, "laplace") @ torch.ones(30, dtype=torch.float64)
    torch.testing.assert_close(far * 1e12, near)
    whole = kernel_matrix(torch.tensor([[0, 0], [3, 4]]), "laplace").dense()
    assert float(whole[0, 1]) == pytest.approx(0.2)
    half = kernel_matrix(X.half(), "rbf").dense()
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), kernel_matrix(X, "rbf").dense(), rtol=0, atol=2e-3)
