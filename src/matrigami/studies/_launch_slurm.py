"""Workers that are jobs of Slurm, by submitit.

Every job trains runs until none is left. One that is preempted or out of time is put into the queue
again by submitit, and its runs go on from their checkpoints.
"""

import shutil
from typing import Any

from matrigami.studies._launch import Ended, Place, ask_to_stop, for_elsewhere, unfinished
from matrigami.studies._worker import Job, asked_by_file, work

LOST = ("NODE_FAIL", "PREEMPTED", "TIMEOUT", "BOOT_FAIL")
"""States of a job that are not the fault of its run."""

MINUTES = 24 * 60
"""Time limit of a job by default."""


class Body:
    """What a job does."""

    def __call__(self, job: Job) -> None:
        """Train what is left."""
        work(job, asked_by_file(job.out))

    def checkpoint(self, job: Job) -> Any:
        """Out of time: the same again."""
        from submitit.helpers import (  # noqa: PLC0415 - an extra  # pyright: ignore[reportMissingImports]
            DelayedSubmission,
        )

        return DelayedSubmission(self, job)


class Slurm:
    """Workers that are jobs.

    Args:
        place: Folder of the study, and what a worker takes.
        cluster: `slurm`, or `local` for processes that submitit starts here.
        timeout_min: Time limit of a job, in minutes.
        parameters: Others of submitit's executor, such as `slurm_partition="gpu"`.

    Raises:
        ValueError: If this machine cannot submit jobs, or a parameter is unknown.
    """

    def __init__(
        self, place: Place, cluster: str = "slurm", timeout_min: int = MINUTES, **parameters: Any
    ) -> None:
        import submitit  # noqa: PLC0415 - an extra  # pyright: ignore[reportMissingImports]

        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "Launcher 'slurm': there is no command sbatch on this machine.\n"
                "Call it on a login node of the cluster, or leave --launcher out."
            )
        self.out = place.out
        self.executor = submitit.AutoExecutor(place.out.resolve() / "slurm", cluster=cluster)
        gpus = {} if place.device == "cpu" else {"gpus_per_node": 1}
        try:
            self.executor.update_parameters(
                name="matrigami",
                cpus_per_task=place.threads,
                timeout_min=timeout_min,
                **gpus,
                **parameters,
            )
        except NameError as error:
            raise TypeError(str(error)) from error
        self.failed: type[Exception] = submitit.core.utils.FailedJobError
        self.jobs: dict[Any, Job] = {}
        ask_to_stop(self.out, stop=False)

    def parts(self, job: Job, workers: int | None) -> list[Job]:
        """Everything for each; they share it through the folder."""
        return [for_elsewhere(job)] * min(workers or 1, unfinished(job))

    def start(self, job: Job) -> None:
        """Submit a job."""
        self.jobs[self.executor.submit(Body(), job)] = job

    def ended(self) -> list[Ended]:
        """The jobs that ended."""
        done = [job for job in self.jobs if job.done()]
        return [self._end(job, self.jobs.pop(job)) for job in done]

    def _end(self, job: Any, own: Job) -> Ended:
        """How a job ended."""
        error = job.exception()
        if isinstance(error, self.failed):
            last = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"Job {job.job_id} of the study in {self.out} failed.\n{last}\n"
                f"Its output is in {job.paths.stderr}."
            ) from error
        cause = error and f"its job {job.job_id} ended as {job.state}"
        return Ended(own, cause, own=job.state not in LOST)

    def stop(self) -> None:
        """Put up the file that they look for; what waits in the queue does not begin."""
        ask_to_stop(self.out, stop=True)

    def close(self) -> None:
        """Cancel those that are left."""
        for job in self.jobs:
            job.cancel(check=False)
        ask_to_stop(self.out, stop=False)
