"""P1 elements: orders, integrals, derivatives, meshes from elsewhere, refusals."""

import math

import pytest
import torch

import matrigami as mg
from matrigami.geometry.mesh import Grid, Simplices, multigrid
from matrigami.structures import SparseMatrix


def wave(x, y):
    return torch.sin(math.pi * x) * torch.sin(math.pi * y)


def test_orders_are_two_in_l2_and_one_in_h1():
    errors = []
    for n in (16, 32, 64):
        mesh = Simplices.box((n, n))
        u = mesh.extended(mg.solve(mesh.stiffness(), 2 * math.pi**2 * mesh.load(wave)))
        whole = Simplices(mesh.vertices, mesh.cells, "neumann")
        x, y = mesh.vertices[mesh.cells].mean(1).unbind(-1)
        slopes = (whole.gradient() @ u).unflatten(0, (-1, 2))
        exact = math.pi * torch.stack(
            [
                torch.cos(math.pi * x) * torch.sin(math.pi * y),
                torch.sin(math.pi * x) * torch.cos(math.pi * y),
            ],
            1,
        )
        error = u - mesh.values(wave)
        h1 = (mesh.volumes[:, None] * (slopes - exact).square()).sum()
        errors.append((float(error @ (whole.mass() @ error)) ** 0.5, float(h1) ** 0.5))
    orders = [math.log2(a / b) for a, b in zip(*errors[1:], strict=True)]
    assert orders[0] == pytest.approx(2.0, abs=0.05)
    assert orders[1] > 0.95  # at centres the gradient of P1 is better than its order


def test_the_five_point_stencil():
    """On Kuhn's triangulation of squares P1 elements are finite differences times the area."""
    mesh, grid = Simplices.box((5, 5)), Grid((4, 4))
    assert torch.allclose(mesh.stiffness().dense(), grid.stiffness().dense() / 25)


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 2)])
def test_integrals(sizes):
    lengths = tuple(float(i + 1) for i in range(len(sizes)))
    mesh = Simplices.box(sizes, lengths, "neumann")
    volume = math.prod(lengths)
    assert float(mesh.volumes.sum()) == pytest.approx(volume)
    ones = torch.ones(len(mesh.vertices))
    assert float(ones @ (mesh.mass() @ ones)) == pytest.approx(volume)
    x = mesh.vertices[:, 0]
    assert float(x @ (mesh.stiffness() @ x)) == pytest.approx(volume)  # of |grad x|^2 = 1
    assert torch.allclose(mesh.stiffness() @ ones, torch.zeros(len(ones)), atol=1e-12)
    assert float(mesh.load(lambda *x: x[0]).sum()) == pytest.approx(volume * lengths[0] / 2)
    G, V = mesh.gradient().dense(), mesh.volumes.repeat_interleave(len(sizes))
    assert torch.allclose(G.mT @ (V[:, None] * G), mesh.stiffness().dense(), atol=1e-12)


def test_orientation_does_not_matter():
    mesh = Simplices.box((3, 3))
    turned = Simplices(mesh.vertices, mesh.cells.flip(1))
    assert torch.allclose(mesh.stiffness().dense(), turned.stiffness().dense())


def test_the_boundary_of_a_hole_is_found():
    mesh = Simplices.box((4, 4))
    centres = mesh.vertices[mesh.cells].mean(1)
    holed = Simplices(mesh.vertices, mesh.cells[((centres - 0.5).abs() > 0.25).any(1)])
    assert int(mesh.on_boundary.sum()) == 16
    assert int(holed.on_boundary.sum()) == 16 + 8
    assert len(holed.free) == 0


def test_derivatives_in_coefficients_and_vertices():
    mesh = Simplices.box((3, 2))
    b = torch.arange(1.0, len(mesh.free) + 1)
    moved = (mesh.vertices + 0.03 * torch.randn(mesh.vertices.shape)).requires_grad_()
    c = (torch.rand(len(mesh.cells)) + 0.5).requires_grad_()

    def solution(vertices, c):
        return mg.solve(Simplices(vertices, mesh.cells).stiffness(c), b)

    assert torch.autograd.gradcheck(solution, (moved, c))


def test_factors_are_kept(monkeypatch):
    from matrigami.structures import _sparse

    calls, factorize = [], _sparse._factorize
    monkeypatch.setattr(_sparse, "_factorize", lambda A: calls.append(A) or factorize(A))
    A = Simplices.box((6, 6)).stiffness()
    b = torch.ones(25)
    first = mg.solve(A, b)
    assert torch.equal(first, mg.solve(A, b))
    assert len(calls) == 1
    A.entries.mul_(2)
    assert torch.allclose(mg.solve(A, b), first / 2)
    assert len(calls) == 2


def test_pyamg_makes_a_preconditioner():
    pytest.importorskip("pyamg", reason="needs the extra mesh")
    A = Simplices.box((50, 50)).stiffness(lambda x, y: 1 + 100 * (x > y))
    M = multigrid(A)
    b = torch.ones(A.shape[-1], 1)
    found = mg.krylov.cg(A, b, tol=1e-8, preconditioner=M.matmat)
    assert found.converged.all()
    assert found.steps <= 12
    assert len(multigrid(A).hierarchy.levels) >= 2


def test_large_definite_ones_are_solved_by_pyamg(monkeypatch):
    pytest.importorskip("pyamg", reason="needs the extra mesh")
    from matrigami.geometry.mesh import _multigrid

    monkeypatch.setattr(_multigrid, "FACTORED", 1000)
    A = Simplices.box((40, 40)).stiffness()
    b = torch.randn(A.shape[-1])
    u = mg.solve(A, b)
    assert float((A @ u - b).norm() / b.norm()) < 1e-9
    monkeypatch.setattr(_multigrid, "FACTORED", 10)
    i = torch.arange(12)
    indefinite = SparseMatrix(1.0 + i - 6.5, i, torch.arange(13), (12, 12))
    assert torch.allclose(mg.solve(indefinite, torch.ones(12)), 1 / (1.0 + i - 6.5))


def test_meshes_of_scikit_fem_and_meshio():
    skfem = pytest.importorskip("skfem", reason="needs the extra mesh")
    meshio = pytest.importorskip("meshio", reason="needs the extra mesh")
    theirs = skfem.MeshTri().refined(2)
    mesh = Simplices.read(theirs, "neumann")
    from skfem.models.poisson import laplace, mass

    basis = skfem.Basis(theirs, skfem.ElementTriP1())
    for ours, form in ((mesh.stiffness(), laplace), (mesh.mass(), mass)):
        assert torch.allclose(ours.dense(), torch.as_tensor(form.assemble(basis).toarray()))
    again = Simplices.read(meshio.Mesh(theirs.p.T, [("triangle", theirs.t.T)]), "neumann")
    assert torch.equal(again.cells, mesh.cells)
    with pytest.raises(ValueError, match="Only lines, triangles"):
        Simplices.read(meshio.Mesh(theirs.p.T, [("quad", theirs.t[[0, 1, 2, 0]].T)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v, c: Simplices(v, c[:, :2]), "d \\+ 1 vertices"),
        (lambda v, c: Simplices(v, c[:0]), "at least one"),
        (lambda v, c: Simplices(v, c + 100), "Give indices from 0"),
        (lambda v, c: Simplices(torch.where(v == 0, float("nan"), v), c), "not finite"),
        (lambda v, c: Simplices(v * torch.tensor([1.0, 0.0]), c), "no volume"),
        (lambda v, c: Simplices(v, c).stiffness(torch.ones(3)), "one for each simplex"),
        (lambda v, c: Simplices.box((0, 2)), "at least 1"),
    ],
)
def test_refusals(make, message):
    mesh = Simplices.box((2, 2))
    with pytest.raises(ValueError, match=message):
        make(mesh.vertices, mesh.cells)
