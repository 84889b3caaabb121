"""The heat equation `u_t = Laplace u` on the unit square, zero on the boundary.

On `N` inner points in each direction, `h = 1 / (N + 1)` apart, the minus Laplacian is a Kronecker
sum `A = L (x) I + I (x) L` with `L = tridiag(-1, 2, -1) / h^2`, and the solution is

    u(t) = exp(-t A) u(0) = (exp(-t L) (x) exp(-t L)) u(0)

`mg.exp` uses the right-hand side; `krylov.exp_multiply` needs products with `A` alone, so it also
takes what has no closed form, such as a conductivity that varies. The modes
`sin(p pi x) sin(q pi y)` decay at the rates `4 (sin^2(p pi h / 2) + sin^2(q pi h / 2)) / h^2`.
"""

import math

import torch
from torch import Tensor

import matrigami as mg


def minus_laplacian(N: int) -> mg.LinearOperator:
    """`N^2` unknowns from one matrix of `N^2` numbers."""
    beside = torch.ones(N - 1, dtype=torch.float64).diag(1)
    L = (2 * torch.eye(N, dtype=torch.float64) - beside - beside.T) * (N + 1) ** 2
    return mg.kron_sum(L, L)


def mode(N: int, p: int, q: int) -> tuple[Tensor, float]:
    """`sin(p pi x) sin(q pi y)`, and the rate at which it decays."""
    x, h = torch.arange(1, N + 1, dtype=torch.float64) / (N + 1), 1 / (N + 1)
    waves = torch.sin(p * math.pi * x)[:, None] * torch.sin(q * math.pi * x)
    rate = sum(4 * math.sin(i * math.pi * h / 2) ** 2 / h**2 for i in (p, q))
    return waves.flatten(), rate


def cooled(N: int, t: float) -> dict[str, Tensor]:
    """Two modes at time `t`, three ways."""
    A = minus_laplacian(N)
    (u1, r1), (u2, r2) = mode(N, 1, 1), mode(N, 3, 2)
    start = u1 + u2
    return {
        "modes": math.exp(-r1 * t) * u1 + math.exp(-r2 * t) * u2,
        "exp": mg.exp(-t * A) @ start,
        "exp_multiply": mg.krylov.exp_multiply(A, start, time=-t),
    }


if __name__ == "__main__":
    found = cooled(80, 0.01)
    print(f"{found['modes'].numel()} unknowns at t = 0.01")
    for name, u in found.items():
        print(f"{name:<12} |u| = {float(u.norm()):.8f}")
