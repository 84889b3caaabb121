"""Kernel matrices of points: CPU seconds of set-up, product and solution, and measured errors.

    python -m benchmarks.particles [--points 100000]

CPU time of the process, one thread. The rows of other libraries are measured elsewhere; what they
took is quoted with the table in the documentation.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import matrigami as mg
from matrigami.geometry.particles import KERNELS, error_estimate, kernel_matrix
from matrigami.geometry.particles._fast_multipole import fast_multipole_matrix

D = torch.float64


def clouds(n: int) -> dict[str, Tensor]:
    """A cube, a sphere, and two clusters beside a sphere."""
    generator = torch.Generator().manual_seed(3)
    cube = torch.rand(n, 3, generator=generator, dtype=D)
    a, b, s = (torch.randn(n, 3, generator=generator, dtype=D) for _ in range(3))
    sphere = 0.5 + 0.5 * s / s.norm(dim=1, keepdim=True)
    m = n // 3
    uneven = torch.cat([0.03 * a[:m] + 0.2, 0.05 * b[:m] + 0.8, sphere[: n - 2 * m]])
    return {"cube": cube, "sphere": sphere, "clusters + sphere": uneven}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The answer, and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def space(n: int) -> None:
    """Products in three dimensions."""
    print("\n| points | tol | set-up s | product s | relative error | rank | pairs near, a point |")
    print("|---|---|---|---|---|---|---|")
    for name, x in clouds(n).items():
        for tol in (5e-5, 1e-6) if name == "cube" else (1e-6,):
            A, build = timed(lambda x=x, tol=tol: kernel_matrix(x, "laplace", tol=tol))
            b = torch.randn(n, dtype=D)
            _ = A @ b
            _, product = timed(lambda A=A, b=b: A @ b)
            error = error_estimate(A, x, "laplace")
            rank, near = (
                A.couplings[-1].blocks.shape[-1] // 8,
                sum(B.blocks.numel() for B in A.near),
            )
            print(
                f"| {name} | {tol:.0e} | {build:.1f} | {product:.2f} | {error:.1e} | {rank} | "
                f"{near / n:.0f} |",
                flush=True,
            )


def line(n: int) -> None:
    """Solutions and determinants on a line."""
    print("\n| kernel, scale 0.2, nugget 0.01 | build s | solve s | logdet s | residual |")
    print("|---|---|---|---|---|")
    x, b = torch.rand(n, dtype=D), torch.randn(n, dtype=D)
    for name in ("matern32", "matern52", "gaussian"):
        nugget = mg.DiagonalMatrix(torch.full((n,), 1e-2, dtype=D))
        A, build = timed(
            lambda name=name, d=nugget: kernel_matrix(x, name, scale=0.2, tol=1e-9) + d
        )
        y, solution = timed(lambda A=A: mg.solve(A, b))
        _, determinant = timed(lambda A=A: mg.logdet(A))
        residual = float((A @ y - b).norm() / b.norm())
        print(f"| {name} | {build:.2f} | {solution:.2f} | {determinant:.2f} | {residual:.0e} |")


def cholesky() -> None:
    """The determinant against dense Cholesky factors."""
    print("\n| n | relative difference of logdet from dense Cholesky |\n|---|---|")
    for n in (1024, 4096):
        x = torch.rand(n, dtype=D)
        A = kernel_matrix(x, "matern32", scale=0.2) + mg.DiagonalMatrix(
            torch.full((n,), 1e-2, dtype=D)
        )
        wanted = 2 * torch.linalg.cholesky(A.dense()).diagonal().log().sum()
        print(f"| {n} | {float((mg.logdet(A) - wanted).abs() / wanted.abs()):.0e} |")


def growth() -> None:
    """Numbers and multiply-adds for each point."""
    print("\n| dimension | n | numbers a point | multiply-adds a point | shared numbers |")
    print("|---|---|---|---|---|")
    for d, name, tol in ((2, "coulomb2d", 1e-6), (3, "laplace", 1e-3)):
        for power in (12, 14, 16):
            n = 2**power
            x = torch.rand(n, d, dtype=D)
            A = fast_multipole_matrix(x, x, KERNELS[name], 1.0, tol)
            own = [B for level in A.left for B in level] + list(A.near)
            numbers = sum(B.blocks.numel() for B in own) / n
            shared = sum(B.blocks.numel() for B in (*A.couplings, *A.up))
            print(f"| {d} | 2^{power} | {numbers:.0f} | {mg.cost(A).macs / n:.0f} | {shared} |")


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=100_000)
    n = parser.parse_args().points
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space(n)
    line(n)
    cholesky()
    growth()


if __name__ == "__main__":
    main()
