"""Take up a finished or interrupted run: its model, its loss and some of its data.

Shapes: n = examples.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from matrigami.studies._checkpoint import load_checkpoint
from matrigami.studies._config import RunConfig
from matrigami.studies._record import read_json
from matrigami.studies._train import CHECKPOINT
from matrigami.studies.models import build_model
from matrigami.studies.tasks import load_task


class LoadedRun(NamedTuple):
    """A trained model in eval mode, the likelihood it was trained with, and training data."""

    config: RunConfig
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor


def load_run(folder: str | Path, examples: int, *, data_dir: str | Path | None = None) -> LoadedRun:
    """The model of a run folder with `examples` training examples, without augmentation.

    Args:
        folder: `OUT/runs/<id>`, with `config.json` and a checkpoint.
        examples: How many; no more than an epoch has.
        data_dir: Data folder; by default `$MATRIGAMI_DATA`, else `~/.cache/matrigami`.

    Raises:
        ValueError: If it is no run, has no checkpoint yet, or its data are missing.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if values is None:
        raise ValueError(
            f"run in {folder}: it has no config.json.\n"
            "A run is a folder runs/<id> of a study, or the folder of `matrigami train`."
        )
    config = RunConfig.from_json(values)
    task = load_task(replace(config, augment=False, mixup=0.0), data_dir)
    model = build_model(config, task.shape, torch.Generator().manual_seed(2 * config.seed))
    if load_checkpoint(folder / CHECKPOINT, config, model, None) is None:
        raise ValueError(
            f"run in {folder}: it has no checkpoint: it was never begun.\n"
            "Train it first: matrigami train, or matrigami study run."
        )
    count = min(examples, task.examples)
    plan = task.plan(count, torch.Generator().manual_seed(2 * config.seed + 1))
    batch = task.batch(plan, 0, count)
    return LoadedRun(config, model.eval(), task.likelihood, batch.inputs, batch.targets)
