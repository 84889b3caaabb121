"""What each rank does in the tests of distributed products; each raises if a number is wrong."""

import torch
import torch.distributed as dist
from torch import Tensor

from matrigami import DiagonalMatrix, cost, logdet, solve
from matrigami.geometry import distributed, distributed_kernel_matrix
from matrigami.geometry.particles import KERNELS, Kernel, kernel_matrix
from matrigami.geometry.particles._fast_multipole import fast_multipole_matrix
from matrigami.structures import H2Matrix


def uniform() -> Tensor:
    return torch.rand(1500, 2, generator=torch.Generator().manual_seed(0))


def uneven() -> Tensor:
    """Two clusters in space of unlike density, and a few points between."""
    G = torch.Generator().manual_seed(1)
    dense = 0.05 * torch.randn(1200, 3, generator=G)
    return torch.cat(
        [dense, 4 + torch.randn(400, 3, generator=G), 9 * torch.rand(40, 3, generator=G)]
    )


CLOUDS = {"uniform": (uniform, "matern32"), "uneven": (uneven, "laplace")}
"""Points, and a kernel."""


def vectors(n: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(2))


def agree(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12


def matrix(
    targets: Tensor, sources: Tensor, kernel: str, scale: float, planned: bool = False
) -> H2Matrix:
    """Hierarchical however few the points are."""
    return fast_multipole_matrix(targets, sources, KERNELS[kernel], scale, 1e-4, planned)


def multiplies(cloud: str) -> None:
    """Products, transposes, parts, and derivatives are those of one process, to rounding."""
    points, kernel = CLOUDS[cloud]
    X = points()
    A = matrix(X[: len(X) // 2] + 0.01, X, kernel, 0.3)
    D, x = distributed(A), vectors(A.shape[1])
    own = distributed(matrix(X[: len(X) // 2] + 0.01, X, kernel, 0.3, planned=True))
    assert (own @ x).equal(D @ x)
    assert (own.T @ vectors(A.shape[0])).equal(D.T @ vectors(A.shape[0]))
    torch.testing.assert_close(D @ x, A @ x, rtol=1e-12, atol=1e-12 * float((A @ x).abs().max()))
    y = vectors(A.shape[0])
    torch.testing.assert_close(
        D.T @ y, A.T @ y, rtol=1e-12, atol=1e-12 * float((A.T @ y).abs().max())
    )
    part = D.local @ x[D.columns.own.index]
    torch.testing.assert_close(part, (A @ x)[D.rows.own.index], rtol=1e-12, atol=1e-10)
    x.requires_grad_()
    (found,) = torch.autograd.grad((y * (D @ x)).sum(), x)
    torch.testing.assert_close(found, A.T @ y, rtol=1e-12, atol=1e-10)


def shares(cloud: str) -> None:
    """Every stored number has one owner, but for the operators that all cells have in common."""
    points, kernel = CLOUDS[cloud]
    X = points()
    A = matrix(X, X, kernel, 0.3)
    D = distributed(A)
    near = torch.tensor(cost(D.local.near[0]).params)
    most = near.clone()
    dist.all_reduce(near)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert int(near) == sum(cost(B).params for B in A.near)
    if dist.get_world_size() > 1:
        assert int(most) < 0.9 * int(near)
        assert cost(D).params < cost(A).params
    rows = torch.cat(D.rows.rows)
    assert rows.sort().values.equal(torch.arange(len(X)))


def builds(n: int) -> None:
    """A process computes the entries of its own points alone, and derivatives of these."""
    X, counts = uniform().repeat(n // 1500, 1), [0, 0]
    X = X + torch.rand(X.shape, generator=torch.Generator().manual_seed(4))

    def counted(i: int) -> Kernel:
        def kernel(r: Tensor) -> Tensor:
            counts[i] += r.numel()
            return torch.exp(-r)

        return kernel

    A = kernel_matrix(X, counted(0), tol=1e-2)
    X.requires_grad_()
    D, x = distributed_kernel_matrix(X, counted(1), tol=1e-2), vectors(n)
    agree(D @ x, A @ x)
    (found,) = torch.autograd.grad((D @ x).square().sum(), X)
    dist.all_reduce(found)
    (wanted,) = torch.autograd.grad((kernel_matrix(X, counted(0), tol=1e-2) @ x).square().sum(), X)
    agree(found, wanted)
    if dist.get_world_size() > 1:
        assert cost(D).params < 0.7 * cost(A).params
        assert counts[1] < 0.7 * counts[0] / 2


def solves(cloud: str) -> None:
    """Conjugate gradients give one answer, the same bits on all ranks."""
    points, kernel = CLOUDS[cloud]
    X = points()
    A = matrix(X, X, kernel, 0.3) + DiagonalMatrix(torch.full((len(X),), 1e3))
    b = vectors(len(X))[:, 0]
    x = solve(distributed(A), b)
    assert float((A @ x - b).norm() / b.norm()) < 1e-8
    first = x.clone()
    dist.broadcast(first, 0)
    assert x.equal(first)


def line(n: int) -> None:
    """Of points on a line products, solutions and determinants are those of one process."""
    x = torch.rand(n, generator=torch.Generator().manual_seed(3))
    K = kernel_matrix(x, "matern32", scale=0.2)
    agree(distributed_kernel_matrix(x, "matern32", scale=0.2) @ vectors(n), K @ vectors(n))
    A = K + DiagonalMatrix(torch.ones(n))
    D, b = distributed(A), vectors(n)
    agree(D @ b, A @ b)
    agree(D.T @ b, A.T @ b)
    agree(D.local @ b[D.columns.own.index], (A @ b)[D.rows.own.index])
    agree(solve(D, b), solve(A, b))
    agree(logdet(D), logdet(A))
    if dist.get_world_size() > 1:
        assert cost(D).params < 0.6 * cost(A).params
    b.requires_grad_()
    (found,) = torch.autograd.grad((vectors(n) * solve(D, b)).sum(), b)
    agree(found, solve(A, vectors(n)))
