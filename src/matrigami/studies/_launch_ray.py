"""Workers that are tasks of Ray: one for each run, or for some that are trained side by side.

A task is idempotent: it finds the state of its run in the folder of the study, which all nodes see.
One whose node is lost is submitted again and goes on from the last checkpoint.
"""

import os
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from matrigami.studies._config import RunConfig
from matrigami.studies._launch import Ended, Place, ask_to_stop, for_elsewhere, unfinished
from matrigami.studies._together import data
from matrigami.studies._worker import UNFINISHED, Job, asked_by_file, read_status, work

NODE_LOST = ("NodeDiedError", "LocalRayletDiedError", "RaySystemError")
"""Errors that are not the fault of a run."""

SECONDS_TO_ANSWER = 5.0
"""How long a cluster may take."""

SECONDS = 1.0
"""Between looks at a run that another process has; that of a lost node may last a moment longer."""


def body(job: Job) -> None:
    """What a task does: train its runs, and wait for those that are still in other hands."""
    if not job.out.is_dir():
        raise FileNotFoundError(f"{job.out} is not on this node")
    stop = asked_by_file(job.out)
    work(job, stop)
    while unfinished(job) and not stop():
        time.sleep(SECONDS)
        work(job, stop)


def _knock(address: str) -> None:
    """See whether somebody listens at `host:port`: Ray itself would try for minutes, and exit.

    Raises:
        OSError: If nobody does.
    """
    given = address
    if address == "auto":  # where Ray looks, which may be left over from a cluster that is gone
        note = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")
        given = os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.exists() else "")
    host, _, port = given.rpartition(":")
    if port.isdecimal() and "://" not in given:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


class Ray:
    """Workers that are tasks.

    Args:
        place: Folder of the study, and what a worker takes.
        address: Of the cluster; `auto` for the one of this machine or of RAY_ADDRESS, `local` for
            one that is started here for the time of the study.

    Raises:
        ValueError: If there is no cluster.
    """

    def __init__(self, place: Place, address: str = "auto") -> None:
        import ray  # noqa: PLC0415 - an extra  # pyright: ignore[reportMissingImports]

        self.ray: Any = ray
        self.out = place.out
        self.joined = not ray.is_initialized()
        try:
            if self.joined:
                _knock(address)
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, OSError) as error:
            raise ValueError(
                f"Launcher ray(address={address!r}): "
                f"there is no cluster: {str(error).splitlines()[0]}\n"
                "Start one with `ray start --head`, or use ray(address=local)."
            ) from error
        options = {"num_cpus": place.threads, "num_gpus": int(place.device != "cpu")}
        self.task = ray.remote(max_retries=0, **options)(body)
        self.tasks: dict[Any, Job] = {}
        ask_to_stop(self.out, stop=False)

    def parts(self, job: Job, workers: int | None) -> list[Job]:  # noqa: ARG002 - one signature
        """Runs that see the same data, as many as are trained side by side."""
        job = for_elsewhere(job)
        groups: dict[object, list[RunConfig]] = {}
        for config in job.configs:
            if read_status(job.out, config)["status"] in UNFINISHED:
                groups.setdefault(data(config), []).append(config)
        return [
            replace(job, configs=tuple(group[i : i + job.together]))
            for group in groups.values()
            for i in range(0, len(group), job.together)
        ]

    def start(self, job: Job) -> None:
        """Submit a task."""
        self.tasks[self.task.remote(job)] = job

    def ended(self) -> list[Ended]:
        """The tasks that ended."""
        tasks = list(self.tasks)
        done = self.ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else []
        return [self._end(ref, self.tasks.pop(ref)) for ref in done]

    def _end(self, ref: Any, job: Job) -> Ended:
        """How a task ended."""
        exceptions = self.ray.exceptions
        try:
            self.ray.get(ref)
        except exceptions.RayTaskError as error:
            raise ValueError(
                f"A task of the study in {self.out} failed.\n"
                f"{str(error).strip().splitlines()[-1]}\n"
                "All nodes must see the folders of the study and of the data, and have matrigami."
            ) from error
        except exceptions.RayError as error:
            kind = type(error).__name__
            return Ended(job, f"its task ended: {kind}", own=kind not in NODE_LOST)
        return Ended(job)

    def stop(self) -> None:
        """Put up the file that they look for."""
        ask_to_stop(self.out, stop=True)

    def close(self) -> None:
        """Cancel those that are left, and leave the cluster."""
        for ref in self.tasks:
            self.ray.cancel(ref, force=True)
        ask_to_stop(self.out, stop=False)
        if self.joined:
            self.ray.shutdown()
