"""Data of your own: by the ending of the name, a file of arrays, a folder, a text or a function."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matrigami._words import cause
from matrigami.studies._config import OF_DATA, RunConfig, refuse_settings
from matrigami.studies._own import call, function_of, is_function, refuse_changed, source_path
from matrigami.studies.tasks._arrays import task_of_arrays
from matrigami.studies.tasks._base import Task
from matrigami.studies.tasks._folder import read_folder
from matrigami.studies.tasks._images import IMAGE_SETTINGS, image_task
from matrigami.studies.tasks._text import text_task


def own_task(config: RunConfig, device: torch.device) -> Task:
    """The task of a run on data of the user.

    Args:
        config: The run; `dataset` is `file.npz`, a folder, a text, or `file.py:function`.
        device: Where batches are made.

    Raises:
        ValueError: If there is nothing of this name, it has changed, or makes no task.
    """
    name, path = config.dataset, source_path(config.dataset, config.folder)
    refuse_changed(config.folder, name, config.data_hash)
    if is_function(name):
        made = call(name, config.folder, function_of(name, config.folder))
        return _task_of(made, config, device)
    if path.is_dir():
        refuse_settings(config, OF_DATA, (*IMAGE_SETTINGS, "side"), "a folder of images")
        return image_task(read_folder(name, path, config.side), config, device)
    if path.suffix == ".py":
        raise ValueError(
            f"{name}: a Python file is no data.\n"
            f"Name its function that gives them: {name}:function."
        )
    if path.suffix == ".npz":
        return task_of_arrays(_arrays(name, path), config, device)
    return text_task(_text(name, path), config, device)


def _task_of(made: Any, config: RunConfig, device: torch.device) -> Task:
    """What a function gave: a task, a text, or arrays."""
    if isinstance(made, Task):
        refuse_settings(config, OF_DATA, (), "a task that a function makes")
        return made
    if isinstance(made, str):
        return text_task(made, config, device)
    return task_of_arrays(made, config, device)


def _arrays(name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{name}: {path} cannot be read as arrays: {cause(error)}.\n"
            "Write it by numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        ) from error


def _text(name: str, path: Path) -> str:
    """A text file."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name}: {path} cannot be read as a text in UTF-8: {error}.\n"
            "Give a .npz file, a folder of images, a text in UTF-8, or file.py:function."
        ) from error
