"""Running a study: worker processes that share the runs through the file system."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matrigami.studies._config import RunConfig
from matrigami.studies._earlier import earlier
from matrigami.studies._environment import environment
from matrigami.studies._launch import Place, supervise
from matrigami.studies._launchers import is_here, launcher_of
from matrigami.studies._lock import hold, is_held
from matrigami.studies._progress import OVERHEAD_MACS, Clock, Snapshot, best_of
from matrigami.studies._record import Record, damaged, read_json, write_json, write_results
from matrigami.studies._signals import stop_signals
from matrigami.studies._size import RunSize, check_data, check_memory, run_size, task_size
from matrigami.studies._spec import Study
from matrigami.studies._together import data
from matrigami.studies._worker import (
    FINISHED,
    Job,
    read_status,
    run_folder,
    write_status,
)
from matrigami.studies.tasks import Shape

ON_ACCELERATOR = 64
"""Runs that a process trains side by side on an accelerator, which small networks do not fill."""


@dataclass(frozen=True)
class Outcome:
    """What a study left: a record of each run that ended, and how many ended how or not."""

    records: tuple[Record, ...]
    total: int
    failed: int
    crashed: int
    left: int
    interrupted: bool


@dataclass(frozen=True)
class StudyPlan:
    """The runs of a study, biggest first, with their sizes."""

    name: str
    configs: tuple[RunConfig, ...]
    sizes: Mapping[str, RunSize]

    @property
    def work(self) -> dict[str, float]:
        """Multiply-adds of each run, with what an example costs besides the model."""
        return {
            run: size.examples * (size.macs + OVERHEAD_MACS) for run, size in self.sizes.items()
        }


def plan_study(study: Study, data_dir: Path | None = None) -> StudyPlan:
    """Build every model once, to know its size and that it can be built.

    Args:
        study: The study.
        data_dir: Folder of the data sets, for tasks whose size is not known without them.

    Raises:
        ValueError: If a structure does not fit a width, or data are missing.
    """
    known: dict[RunConfig, RunSize] = {}
    tasks: dict[tuple[Any, ...], tuple[Shape, int]] = {}
    sizes = {}
    for config in study.configs:
        key = replace(config, seed=0)  # the seed does not change the size
        task = tasks[data(config)] = tasks.get(data(config)) or task_size(config, data_dir)
        known[key] = sizes[config.id] = known.get(key) or run_size(config, task=task)
    plan = StudyPlan(study.name, study.configs, sizes)
    work = plan.work
    return StudyPlan(study.name, tuple(sorted(study.configs, key=lambda c: -work[c.id])), sizes)


def default_workers() -> int:
    """One process of one thread for each core that this process may use."""
    cores = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return max(1, len(list(cores)))


def run_study(
    plan: StudyPlan,
    out: Path,
    *,
    part: StudyPlan | None = None,
    workers: int | None = None,
    threads: int | None = None,
    together: int | None = None,
    device: str = "cpu",
    data_dir: Path | None = None,
    grow: bool = False,
    launcher: str = "processes",
    report: Callable[[Snapshot], None] = lambda _: None,
) -> Outcome:
    """Train what a study lacks, and write `results.csv`.

    Runs that ended are not repeated, be it that the folder has only their rows in `results.csv`;
    interrupted ones go on from their last checkpoint; several calls on a folder share the work.
    SIGINT and SIGTERM make the workers write a checkpoint and end; a second SIGINT kills them.

    Args:
        plan: From `plan_study`.
        out: Folder of the study; made if absent.
        part: The runs of the plan to train now; all by default.
        workers: Number of processes; by default one for each core (an accelerator: 1). Of jobs of
            Slurm, by default 1; of tasks of Ray at a time, by default as many as there are.
        threads: Threads of each process; by default the cores shared out (elsewhere: 1).
        together: Runs of one task that a process trains side by side; by default 1 (an accelerator:
            64), so that their seconds are those of a run alone.
        device: Where to train.
        data_dir: Folder of the data sets.
        grow: Keep the runs of another study that the folder holds, beside those of the plan.
        launcher: Where workers run: `processes` of this machine, `slurm` or `ray`, with options
            such as `slurm(timeout_min=600)`.
        report: Called twice a second with the state.

    Returns:
        The records of all runs of the plan that ended, also in earlier calls.

    Raises:
        ValueError: If a number is out of range, data are missing, the folder holds runs of another
            study and `grow` is false, it cannot be written, or the cluster is not there.
    """
    workers, threads = _shares(workers, threads, device, here=is_here(launcher))
    together = _together(together, device)
    part, plan = part or plan, grown(plan, out, grow)
    known = earlier(out, plan.sizes)
    check_sizes(part, device, launcher)
    check_data(_left(part, out, known), data_dir)
    where = launcher_of(launcher, Place(out, threads, device))
    prepare(plan, out, known)
    write_json(out / "env.json", environment(device, workers, threads))
    job = Job(out, part.configs, data_dir, device, threads, together)
    clock = Clock(part.work, _fractions(part, out), time.monotonic())
    with stop_signals() as asked:
        supervise(job, where, workers, asked, lambda: report(snapshot(part, out, clock)))
    outcome = collect(part, out, interrupted=asked.is_set())
    outcome = replace(outcome, records=collect(plan, out).records)
    write_results(out / "results.csv", outcome.records)
    return outcome


def _left(plan: StudyPlan, out: Path, known: Mapping[str, Record]) -> list[RunConfig]:
    """The runs that need their data."""
    states = [config for config in plan.configs if config.id not in known]
    return [config for config in states if not _ended(read_status(out, config))]


def check_sizes(plan: StudyPlan, device: str = "cpu", launcher: str = "processes") -> None:
    """Refuse a study of which a run would not fit into the memory; that elsewhere is not known.

    Raises:
        ValueError: If there is such a run.
    """
    for config in plan.configs if is_here(launcher) else ():
        check_memory(config, plan.sizes[config.id], device)


def grown(plan: StudyPlan, out: Path, grow: bool) -> StudyPlan:
    """A plan with the runs of another study that is in the folder.

    Raises:
        ValueError: If there are such runs and `grow` is false.
    """
    if read_json(out / "study.json") is None:
        return plan
    there = load_plan(out)
    others = strangers(plan, there)
    if others and not grow:
        raise ValueError(
            f"--out {out}, for study {plan.name!r}: it holds {there.name!r}.\n"
            f"{len(others)} of its {len(there.configs)} runs are no "
            "part of this study.\n"
            "Give --out a folder of its own; `matrigami study run` has --grow for all runs in one."
        )
    sizes = {**there.sizes, **plan.sizes}
    return StudyPlan(plan.name, (*plan.configs, *others), sizes)


def strangers(plan: StudyPlan, there: StudyPlan) -> list[RunConfig]:
    """Runs of the study in a folder that are no part of a plan."""
    return [config for config in there.configs if config.id not in plan.sizes]


def prepare(plan: StudyPlan, out: Path, known: Mapping[str, Record] | None = None) -> None:
    """Make the folders; queue anew what crashed or was running when its process was killed.

    Args:
        plan: The study.
        out: Its folder.
        known: Records of runs that ended elsewhere; see `earlier`.

    Raises:
        ValueError: If the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for config in plan.configs:
            folder = run_folder(out, config)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "config.json").exists():
                write_json(folder / "config.json", config.to_json())
            if record := (known or {}).get(config.id):
                write_status(out, config, record["status"], fraction=1.0, record=record)
            _requeue(out, config)
        runs = [{"config": c.to_json(), "size": plan.sizes[c.id]._asdict()} for c in plan.configs]
        write_json(out / "study.json", {"name": plan.name, "runs": runs})
    except OSError as error:
        raise ValueError(
            f"--out {out}: it cannot be written: {error.strerror} ({error.filename}).\n"
            "Give --out a folder that you may write to, on a disk with space."
        ) from error


def collect(plan: StudyPlan, out: Path, *, interrupted: bool = False) -> Outcome:
    """The records of the runs that ended."""
    states = {config.id: (config, read_status(out, config)) for config in plan.configs}
    records = [
        _record(config, state, plan.sizes[config.id])
        for config, state in states.values()
        if _ended(state)
    ]
    kinds = [state["status"] for _, state in states.values()]
    failed, crashed = kinds.count("failed"), kinds.count("crashed")
    left = len(kinds) - len(records)
    return Outcome(tuple(records), len(kinds), failed, crashed, left, interrupted)


def snapshot(plan: StudyPlan, out: Path, clock: Clock) -> Snapshot:
    """The state now."""
    states = {config.id: read_status(out, config) for config in plan.configs}
    kinds = [state["status"] for state in states.values()]
    ended = [state["record"] for state in states.values() if state["status"] == "done"]
    failed = kinds.count("failed") + kinds.count("crashed")
    eta = clock.remaining(
        {run: float(state["fraction"]) for run, state in states.items()}, time.monotonic()
    )
    return Snapshot(
        len(kinds), len(ended) + failed, failed, kinds.count("running"), eta, best_of(ended)
    )


def load_plan(out: Path) -> StudyPlan:
    """The plan of a study folder, as its last `run_study` wrote it.

    Raises:
        ValueError: If the folder holds no study.
    """
    stored = read_json(out / "study.json")
    if stored is None:
        raise ValueError(
            f"study in {out}: the folder has no study.json.\n"
            f"Run `matrigami study run` with --out {out} first."
        )
    try:
        configs = tuple(RunConfig.from_json(run["config"]) for run in stored["runs"])
        sizes = [RunSize(**run["size"]) for run in stored["runs"]]
        name = str(stored["name"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(out / "study.json", f"an entry is missing or wrong ({error})") from error
    return StudyPlan(name, configs, {c.id: size for c, size in zip(configs, sizes, strict=True)})


def update_results(out: Path) -> None:
    """Write `results.csv` anew from the folders of the runs; without these, leave it as it is.

    So fits and figures can be had while a study runs, and after it was killed.
    """
    if (out / "study.json").exists() and (out / "runs").is_dir():
        write_results(out / "results.csv", collect(load_plan(out), out).records)


def run_states(plan: StudyPlan, out: Path) -> list[dict[str, Any]]:
    """The state of each run: what it is, `macs`, `status`, `fraction` done, `cause` of an end."""
    states = []
    for c in plan.configs:
        state = read_status(out, c)
        status = (
            "interrupted"
            if state["status"] == "running" and not is_held(run_folder(out, c))
            else state["status"]
        )
        cause = state.get("cause") or state.get("record", {}).get("cause")
        states.append(
            c.summary
            | {
                "macs": plan.sizes[c.id].macs,
                "status": status,
                "fraction": state["fraction"],
                "cause": cause,
            }
        )
    return states


def _shares(
    workers: int | None, threads: int | None, device: str, *, here: bool
) -> tuple[int | None, int]:
    """Processes, and threads of each; elsewhere the launcher says how many workers there are."""
    for name, value in (("workers", workers), ("threads", threads)):
        _at_least_one(name, value)
    if not here:
        return workers, threads or 1
    cores = default_workers()
    if workers is None:
        workers = 1 if device != "cpu" else max(1, cores // (threads or 1))
    return workers, threads or max(1, cores // workers)


def _together(together: int | None, device: str) -> int:
    """Runs of a process side by side."""
    _at_least_one("together", together)
    return together or (1 if device == "cpu" else ON_ACCELERATOR)


def _at_least_one(name: str, value: int | None) -> None:
    """Refuse a count below 1."""
    if value is not None and value < 1:
        raise ValueError(
            f"study run, {name} = {value}: at least 1 is needed.\nLeave it out for the default."
        )


def _requeue(out: Path, config: RunConfig) -> None:
    """A run that crashed gets another chance; one that was cut short keeps its checkpoint."""
    state = read_status(out, config)
    if state["status"] in ("crashed", "running") and not is_held(run_folder(out, config)):
        with hold(run_folder(out, config)) as held:
            if held:
                fraction = state.get("fraction", 0.0) if state["status"] == "running" else 0.0
                write_status(out, config, "queued", fraction=fraction)


def _record(config: RunConfig, state: Mapping[str, Any], size: RunSize) -> Record:
    """The record of a run that ended; one that crashed has its configuration and its cause."""
    known = {
        key: value
        for key, value in config.to_json().items()
        if key in ("dataset", "model", "structure", "width", "seed", "lr")
        or (key == "optimizer" and value != "adamw")
    }
    base = known | {
        "id": config.id,
        "structure": config.label,
        "params": size.params,
        "macs": size.macs,
    }
    if state["status"] == "crashed":
        return base | {"status": "crashed", "cause": state.get("cause", "unknown")}
    return base | state["record"] | {"status": state["status"]}


def _ended(state: Mapping[str, Any]) -> bool:
    """Whether a run has a result, good or bad."""
    return state["status"] in (*FINISHED, "crashed")


def _fractions(plan: StudyPlan, out: Path) -> dict[str, float]:
    """Finished part of each run."""
    return {config.id: float(read_status(out, config)["fraction"]) for config in plan.configs}
