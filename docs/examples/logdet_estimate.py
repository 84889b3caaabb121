"""A log-determinant is exact or refused; an estimate has another name and carries its error.

A Gaussian field on an `N x N` grid with the precision `A = c I + L (x) I + I (x) L` has the density

    log p(x) = (logdet A - x.T A x - N^2 log(2 pi)) / 2

`logdet A` is the sum of `log(c + l_i + l_j)` over pairs of eigenvalues of `L`: exact at any size.
If the precision varies from point to point, `A + diag(d)`, nothing so simple is known. Then

    logdet B = trace(log B) = E[z.T log(B) z]      for independent signs z

is estimated by Lanczos quadrature (Ubaru, Chen and Saad 2017), or computed by a sparse LU.
"""

import math

import scipy.sparse as sp
import torch

import matrigami as mg


def precision(N: int, c: float = 0.1) -> mg.LinearOperator:
    """`c I + L (x) I + I (x) L`, the same everywhere."""
    beside = torch.ones(N - 1, dtype=torch.float64).diag(1)
    L = 2 * torch.eye(N, dtype=torch.float64) - beside - beside.T
    return mg.shift(mg.kron_sum(L, L), c)


def varying(N: int) -> mg.LinearOperator:
    """The same, plus a number at each point."""
    x = torch.linspace(0, 1, N * N, dtype=torch.float64)
    return precision(N) + mg.DiagonalMatrix(torch.sin(9 * x).square())


def by_sparse_lu(N: int) -> float:
    """`logdet(varying(N))` from SciPy's matrix, factorised by SuperLU."""
    L = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(N, N))
    d = mg.diagonal(varying(N)) - 4
    return float(mg.logdet(mg.from_scipy(sp.kronsum(L, L) + sp.diags_array(d.numpy()))))


def closed_form(N: int, c: float = 0.1) -> float:
    """The sum over pairs of eigenvalues `l_j = 4 sin(pi j / (2 N + 2))^2`."""
    j = torch.arange(1, N + 1, dtype=torch.float64)
    values = 4 * torch.sin(math.pi * j / (2 * N + 2)).square()
    return float((c + values[:, None] + values).log().sum())


if __name__ == "__main__":
    N = 80
    print(f"constant: {float(mg.logdet(precision(N))):.6f}, the sum is {closed_form(N):.6f}")
    B, generator = varying(N), torch.Generator().manual_seed(0)
    try:
        mg.logdet(B)
    except ValueError as refusal:
        print(refusal)
    value, error = mg.krylov.stochastic_logdet(B, generator=generator)
    print(f"estimate: {float(value):.1f} +- {float(error):.1f}, by LU: {by_sparse_lu(N):.1f}")
