"""The damped Helmholtz equation `-u'' - kappa^2 u = f`, zero on the boundary.

With wave number `k` and damping `c`, `kappa^2 = k^2 + i c k`. On `N` inner points in each
direction, `h = 1 / (N + 1)` apart, the second difference is `L = tridiag(-1, 2, -1) / h^2`, and

    on a line     A = L - kappa^2 I
    on a square   A = L (x) I + I (x) L - kappa^2 I      complex symmetric, not Hermitian

On the line, with `x_<` and `x_>` the smaller and the larger of `x` and `y`, a source at `y` causes

    G(x, y) = sin(kappa x_<) sin(kappa (1 - x_>)) / (kappa sin kappa) + O(h^2)
"""

import torch
from torch import Tensor

import matrigami as mg


def second_difference(N: int) -> Tensor:
    """`tridiag(-1, 2, -1) / h^2`."""
    beside = torch.ones(N - 1, dtype=torch.float64).diag(1)
    return (2 * torch.eye(N, dtype=torch.float64) - beside - beside.T) * (N + 1) ** 2


def squared(k: Tensor | float, damping: float = 1.0) -> Tensor:
    """`kappa^2`, differentiable in the wave number."""
    k = torch.as_tensor(k, dtype=torch.float64)
    return torch.complex(k * k, damping * k)


def on_a_line(N: int, k: float) -> tuple[Tensor, Tensor]:
    """The response to a source in the middle, by differences and in closed form."""
    x, kappa = torch.arange(1, N + 1, dtype=torch.float64) / (N + 1), squared(k).sqrt()
    source = torch.zeros(N, dtype=torch.float64)
    source[N // 2], y = N + 1, float(x[N // 2])
    u = mg.solve(mg.DenseMatrix(second_difference(N)), source, damping=-squared(k))
    waves = torch.sin(kappa * x.clamp(max=y)) * torch.sin(kappa * (1 - x.clamp(min=y)))
    return u, waves / (kappa * torch.sin(kappa))


def on_a_square(N: int, k: Tensor | float, damping: float = 1.0) -> mg.LinearOperator:
    """`N^2` unknowns from two matrices of `N^2` numbers; solved by their Schur forms."""
    L = second_difference(N)
    return mg.shift(mg.kron_sum(L, L), -squared(k, damping))


def point_source(N: int) -> Tensor:
    """Of unit strength, a third of the way along each side."""
    source = torch.zeros(N, N, dtype=torch.complex128)
    source[N // 3, N // 3] = (N + 1) ** 2
    return source.flatten()


def misfit(k: Tensor, data: Tensor, N: int) -> Tensor:
    """`|u(k) - data|^2 / 2`: what an inverse problem makes small."""
    return (mg.solve(on_a_square(N, k), point_source(N)) - data).abs().square().sum() / 2


if __name__ == "__main__":
    import matplotlib.pyplot as plt

    coarse, fine = (float((u - G).abs().max()) for u, G in (on_a_line(N, 12.0) for N in (103, 207)))
    print(f"line: the error falls by {coarse / fine:.2f} as h is halved")
    A, b, near = on_a_square(60, 12.0), point_source(60), on_a_square(60, 12.0, damping=12.0)
    u = mg.solve(A, b)
    found = mg.krylov.gmres(A, b, preconditioner=lambda R: mg.solve(near, R))
    error = float((found.X - u).norm() / u.norm())
    print("square: GMRES agrees to 9 digits in 40 products:", error < 1e-9 and found.steps < 40)
    k = torch.tensor(11.9, dtype=torch.float64, requires_grad=True)
    print(f"d misfit / dk at 11.9: {float(torch.autograd.grad(misfit(k, u, 60), k)[0]):.4g}")
    u = mg.solve(on_a_square(120, 40.0), point_source(120)).reshape(120, 120).real
    limit = float(u.abs().quantile(0.99))
    plt.imshow(u.T.numpy(), "RdBu", vmin=-limit, vmax=limit, extent=(0, 1, 0, 1), origin="lower")
    plt.colorbar(label="Re u, k = 40")
    plt.xlabel("x")
    plt.ylabel("y")
    plt.savefig("helmholtz.png")
