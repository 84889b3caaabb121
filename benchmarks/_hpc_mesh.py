"""Equations on meshes, for `benchmarks.hpc`: grids and finite elements, beside other libraries."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from torch import Tensor

import matrigami as mg
from benchmarks._hpc_row import Row, peer, timed
from matrigami.geometry.mesh import Grid, Simplices, multigrid
from matrigami.krylov import cg
from matrigami.operators import as_array

D = torch.float64


def poisson(n: int = 1023) -> Iterator[Row]:
    """Separable, by fast diagonalisation, and with a coefficient that varies."""
    _ = mg.solve(Grid((n, 5)).stiffness(), torch.ones(5 * n, dtype=D))
    grid = Grid((n, n))
    f = grid.load(lambda x, y: torch.sin(3 * x) * y)
    A, build = timed(grid.stiffness)
    u, solution = timed(lambda: mg.solve(A, f))
    said = f"residual {float((A @ u - f).norm() / f.norm()):.0e}"
    work = f"Poisson {n} x {n}"
    yield Row(work, "matrigami", {"build": build, "solve": solution}, said, 0.34)
    v, sines = timed(lambda: _sine_transforms(f.numpy().reshape(n, n)))
    said = f"residual {float((A @ torch.as_tensor(v).flatten() - f).norm() / f.norm()):.0e}"
    yield Row(work, "sine transforms of scipy", {"solve": sines}, said)
    yield from _varying(grid, f, f"diffusion 1 + 10 x y, {n} x {n}")


def _sine_transforms(f: Any) -> Any:
    """Fast diagonalisation by hand."""
    n = len(f)
    values = 4 * (n + 1) ** 2 * np.sin(np.arange(1, n + 1) * np.pi / (2 * (n + 1))) ** 2
    return scipy.fft.idstn(scipy.fft.dstn(f, type=1) / (values[:, None] + values), type=1)


def _varying(grid: Grid, f: Tensor, work: str) -> Iterator[Row]:
    """Conjugate gradients with a multigrid cycle to 1e-8, of the two libraries."""
    A, build = timed(lambda: grid.stiffness(lambda x, y: 1 + 10 * x * y))
    M, setup = timed(lambda: multigrid(A))
    B = f[:, None]
    found, solution = timed(lambda: cg(A, B, tol=1e-8, preconditioner=M.matmat))
    said = f"{found.steps} iterations, residual {float(found.residuals[-1].max()):.0e}"
    seconds = {"build": build + setup, "solve": solution}
    yield Row(work, "matrigami", seconds, said, 4.4)
    pyamg = peer("pyamg")
    if pyamg is None:
        return
    S = A.sparse()
    parts = [as_array(t) for t in (S.entries, S.columns.int(), S.pointers.int())]
    matrix, history = scipy.sparse.csr_matrix(tuple(parts), shape=S.size), []
    hierarchy, setup = timed(lambda: pyamg.ruge_stuben_solver(matrix))
    _, solution = timed(lambda: hierarchy.solve(f.numpy(), tol=1e-8, accel="cg", residuals=history))
    said = f"{len(history) - 1} iterations, residual {history[-1] / history[0]:.0e}"
    yield Row(work, "Ruge-Stueben and CG of pyamg", {"build": setup, "solve": solution}, said)


def elements(n: int = 1023) -> Iterator[Row]:
    """Piece-wise linear finite elements and conjugate gradients with PyAMG's hierarchy to 1e-8."""
    if peer("pyamg") is None:
        return
    _ = _by_elements(15), _by_torch_fem(Simplices.box((16, 16)))  # loads what is lazy
    work = f"diffusion 1 + 10 x y, {n} x {n}, P1"
    (mesh, K, b), u, seconds, steps = _by_elements(n)

    def said(u: Tensor, steps: int) -> str:
        return f"{steps} iterations, residual {float((K @ u - b).norm() / b.norm()):.0e}"

    yield Row(work, "matrigami", seconds, said(u, steps))
    found = _by_torch_fem(mesh)
    if found is not None:
        v, seconds, steps = found
        yield Row(work, "torch-fem", seconds, said(v[mesh.free], steps))


def _conductivity(x: Tensor, y: Tensor) -> Tensor:
    """What varies."""
    return 1 + 10 * x * y


def _source(x: Tensor, y: Tensor) -> Tensor:
    """The right-hand side."""
    return torch.sin(3 * x) * y


def _by_elements(n: int) -> tuple[tuple[Simplices, Any, Tensor], Tensor, dict[str, float], int]:
    """By us: the equation, its solution, seconds and iterations."""

    def build() -> tuple[Simplices, Any, Tensor]:
        mesh = Simplices.box((n + 1, n + 1))
        return mesh, mesh.stiffness(_conductivity), mesh.load(_source)

    (mesh, K, b), assembly = timed(build)
    M, setup = timed(lambda: multigrid(K))
    found, solution = timed(lambda: cg(K, b, tol=1e-8, preconditioner=M))
    seconds = {"build": assembly, "hierarchy": setup, "solve": solution}
    return (mesh, K, b), found.X, seconds, found.steps


def _by_torch_fem(mesh: Simplices) -> tuple[Tensor, dict[str, float], int] | None:
    """The same by the parts of torch-fem, which computes in the type that is set for all."""
    if peer("torchfem") is None:
        return None
    models, materials, sparse = (
        import_module(name) for name in ("torchfem", "torchfem.materials", "torchfem.sparse")
    )
    X, cells = mesh.vertices, mesh.cells.clone()
    turned = torch.linalg.det(X[cells[:, 1:]] - X[cells[:, :1]]) < 0
    cells[turned] = cells[turned][:, [0, 2, 1]]
    rule = Simplices(X, cells, "neumann").load(_source)
    rule[mesh.on_boundary] = 0

    def build() -> Tensor:
        material = materials.IsotropicConductivity2D(_conductivity(*X[cells].mean(1).T))
        model = models.PlanarHeat(X, cells, material)
        return model.assemble_matrix(model.k0(), mesh.on_boundary.nonzero()[:, 0])

    torch.set_default_dtype(D)
    try:
        K, assembly = timed(build)
        (u, _, _, steps), solution = timed(
            lambda: sparse.sparse_solve(K, rule, stol=1e-8, method="cg")
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return u, {"build": assembly, "hierarchy and solve": solution}, steps
