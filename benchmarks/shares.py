"""What each of several processes spends on a kernel matrix that they share.

    python -m benchmarks.shares [--points 100000] [--tol 1e-4]

prints the table of docs/particles.md: CPU seconds and memory of the process that takes most, of 1/r
in a cube, built by each for its own points alone, and by all of one process beside it.
"""

import argparse
import resource
import tempfile
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist

from matrigami import cost
from matrigami.geometry import distributed_kernel_matrix


def rank(rank: int, count: int, folder: str, n: int, tol: float) -> None:
    """One process: build, multiply twice, say what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{count}", rank=rank, world_size=count)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    before, start = _peak(), time.process_time()
    D = distributed_kernel_matrix(x, "laplace", tol=tol)
    build, start = time.process_time() - start, time.process_time()
    for _ in range(2):
        _ = D @ b
    product = (time.process_time() - start) / 2
    found = torch.tensor([build, product, _peak() - before, cost(D).params / n])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        seconds, each, memory, numbers = found.tolist()
        print(
            f"| {count} | {seconds:.1f} | {each:.2f} | {memory:.0f} | {numbers:.0f} |", flush=True
        )
    dist.destroy_process_group()


def _peak() -> float:
    """The most memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--tol", type=float, default=1e-4)
    options = parser.parse_args()
    print("| processes | build, CPU s | product, CPU s | memory, MiB | numbers a point |")
    print("|--:|--:|--:|--:|--:|")
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, str(Path(folder)), options.points, options.tol)
            ranks = [SpawnProcess(target=rank, args=(r, *arguments)) for r in range(count)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()


if __name__ == "__main__":
    main()
