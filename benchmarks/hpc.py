"""Matrices of scientific computing beside other libraries, in one run: CPU seconds and errors.

    OMP_NUM_THREADS=1 python -m benchmarks.hpc docs/results/hpc [--only line]

writes the tables of `README.md` there, between its marks; what people wrote around them stays.
Seconds are CPU time of the process, one thread. Libraries that are not installed are left out, with
a line that says so (`pip install pyamg fmm3dpy pykeops higp torch-fem`).
"""

import argparse
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor

import matrigami as mg
from benchmarks._hpc_mesh import elements, poisson
from benchmarks._hpc_row import Row, peer, timed
from benchmarks._report import table
from benchmarks._timing import machine
from matrigami.geometry import hierarchical, relative_error
from matrigami.geometry.mesh import Grid
from matrigami.geometry.particles import KERNELS, error_estimate, kernel_matrix
from matrigami.geometry.particles._fast_multipole import fast_multipole_matrix
from matrigami.geometry.particles._kernels import interactions

D = torch.float64
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
PEERS = {name: name for name in ("pyamg", "fmm3dpy", "pykeops", "higp", "scipy")}
PEERS["torch-fem"] = "torchfem"


def space(n: int = 100_000) -> Iterator[Row]:
    """Products in three dimensions."""
    x, q = torch.rand(n, 3, dtype=D), torch.randn(n, dtype=D)
    for tol, first, whole in ((5e-5, 2.1, None), (1e-6, 9.5, 14.0)):
        A, build = timed(lambda tol=tol: kernel_matrix(x, "laplace", tol=tol))
        _ = A @ q
        _, product = timed(lambda A=A: A @ q)
        said = f"error {error_estimate(A, x, 'laplace'):.1e}"
        work = f"1/r, {n} points of a cube, tol {tol:g}"
        yield Row(f"{work}: product", "matrigami", {"product": product}, said, first)
        seconds = {"set-up": build, "product": product}
        yield Row(f"{work}: set-up and product", "matrigami", seconds, said, whole)
    yield from _fmm3d(x, q)


def _fmm3d(x: Tensor, q: Tensor) -> Iterator[Row]:
    """The same by FMM3D, whose call does all."""
    library = peer("fmm3dpy")
    if library is None:
        return
    index = torch.arange(0, len(x), len(x) // 200)
    exact = interactions(KERNELS["laplace"], x[index], x, 1.0) @ q
    points, charges = np.asfortranarray(x.numpy().T), q.numpy()
    for eps in (1e-3, 1e-5):
        found, seconds = timed(
            lambda eps=eps: library.lfmm3d(eps=eps, sources=points, charges=charges, pg=1)
        )
        scale = 1.0 if abs(found.pot[index[0]] / float(exact[0])) > 0.5 else 4 * np.pi
        error = np.linalg.norm(scale * found.pot[index] - exact.numpy()) / float(exact.norm())
        work = f"1/r, {len(x)} points of a cube, eps {eps:g}"
        yield Row(work, "fmm3dpy", {"set-up and product": seconds}, f"error {float(error):.1e}")


def smooth(n: int = 10_000) -> Iterator[Row]:
    """A smooth kernel of a cube, by nested bases and by all pairs."""
    x, q, scale = torch.rand(n, 3, dtype=D), torch.randn(n, dtype=D), 0.3
    work = f"Matern-3/2, {n} points of a cube"
    index = torch.arange(0, n, n // 200)
    exact = interactions(KERNELS["matern32"], x[index], x, scale) @ q

    def row(by: str, seconds: dict[str, float], found: Any) -> Row:
        error = float((torch.as_tensor(found).flatten()[index] - exact).norm() / exact.norm())
        return Row(work, by, seconds, f"error {error:.1e}")

    A, build = timed(lambda: kernel_matrix(x, "matern32", scale=scale, tol=3e-5))
    _ = A @ q
    y, product = timed(lambda: A @ q)
    yield row("matrigami", {"set-up": build, "product": product}, y)
    library = peer("higp_cext")
    if library is not None:
        options = {"kernel_type": 2, "l": scale, "f": 1.0, "s": 1e-9, "nthreads": 1, "h2_tol": 1e-5}
        points = np.ascontiguousarray(x.numpy().T)
        K, build = timed(lambda: library.krnlmat.setup(data=points, **options))
        y, product = timed(lambda: K.matmul(q.numpy()))
        yield row("higp", {"set-up": build, "product": product}, y)
    if peer("pykeops.torch") is not None:
        _ = _all_pairs(x, q, scale)  # compiles the formula, in other processes
        y, product = timed(lambda: _all_pairs(x, q, scale))
        yield row("pykeops", {"product": product}, y)


def _all_pairs(x: Tensor, q: Tensor, scale: float) -> Tensor:
    """The sums by KeOps, which keeps nothing."""
    lazy = import_module("pykeops.torch").LazyTensor
    u = ((lazy(x[:, None]) - lazy(x[None])) ** 2).sum(-1).sqrt() * (3**0.5 / scale)
    return ((-u).exp() * (1 + u)) @ q[:, None]


def line(n: int = 100_000) -> Iterator[Row]:
    """A Gaussian process on a line."""
    _ = mg.logdet(kernel_matrix(torch.rand(600, dtype=D), "matern32"))  # loads what is lazy
    x, b = torch.rand(n, dtype=D), torch.randn(n, dtype=D)
    nugget = mg.DiagonalMatrix(torch.full((n,), 1e-2, dtype=D))
    A, build = timed(lambda: kernel_matrix(x, "matern32", scale=0.2) + nugget)
    y, solution = timed(lambda: mg.solve(A, b))
    _, determinant = timed(lambda: mg.logdet(A))
    residual = float((A @ y - b).norm() / b.norm())
    seconds = {"build": build, "solve": solution, "logdet": determinant}
    yield Row(f"Matern-3/2, {n} points", "matrigami", seconds, f"residual {residual:.0e}", 3.0)
    n = 4096
    A = kernel_matrix(x[:n], "matern32", scale=0.2) + mg.DiagonalMatrix(nugget.diagonal[:n])
    entries = A.dense()
    L, dense = timed(lambda: torch.linalg.cholesky(entries))
    wanted, (found, ours) = 2 * L.diagonal().log().sum(), timed(lambda: mg.logdet(A))
    miss = float((found - wanted).abs() / wanted.abs())
    yield Row(f"logdet, {n} points", "matrigami", {"logdet": ours}, f"difference {miss:.0e}")
    yield Row(f"logdet, {n} points", "dense Cholesky of torch", {"logdet": dense}, "reference")


def diagonals(n: int = 1_000_000) -> Iterator[Row]:
    """Toeplitz, circulant and banded systems."""
    lag, b = torch.arange(n, dtype=D), torch.randn(n, dtype=D)
    short = 10_000
    for recipe in (mg.Toeplitz(), mg.Circulant(), mg.Banded()):
        _ = mg.solve(recipe.init(9000, 9000, dtype=D), b[:9000], 200.0)
    column = torch.exp(-lag / 50) + 0.01 * (lag == 0)
    for size in (short, n):
        K = mg.ToeplitzMatrix.of(column[:size])
        x, seconds = timed(lambda K=K, size=size: mg.solve(K, b[:size]))
        said = f"residual {float((K @ x - b[:size]).norm() / b[:size].norm()):.0e}"
        yield Row(f"Toeplitz, {size} rows", "matrigami", {"solve": seconds}, said)
    t, y = column[:short].numpy(), b[:short].numpy()
    x, seconds = timed(lambda: scipy.linalg.solve_toeplitz(t, y))
    residual = np.linalg.norm(scipy.linalg.matmul_toeplitz(t, x) - y) / np.linalg.norm(y)
    said = f"residual {residual:.0e}"
    yield Row(f"Toeplitz, {short} rows", "Levinson of scipy", {"solve": seconds}, said)
    C = mg.CirculantMatrix(torch.exp(-torch.minimum(lag, n - lag) / 50) + 0.01 * (lag == 0))
    yield from _beside(C, b, "circulant", scipy.linalg.solve_circulant, C.column.numpy())
    T = mg.BandedMatrix.of([-1.0, -1.0, 5.0, -1.0, -1.0], 2, (n, n), dtype=D)
    bands = np.tile(np.array([[-1.0], [-1.0], [5.0], [-1.0], [-1.0]]), n)
    yield from _beside(T, b, "five bands", scipy.linalg.solve_banded, (2, 2), bands)


def _beside(A: mg.LinearOperator, b: Tensor, name: str, solver: Any, *args: Any) -> Iterator[Row]:
    """A system by us, with its determinant, and by SciPy."""
    x, solution = timed(lambda: mg.solve(A, b))
    _, determinant = timed(lambda: mg.logdet(A))
    y, seconds = timed(lambda: torch.as_tensor(solver(*args, b.numpy())))
    said = [f"residual {float((A @ z - b).norm() / b.norm()):.0e}" for z in (x, y)]
    work = f"{name}, {len(b)} rows"
    yield Row(work, "matrigami", {"solve": solution, "logdet": determinant}, said[0])
    yield Row(work, "scipy", {"solve": seconds}, said[1])


def schur(k: int = 127, m: int = 255) -> Iterator[Row]:
    """The Schur complement of a line in a Poisson problem, from products alone."""
    h = 1 / (m + 1)
    half = Grid((k, m), lengths=((k + 1) * h, 1.0)).stiffness()
    last = torch.zeros(k, 1, dtype=D)
    last[-1] = -1 / h**2
    C = mg.kron(mg.DenseMatrix(last), mg.identity(m, dtype=D))
    rest = Grid((m,)).stiffness() + (2 / h**2) * mg.identity(m, dtype=D)
    S = rest - 2.0 * (C.T @ mg.inverse(half) @ C)
    H, seconds = timed(lambda: hierarchical(S, tol=1e-9, leaf=32))
    whole = mg.logdet(Grid((2 * k + 1, m)).stiffness())
    miss = float((2 * mg.logdet(half) + mg.logdet(H) - whole).abs() / whole)
    stored = mg.cost(H).params / m**2
    said = f"error {relative_error(S, H):.0e}, logdet {miss:.0e}, {stored:.2f} of dense"
    yield Row(
        f"Schur complement of {m} in {k} x {m} twice", "matrigami", {"peeling": seconds}, said
    )


def products(n: int = 4000) -> Iterator[Row]:
    """Nested bases of a dense matrix of points in the plane, from products alone."""
    x = torch.rand(n, 2, dtype=D)
    A = mg.DenseMatrix(torch.exp(-2 * torch.cdist(x, x)))
    for tol in (1e-2, 1e-6):
        H, seconds = timed(lambda tol=tol: hierarchical(A, x, tol=tol))
        said = f"error {relative_error(A, H):.0e}, {mg.cost(H).params / n**2:.2f} of dense"
        work = f"H2 of products, {n} points of the plane, tol {tol:g}"
        yield Row(work, "matrigami", {"products and bases": seconds}, said)


WORK = {
    "space": space,
    "smooth": smooth,
    "line": line,
    "poisson": poisson,
    "elements": elements,
    "diagonals": diagonals,
    "schur": schur,
    "products": products,
}


SPACES = ((1, "matern32", 1e-6), (2, "coulomb2d", 1e-6), (3, "laplace", 1e-3))
"""Dimension, kernel and tolerance of the table of storage."""


def growth(powers: range) -> str:
    """Numbers stored for each point, what all cells of a level share aside, and multiply-adds."""
    body, told = [], []
    for d, name, tol in SPACES:
        found = [_numbers(d, name, tol, 2**power) for power in powers]
        body += [
            [d, f"{tol:g}", f"2^{p}", *map(round, f[:2]), f"{f[2]:.2f}", f[3]]
            for p, f in zip(powers, found, strict=True)
        ]
        kinds = ("numbers", "multiply-adds", "multiply-adds over those without a surface")
        spread = [_spread([f[i] for f in found]) for i in range(3)]
        parts = [f"{kind} within {s:.0%}" for kind, s in zip(kinds, spread, strict=True)]
        told.append(f"In {d}-D, of their mean: {', '.join(parts)}.")
    head = ["dimension", "tol", "n", "numbers a point", "multiply-adds a point"]
    return "\n".join([table([*head, "share without a surface", "shared"], body), "", *told])


def _spread(numbers: list[float]) -> float:
    """The largest distance from their mean, relative to it."""
    mean = sum(numbers) / len(numbers)
    return max(abs(number / mean - 1) for number in numbers)


def _numbers(d: int, name: str, tol: float, n: int) -> tuple[float, float, float, int]:
    """A point's numbers and multiply-adds, the share of these without a surface, and the rest."""
    x = torch.rand(n, d, dtype=D)
    A: Any = fast_multipole_matrix(x + 0.0, x, KERNELS[name], 1.0, tol)
    leaves = [B for level in A.left for B in level]
    numbers = sum(B.blocks.numel() for B in (*leaves, *A.near)) / n
    shared = sum(B.blocks.numel() for B in (*A.couplings, *A.up))
    macs = mg.cost(A).macs
    return numbers, macs / n, macs / (macs + _missing(A, d, leaves)), shared


def _missing(A: Any, d: int, leaves: list[Any]) -> float:
    """The multiply-adds that the surface of the cloud saves.

    With `G` cells along an edge a cell has `(3 - 2 / G)^d` neighbours in the mean, itself among
    them; without a surface `3^d`. The coupling of a parent is with the others, of full width.
    """
    missing = 0.0
    for C in A.couplings:
        width = C.blocks.shape[-1]
        missing += C.shape[0] // width * (3**d - 1) * width**2 - mg.cost(C).macs
    cells = max(sum(len(B.rows.index) for B in leaves), 1)
    inside = (3 / (3 - 2 / cells ** (1 / d))) ** d
    return missing + (inside - 1) * sum(B.blocks.numel() for B in A.near)


def page(folder: Path, report: str) -> None:
    """Write between the marks of the page, or a new page."""
    path = folder / "README.md"
    text = path.read_text() if path.exists() else "\n\n".join(MARKS) + "\n"
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{MARKS[0]}\n\n{report}\n\n{MARKS[1]}{after}")


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(
        description="Matrices of scientific computing beside other libraries."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=WORK, help="print the rows of one kind of work alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, work in WORK.items():
        for row in work() if given.only in {None, name} else ():
            print(*row.cells(), sep=" | ", flush=True)
            rows.append(row.cells())
    if given.only:
        return
    found = [f"{name} {version(name)}" for name, module in PEERS.items() if peer(module)]
    missing = [f"Not installed here: {name}." for name, module in PEERS.items() if not peer(module)]
    facts = "; ".join([", ".join(machine().values()), "one thread", *found])
    head = ["work", "by", "CPU s", "parts", "accuracy", "goal"]
    page(given.folder, "\n\n".join([facts, *missing, table(head, rows), growth(range(12, 19))]))


if __name__ == "__main__":
    main()
