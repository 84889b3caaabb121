"""Matrices of scientific computing for the comparison with those of networks: three sizes of each.

Points are random in the unit cube, or on the unit sphere; grids are those of finite differences
with zero boundary values. All of them are made from formulas and from sparse Laplacians.
"""

import functools
import itertools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.geometry.particles import kernel_matrix
from matrigami.studies.analysis._sources import Loaded, Source

KERNELS = (*itertools.product(("laplace", "matern32", "gaussian"), (1, 2, 3)), ("laplace", 0))
"""Kernels with the dimension of their points; 0 is the sphere."""

POINTS = (128, 256, 512)
"""Points of a kernel."""

GRIDS = {1: (128, 256, 512), 2: (8, 16, 24), 3: (4, 6, 8)}
"""Inner points along an axis, by dimension."""

SEPARATORS = {2: (48, 96, 192), 3: (8, 12, 16)}
"""Points along an axis of the square or cube whose middle is kept in a Schur complement."""

SCALE = 0.2
"""Length scale of the smooth kernels."""


def numerical_sources() -> list[Source]:
    """Kernels, Laplacians, their inverses, Schur complements."""
    found = [_kernel(kernel, d, n) for kernel, d in KERNELS for n in POINTS]
    found += [_grid("Green's function", d, k) for d, sides in GRIDS.items() for k in sides]
    found += [_grid("Laplacian", 2, k) for k in GRIDS[2]]
    return found + [_schur(d, k) for d, sides in SEPARATORS.items() for k in sides]


def _kernel(kernel: str, d: int, n: int) -> Source:
    """A kernel of random points; d = 0 is the sphere."""

    def load() -> Loaded:
        generator = torch.Generator().manual_seed(d)
        if d:
            X = torch.rand(n, d, generator=generator, dtype=torch.float64)
        else:
            X = torch.randn(n, 3, generator=generator, dtype=torch.float64)
            X = X / X.norm(dim=1, keepdim=True)
        scale = 1.0 if kernel == "laplace" else SCALE
        return kernel_matrix(X, kernel, scale=scale).dense(), X

    where = f"{d}-D" if d else "sphere"
    return Source(f"{kernel} {where} · {n}", (n, n), load, f"kernel {kernel} {d} {n}")


def _grid(what: str, d: int, k: int) -> Source:
    """The Laplacian of a grid, or its inverse."""
    n = k**d

    def load() -> Loaded:
        A = torch.from_numpy(_laplacian(d, k).toarray())
        axes = [torch.arange(k, dtype=torch.float64)] * d
        X = torch.cartesian_prod(*axes).reshape(n, d)
        return (A if what == "Laplacian" else torch.linalg.inv(A)), X

    return Source(f"{what} {d}-D · {n}", (n, n), load, f"{what} {d} {k}")


def _schur(d: int, k: int) -> Source:
    """What elimination of all but the middle line or plane of the grid leaves of the Laplacian."""
    n = k ** (d - 1)

    def load() -> Loaded:
        axes = [torch.arange(k, dtype=torch.float64)] * (d - 1)
        return _eliminated(d, k), torch.cartesian_prod(*axes).reshape(n, d - 1)

    return Source(f"Schur complement {d}-D · {n}", (n, n), load, f"schur {d} {k}")


def _eliminated(d: int, k: int) -> Float[Tensor, "s s"]:
    """`A_ss - A_si A_ii^-1 A_is`, with the middle layer last."""
    from scipy.sparse.linalg import splu  # noqa: PLC0415 - not needed to import the package

    A = _laplacian(d, k).tocsr()
    layer = np.arange(k**d).reshape((k,) * d)[k // 2].ravel()
    inner = np.setdiff1d(np.arange(k**d), layer)
    factor = splu(A[inner][:, inner].tocsc())
    coupling = A[inner][:, layer]
    S = A[layer][:, layer].toarray() - coupling.T @ factor.solve(coupling.toarray())
    S = torch.from_numpy(np.ascontiguousarray(S))
    return (S + S.mT) / 2


def _laplacian(d: int, k: int):  # noqa: ANN202 - of a package that is not imported yet
    """`-Laplace` times the squared spacing, a Kronecker sum of `d` second differences."""
    from scipy.sparse import diags_array, eye_array, kron  # noqa: PLC0415 - as above

    T = diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(k, k))  # pyright: ignore[reportArgumentType]
    terms = []
    for axis in range(d):
        factors = [T if axis == i else eye_array(k) for i in range(d)]
        terms.append(functools.reduce(kron, factors))
    return sum(terms[1:], terms[0])
