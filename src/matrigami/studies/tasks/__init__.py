"""What the studies train on: a table from a name to a task, and data of your own.

A task obeys the protocol `Task`. A new one is a file here and a line of `TASKS`;
`matrigami.testing.check_task` holds it to the protocol.
"""

from pathlib import Path

import torch

from matrigami._words import nearest
from matrigami.studies._config import RunConfig
from matrigami.studies._own import is_function, source_path
from matrigami.studies.tasks._arrays import ArrayTask
from matrigami.studies.tasks._base import DTYPE, Batch, Draws, Entry, Score, Shape, Task
from matrigami.studies.tasks._images import IMAGES, ImageTask
from matrigami.studies.tasks._teacher import TEACHERS, TeacherTask
from matrigami.studies.tasks._text import TEXTS, TextTask
from matrigami.studies.tasks._yours import own_task

TASKS: dict[str, Entry] = {**IMAGES, **TEACHERS, **TEXTS}
"""All tasks that are known by name."""


def load_task(
    config: RunConfig, data_dir: str | Path | None = None, device: torch.device | str = "cpu"
) -> Task:
    """The task of a run, with its data in memory.

    Args:
        config: The run.
        data_dir: Data folder; by default `$MATRIGAMI_DATA`, else `~/.cache/matrigami`.
        device: Where batches are made.

    Raises:
        ValueError: If there is no such task, its data are missing or damaged, or a setting means
            nothing for it.
    """
    name, folder = config.dataset, None if data_dir is None else Path(data_dir)
    if name in TASKS:
        TASKS[name].check(config)
        return TASKS[name].load(config, folder, torch.device(device))
    if not is_function(name) and not source_path(name, config.folder).exists():
        near = nearest(name, TASKS)
        raise ValueError(
            f"Task {name!r}: known are {', '.join(TASKS)}; a file "
            f"{source_path(name, config.folder)} is not there.\nDid you mean {near!r}?"
        )
    return own_task(config, torch.device(device))


__all__ = [
    "DTYPE",
    "TASKS",
    "ArrayTask",
    "Batch",
    "Draws",
    "Entry",
    "ImageTask",
    "Score",
    "Shape",
    "Task",
    "TeacherTask",
    "TextTask",
    "load_task",
]
