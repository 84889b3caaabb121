"""A worker: takes the runs of a study from the file system, one by one or several side by side.

A run is the folder `OUT/runs/<id>/` with `config.json`, `status.json`, `metrics.jsonl` and `ckpt/`.
"""

import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matrigami.studies._accelerator import prepare
from matrigami.studies._config import RunConfig
from matrigami.studies._lock import hold
from matrigami.studies._record import read_json, write_atomic, write_json
from matrigami.studies._signals import obeyed
from matrigami.studies._stacked import Stack, alike
from matrigami.studies._together import SharedTask, data, in_turns
from matrigami.studies._train import Interrupted, Training, training
from matrigami.studies.tasks import Task, load_task

FINISHED = ("done", "failed")
"""A run in these states is not trained again: it ended, or its loss would diverge as before."""

STATES = (*FINISHED, "queued", "running", "interrupted", "crashed")
"""What a run can be."""

UNFINISHED = ("queued", "running", "interrupted")
"""A run in these states is trained."""

ATTEMPTS = 2
"""How often a run may take its worker down with it (out of memory, a crash below Python)."""

STOP = "stop"
"""A file in the folder of a study: workers of other machines write their checkpoints and end."""

DAMAGED = "its status.json is damaged; `study run` looks at its checkpoint"
"""Why a run that was begun is queued."""

_STATUS_SECONDS = 1.0


Train = Callable[..., Training]
"""Trains or resumes one run step by step: the signature of `training`."""


@dataclass(frozen=True)
class Job:
    """What a worker is to do: all runs of a study, in the order in which to try them."""

    out: Path
    configs: tuple[RunConfig, ...]
    data_dir: Path | None = None
    device: str = "cpu"
    threads: int = 1
    together: int = 1


def run_folder(out: Path, config: RunConfig) -> Path:
    """Where a run keeps its files."""
    return out / "runs" / config.id


def read_status(out: Path, config: RunConfig) -> dict[str, Any]:
    """State of a run; `queued` if it was never begun, or if its file is damaged.

    Nothing is lost by that: the run goes on from its checkpoint, and a finished one is known by it.
    """
    queued: dict[str, Any] = {"status": "queued", "fraction": 0.0}
    try:
        state = read_json(run_folder(out, config) / "status.json")
    except ValueError:
        state = {}
    if state is None:
        return queued
    return state if _is_whole(state) else queued | {"cause": DAMAGED}


def _is_whole(state: Mapping[str, Any]) -> bool:
    """Whether a state has what its kind needs."""
    fraction, kind = state.get("fraction"), state.get("status")
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 1 or kind not in STATES:
        return False
    if kind not in FINISHED:
        return True
    record = state.get("record")
    return isinstance(record, dict) and {"status", "macs", "train_error"} <= set(record)


def write_status(out: Path, config: RunConfig, status: str, **more: Any) -> None:
    """Replace the state of a run."""
    write_json(
        run_folder(out, config) / "status.json",
        {"status": status, "pid": os.getpid(), "time": time.time(), **more},
    )


def work(job: Job, stop: Callable[[], bool], train: Train = training) -> None:
    """Train every run that is neither finished nor in other hands, unless `stop()`."""
    torch.set_num_threads(job.threads)
    prepare(job.device)
    waiting = list(job.configs)
    while waiting and not stop():
        with ExitStack() as locks:
            taken = _take(job, waiting, locks)
            tasks = _Tasks(job, taken)
            in_turns([_attempt(job, config, stop, train, tasks) for config in taken])


def _take(job: Job, waiting: list[RunConfig], locks: ExitStack) -> list[RunConfig]:
    """Runs to train now, side by side if they see the same data; takes them off the list.

    A run that has taken its worker down is tried again alone.
    """
    taken: list[RunConfig] = []
    alone = False
    for config in tuple(waiting):
        if len(taken) == job.together or alone:
            break
        if taken and (data(config) != data(taken[0]) or _fell(job, config)):
            continue
        waiting.remove(config)
        held = locks.enter_context(hold(run_folder(job.out, config)))
        if held and read_status(job.out, config)["status"] in UNFINISHED:
            taken.append(config)
            alone = _fell(job, config)
    return taken


def _fell(job: Job, config: RunConfig) -> bool:
    """Whether a run was in a worker that died."""
    return int(read_status(job.out, config).get("attempts", 0)) > 0


class _Tasks:
    """The task of runs that see the same data, loaded once; those of one seed share its batches."""

    def __init__(self, job: Job, taken: Sequence[RunConfig]) -> None:
        self.job = job
        self.task: Task | None = None
        self.shared: dict[int, Task] = {}
        counts = Counter(map(alike, taken))
        self.stacks = {kind: Stack() for kind, count in counts.items() if count > 1}

    def of(self, config: RunConfig) -> Task:
        """The task of one run."""
        self.task = self.task or load_task(config, self.job.data_dir, self.job.device)
        if self.job.together == 1:
            return self.task
        return self.shared.setdefault(config.seed, SharedTask(self.task))

    def stack(self, config: RunConfig) -> Stack | None:
        """The runs that are one batch with a run."""
        return self.stacks.get(alike(config))


def _attempt(
    job: Job, config: RunConfig, stop: Callable[[], bool], train: Train, tasks: _Tasks
) -> Iterator[tuple[int, int]]:
    """One run, step by step; whatever happens in it ends in its `status.json`."""
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
        record = yield from train(
            config,
            folder,
            task=tasks.of(config),
            device=job.device,
            progress=progress,
            stop=stop,
            shared=job.together > 1,
            stack=tasks.stack(config),
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
    for number in obeyed():
        signal.signal(number, ask)
    work(job, lambda: asked or stop_event.is_set() or os.getppid() != parent)


def asked_by_file(out: Path) -> Callable[[], bool]:
    """Whether the file `STOP` is in a folder, looked for once a second."""
    seen, last = False, 0.0

    def asked() -> bool:
        nonlocal seen, last
        if not seen and time.monotonic() - last >= _STATUS_SECONDS:
            last = time.monotonic()
            seen = (out / STOP).exists()
        return seen

    return asked
