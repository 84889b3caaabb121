"""Potentials of points that several processes share.

    torchrun --nproc-per-node 2 docs/examples/particles/processes.py

Each process computes the blocks in the rows of its own points; the answer is that of one process.
"""

import torch
import torch.distributed as dist

from matrigami import cost
from matrigami.geometry import distributed_kernel_matrix
from matrigami.geometry.particles import kernel_matrix


def main(n: int = 20_000) -> None:
    """Share a matrix, and say how, and how far products differ from those of one process."""
    points = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    D = distributed_kernel_matrix(points, "coulomb2d", tol=1e-6)  # own blocks
    A = kernel_matrix(points, "coulomb2d", tol=1e-6)  # all of them, to compare with
    charges = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    potential = D @ charges  # whole, and equal on all
    error = float((potential - A @ charges).norm() / potential.norm())
    own = len(D.rows.own.index)
    part = D.local @ charges[D.columns.own.index]  # own points only
    same = torch.allclose(part, potential[D.rows.own.index])
    print(
        f"process {dist.get_rank()}: {own} of {n} points, {cost(D).params / cost(A).params:.0%} "
        f"of the numbers, difference below 1e-12: {error < 1e-12}, own part equal: {same}"
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
