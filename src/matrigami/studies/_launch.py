"""Where the workers of a study run, and one loop that keeps them at work.

A launcher starts workers and says which have ended: processes of this machine here, jobs of Slurm
and tasks of Ray in files of their own; the table is in `_launchers`. What is done and what is left
is in the folder of the study, which every worker sees, so that a worker, its machine, or this
process may be lost at any time.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from matrigami.studies._lock import hold
from matrigami.studies._worker import (
    ATTEMPTS,
    FINISHED,
    STOP,
    Job,
    main,
    read_status,
    run_folder,
    write_status,
)
from matrigami.studies.tasks._datasets import data_folder

_POLL_SECONDS = 0.5

EMPTY_HANDS = 4
"""How many workers in a row may die without a run in their hands and get a successor."""


class Ended(NamedTuple):
    """A worker that has ended.

    Attributes:
        job: What it was to do.
        cause: What killed it; None if it came to its end.
        own: Whether its run may be to blame; false if its machine was lost.
    """

    job: Job
    cause: str | None = None
    own: bool = True


@runtime_checkable
class Launcher(Protocol):
    """Where workers run."""

    def parts(self, job: Job, workers: int | None) -> list[Job]:
        """What each worker is to do."""
        ...

    def start(self, job: Job) -> None:
        """Start a worker."""
        ...

    def ended(self) -> list[Ended]:
        """The workers that ended since this was last asked."""
        ...

    def stop(self) -> None:
        """Ask all workers to write a checkpoint and end."""
        ...

    def close(self) -> None:
        """End the workers that are left."""
        ...


def supervise(
    job: Job,
    launcher: Launcher,
    workers: int | None,
    asked: threading.Event,
    report: Callable[[], None],
) -> None:
    """Keep workers at work until all have ended, and put another in the place of one that dies.

    Args:
        job: All runs.
        launcher: Where workers run.
        workers: How many at a time; None for as many as the launcher has parts.
        asked: Whether to stop.
        report: Called twice a second.

    Raises:
        ValueError: If workers die before they take a run, one after the other.
    """
    waiting, alive = launcher.parts(job, workers), 0
    replacement = Replacement()
    try:
        while waiting or alive:
            if asked.is_set():
                waiting = []
                launcher.stop()
            while waiting and (workers is None or alive < workers):
                launcher.start(waiting.pop(0))
                alive += 1
            time.sleep(_POLL_SECONDS)
            ended = launcher.ended()
            alive -= len(ended)
            waiting += [end.job for end in ended if replacement.due(end)]
            report()
    finally:
        launcher.close()
    if not asked.is_set():
        replacement.check(job)


class Replacement:
    """Whether a worker that died gets a successor.

    A run is tried a number of times; of workers that die without one, a number in a row.
    """

    def __init__(self) -> None:
        self.empty_handed: list[Ended] = []
        self.left = 0

    def due(self, end: Ended) -> bool:
        """Whether another is to be put in the place of this one."""
        if not end.cause:
            return False
        if bury(end) or not end.own:
            return True
        left = unfinished(end.job)
        if left < self.left:
            self.empty_handed.clear()
        self.left = left
        self.empty_handed.append(end)
        return left > 0 and len(self.empty_handed) <= EMPTY_HANDS

    def check(self, job: Job) -> None:
        """Say so if nobody is left to train.

        Raises:
            ValueError: If runs are left that no worker lived to take.
        """
        if len(self.empty_handed) <= EMPTY_HANDS or not unfinished(job):
            return
        raise ValueError(
            f"Study in {job.out}: {len(self.empty_handed)} workers died before they took a run; "
            f"{unfinished(job)} runs are left.\nThe last: {self.empty_handed[-1].cause}.\n"
            "What was trained is kept. Try fewer --workers, and the same command again."
        )


def bury(end: Ended) -> int:
    """Runs that a worker left behind: queued again, or given up after some attempts; how many.

    A run that is under way and in nobody's hands was in those of a worker that died.
    """
    lost = 0
    for config in end.job.configs:
        state = read_status(end.job.out, config)
        if state["status"] != "running":
            continue
        with hold(run_folder(end.job.out, config)) as free:
            if not free:
                continue
            lost += 1
            attempts = int(state.get("attempts", 0)) + end.own
            status = "queued" if attempts < ATTEMPTS else "crashed"
            more = {"fraction": state["fraction"], "attempts": attempts}
            if status == "crashed":
                more = {"fraction": 1.0, "cause": end.cause}
            write_status(end.job.out, config, status, **more)
    return lost


@dataclass(frozen=True)
class Place:
    """What a launcher needs to know: the folder of the study, and what a worker takes."""

    out: Path
    threads: int = 1
    device: str = "cpu"


class Processes:
    """Workers that are processes of this machine."""

    def __init__(self, _place: Place) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.asked = self.context.Event()
        self.alive: dict[BaseProcess, Job] = {}

    def parts(self, job: Job, workers: int | None) -> list[Job]:
        """Everything for each; they share it through the folder."""
        return [job] * min(workers or 1, unfinished(job))

    def start(self, job: Job) -> None:
        """Start a process."""
        process = self.context.Process(target=main, args=(job, self.asked, os.getpid()))
        process.start()
        self.alive[process] = job

    def ended(self) -> list[Ended]:
        """The processes that ended."""
        dead = [process for process in self.alive if not process.is_alive()]
        return [Ended(self.alive.pop(process), _cause(process.exitcode)) for process in dead]

    def stop(self) -> None:
        """Set the event that they ask."""
        self.asked.set()

    def close(self) -> None:
        """Kill those that are left."""
        for process in self.alive:
            process.kill()


def _cause(code: int | None) -> str | None:
    """What an exit code says."""
    return f"its process ended with code {code} (-9 is often lack of memory)" if code else None


def unfinished(job: Job) -> int:
    """Runs without a result."""
    ended = (*FINISHED, "crashed")
    return sum(read_status(job.out, config)["status"] not in ended for config in job.configs)


def for_elsewhere(job: Job) -> Job:
    """A job whose paths hold in other working directories and environments."""
    return replace(job, out=job.out.resolve(), data_dir=data_folder(job.data_dir).resolve())


def ask_to_stop(out: Path, *, stop: bool) -> None:
    """Put up the file that workers of other machines look for, or take it away."""
    if stop:
        (out / STOP).touch()
    else:
        (out / STOP).unlink(missing_ok=True)
