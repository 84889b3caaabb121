"""One run in a folder of its own: what `matrigami train` does.

The folder is that of a run of a study: `config.json`, `metrics.jsonl` and `ckpt/`; then `env.json`
and, at the end, `record.json`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from matrigami.studies._config import RunConfig
from matrigami.studies._environment import environment
from matrigami.studies._lock import hold
from matrigami.studies._optimizers import canonical_optimizer, plan_table
from matrigami.studies._record import Record, read_json, write_json
from matrigami.studies._signals import stop_signals
from matrigami.studies._size import RunSize, check_memory, run_size, task_size
from matrigami.studies._spec import Study, canonical_structure
from matrigami.studies._team import Team
from matrigami.studies._train import Progress, train_run
from matrigami.studies.models import build_model

SPELLING: dict[str, Callable[[str], str]] = {
    "structure": canonical_structure,
    "optimizer": canonical_optimizer,
}
"""Settings that may be spelled in several ways."""


def single_run(study: Study, **settings: Any) -> RunConfig:
    """The first run of a study that has the given settings; without one, the nearest with them.

    Args:
        study: One run or more.
        settings: Fields of a `RunConfig`; None is not given.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> from matrigami.studies import load_preset
        >>> config = single_run(load_preset("demo"), structure="btt", optimizer="soap()", width=50)
        >>> config.dataset, config.structure, config.optimizer, config.width, config.lr
        ('digits', 'btt', 'soap', 50, 0.003)
    """
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {key: SPELLING[key](given[key]) for key in SPELLING if key in given}
    near = study.configs
    for key, value in given.items():
        near = tuple(c for c in near if getattr(c, key) == value) or near
    return replace(near[0], **given)


def plan_run(config: RunConfig, data_dir: Path | None = None) -> tuple[RunSize, str]:
    """Size of a run, and a table of what each of its parameters takes.

    Args:
        config: The run.
        data_dir: Folder of the data sets, for tasks whose size is not known without them.

    Raises:
        ValueError: If the structure does not fit the width, or the run not into memory.
    """
    task = task_size(config, data_dir)
    size = run_size(config, task=task)
    check_memory(config, size)
    return size, plan_table(build_model(config, task[0]), config)


def train_single(
    config: RunConfig,
    out: Path,
    *,
    data_dir: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    team: Team | None = None,
) -> Record:
    """Train a run in its own folder, or resume it there; return its record.

    SIGINT and SIGTERM make it write a checkpoint and raise `Interrupted`.

    Args:
        config: The run.
        out: Its folder; made if absent.
        data_dir: Folder of the data sets.
        device: Where to train.
        progress: As for `train_run`.
        team: The processes that train it together.

    Raises:
        Interrupted: If it was asked to stop.
        ValueError: If the folder holds another run, is in use, or cannot be written.
    """
    team = team or Team()
    with ExitStack() as stack:
        asked = stack.enter_context(stop_signals())
        if team.leads:
            _prepare(config, out, stack, device)
        record = train_run(
            config,
            out,
            data_dir=data_dir,
            device=device,
            progress=progress if team.leads else None,
            stop=asked.is_set,
            team=team,
        )
        if team.leads:
            write_json(out / "record.json", record)
    return record


def _prepare(config: RunConfig, out: Path, stack: ExitStack, device: str) -> None:
    """Make the folder, hold it, and note what runs in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = stack.enter_context(hold(out))
    except OSError as error:
        raise ValueError(
            f"--out {out}: it cannot be written: {error.strerror} ({error.filename}).\n"
            "Give --out a folder that you may write to."
        ) from error
    stored = read_json(out / "config.json")
    other = stored is not None and RunConfig.from_json(stored).id != config.id
    if other or not held:
        what = "It holds another run" if other else "Another process trains in it"
        raise ValueError(
            f"--out {out}, for run {config.id}: {what[0].lower()}{what[1:]}.\n"
            "Give --out a folder of its own."
        )
    write_json(out / "config.json", config.to_json())
    write_json(out / "env.json", environment(device, 1, torch.get_num_threads()))
