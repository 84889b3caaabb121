"""The first five minutes of a SciPy user: Poisson's equation `-Laplace u = f` on the unit square.

On `N` inner points in each direction, `h = 1 / (N + 1)` apart, SciPy assembles the sparse matrix

    A = (T (x) I + I (x) T) / h^2,   T = tridiag(-1, 2, -1)

`mg.from_scipy` makes it a value: arrays go in and come out, `mg.to_scipy` hands it back to SciPy's
solvers, and what tensors go through has derivatives. The smallest eigenvalue of `A` is
`8 sin(pi h / 2)^2 / h^2`, near `2 pi^2`. For `J = w.T A^-1 f` and a stored entry at `(i, j)`

    dJ / dA_ij = -p_i u_j   with   A u = f,   A.T p = w
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import eigsh, spsolve
from torch import Tensor

import matrigami as mg


def laplacian(N: int) -> sp.csr_array:
    """SciPy's own, `N^2` unknowns."""
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(N, N)) * (N + 1) ** 2
    return sp.csr_array(sp.kronsum(T, T))


def solved(N: int) -> tuple[Any, Any]:
    """The response to a constant load, by SciPy and from its matrix here: both are arrays."""
    A, f = laplacian(N), np.ones(N * N)
    return spsolve(A.tocsc(), f), mg.solve(mg.from_scipy(A), f)


def smallest_eigenvalue(N: int) -> float:
    """By SciPy's Lanczos, with products and solutions from here."""
    A = mg.from_scipy(laplacian(N))
    operators = {"A": mg.to_scipy(A), "OPinv": mg.to_scipy(mg.inverse(A))}
    start = np.ones(N * N)
    return float(eigsh(**operators, k=1, sigma=0, v0=start, return_eigenvectors=False)[0])


def sensitivity(N: int) -> tuple[Tensor, Tensor]:
    """`dJ / dA_ij` of the mean solution at each stored entry, by autograd and by its formula."""
    A, f = mg.from_scipy(laplacian(N)), torch.ones(N * N, dtype=torch.float64)
    w, stored = f / N**2, A.entries.clone().requires_grad_()
    J = w @ mg.solve(replace(A, entries=stored), f)
    (gradient,) = torch.autograd.grad(J, stored)
    u, p = mg.solve(A, f), mg.solve(A.T, w)
    return gradient, -p[A.rows] * u[A.columns]


if __name__ == "__main__":
    scipys, ours = solved(60)
    print(f"solve: an {type(ours).__name__}, equal to SciPy's: {np.allclose(ours, scipys)}")
    exact = 8 * math.sin(math.pi / 122) ** 2 * 61**2
    print(f"smallest eigenvalue: {smallest_eigenvalue(60):.8f}, exact {exact:.8f}")
    gradient, formula = sensitivity(60)
    print(f"{len(gradient)} derivatives, as in the formula: {torch.allclose(gradient, formula)}")
