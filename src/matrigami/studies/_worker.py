"""A worker: takes the runs of a study one by one from the file system and trains them.

A run is the folder `OUT/runs/<id>/` with `config.json`, `status.json`, `metrics.jsonl` and `ckpt/`.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matrigami.studies._config import RunConfig
from matrigami.studies._lock import hold
from matrigami.studies._record import Record, read_json, write_atomic, write_json
from matrigami.studies._train import Interrupted, train_run

FINISHED = ("done", "failed")
"""A run in these states is not trained again: it ended, or its loss would diverge as before."""

ATTEMPTS = 2
"""How often a run may take its worker down with it (out of memory, a crash below Python)."""

_STATUS_SECONDS = 1.0


Train = Callable[..., Record]
"""Trains or resumes one run: the signature of `train_run`."""


@dataclass(frozen=True)
class Job:
    """What a worker is to do: all runs of a study, in the order in which to try them."""

    out: Path
    configs: tuple[RunConfig, ...]
    data_dir: Path | None = None
    device: str = "cpu"
    threads: int = 1


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a run keeps its files."""
    return out / "runs" / config.id


def read_status(out: Path, config: RunConfig) -> dict[str, Any]:
    """State of a run; `queued` if it was never begun."""
    return read_json(run_folder(out, config) / "status.json") or {
        "status": "queued",
        "fraction": 0.0,
    }


def write_status(out: Path, config: RunConfig, status: str, **more: Any) -> None:
    """Replace the state of a run."""
    write_json(
        run_folder(out, config) / "status.json",
        {"status": status, "pid": os.getpid(), "time": time.time(), **more},
    )


def work(job: Job, stop: Callable[[], bool], train: Train = train_run) -> None:
    """Train every run that is neither finished nor in other hands, unless `stop()`."""
    torch.set_num_threads(job.threads)
    for config in job.configs:
        if stop():
            return
        with hold(run_folder(job.out, config)) as held:
            if held and read_status(job.out, config)["status"] in (
                "queued",
                "running",
                "interrupted",
            ):
                _train_one(job, config, stop, train)


def _train_one(job: Job, config: RunConfig, stop: Callable[[], bool], train: Train) -> None:
    """One run; whatever happens in it ends in its `status.json`."""
    folder, before = run_folder(job.out, config), read_status(job.out, config)
    attempts = int(before.get("attempts", 0))
    last = 0.0

    def progress(fraction: float, info: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= _STATUS_SECONDS:
            last = time.monotonic()
            write_status(
                job.out, config, "running", fraction=fraction, attempts=attempts, info=dict(info)
            )

    write_status(
        job.out, config, "running", fraction=before.get("fraction", 0.0), attempts=attempts
    )
    try:
        record = train(
            config, folder, data_dir=job.data_dir, device=job.device, progress=progress, stop=stop
        )
    except Interrupted:
        fraction = read_status(job.out, config).get("fraction", 0.0)
        write_status(job.out, config, "interrupted", fraction=fraction, attempts=attempts)
    except Exception as error:
        write_atomic(folder / "error.txt", traceback.format_exc())
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        write_status(job.out, config, "crashed", fraction=1.0, cause=cause)
    else:
        status = "failed" if record.get("status") == "failed" else "done"
        write_status(job.out, config, status, fraction=1.0, record={**record, "id": config.id})


def main(job: Job, stop_event: Any, parent: int) -> None:
    """Body of a worker process; ends early when asked, or when its parent is gone."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, ask)
    work(job, lambda: asked or stop_event.is_set() or os.getppid() != parent)
