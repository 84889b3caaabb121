"""Several processes on one machine, in a fraction of a second.

They are forked from a server that has imported everything and run nothing: the process of the tests
may have threads, which do not survive a fork.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "conftest",  # the run-time checks of annotations come before the package
        "matrigami.optim.distributed._owners",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "tests.optim.distributed_cases",
    ]
)


def _is_late(process: BaseProcess) -> bool:
    """Wait for a rank; whether it had to be ended."""
    process.join(100)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    return late


def on_ranks(count: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module on some ranks; raise with the tracebacks of those that fail."""
    folder = folder / f"{function.__name__}-{count}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    ranks = [
        context.Process(target=_rank, args=(r, count, folder, function, arguments))
        for r in range(count)
    ]
    for process in ranks:
        process.start()
    late = [r for r, process in enumerate(ranks) if _is_late(process)]
    told = "\n".join(path.read_text() for path in sorted(folder.glob("rank*")))
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * count, f"late: {late}, exit codes: {codes}\n{told}"


def _rank(
    rank: int, count: int, folder: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One process; how it ends is its exit code, and its traceback is a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    code = 1
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"rank{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
    os._exit(code)
