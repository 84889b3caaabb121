"""How big a run is, known before it is trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matrigami.operators._memory import free_memory
from matrigami.studies._config import RunConfig
from matrigami.studies._together import data
from matrigami.studies.models import build_model
from matrigami.studies.tasks import TASKS, Shape, load_task


class RunSize(NamedTuple):
    """Parameters, multiply-adds of one forward pass of one example, training examples."""

    params: int
    macs: int
    examples: int


def run_size(
    config: RunConfig, data_dir: Path | None = None, task: tuple[Shape, int] | None = None
) -> RunSize:
    """Size of a run, from its model.

    Args:
        config: The run.
        data_dir: Folder of the data sets, for tasks whose size is not known without them.
        task: Shape and training examples of its task, if they are known: `task_size`.

    Raises:
        ValueError: If the structure does not fit the width, or data are missing.

    Examples:
        >>> config = RunConfig(
        ...     "cifar100", "mlp", "btt(rank=1)", 512, seed=0, lr=3e-3, epochs=2, batch_size=1024
        ... )
        >>> run_size(config)
        RunSize(params=603236, macs=591872, examples=100000)
    """
    shape, samples = task or task_size(config, data_dir)
    try:
        model = build_model(config, shape, device="meta")
    except ValueError as error:
        lines = str(error).splitlines()
        raise ValueError(
            "\n".join(
                [
                    f"{config.structure} at width {config.width} on {config.dataset}: {lines[0]}",
                    *lines[1:],
                ]
            )
        ) from error
    params = sum(p.numel() for p in model.parameters())
    return RunSize(params, model.macs(), config.epochs * samples)


def check_memory(config: RunConfig, size: RunSize, device: str = "cpu") -> None:
    """Refuse a run whose weights, gradients and two moments are more than the free memory.

    Raises:
        ValueError: If they are.
    """
    needed, free = 4 * 4 * size.params, free_memory(device)
    if needed > free:
        raise ValueError(
            f"{config.structure} at width {config.width} on {config.dataset}: "
            f"{size.params:.1e} parameters.\n"
            f"Training takes about {needed / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free.\n"
            "Use a smaller width, or a structure with fewer parameters."
        )


def check_data(configs: Iterable[RunConfig], data_dir: Path | None) -> None:
    """Read each data set once: a missing or damaged one is known before anything is written.

    Raises:
        ValueError: If a data set is missing or damaged.
    """
    for config in {data(config): config for config in configs}.values():
        load_task(config, data_dir)


def task_size(config: RunConfig, data_dir: Path | None = None) -> tuple[Shape, int]:
    """Shape and training examples of a task: those of the table, or from its data."""
    entry = TASKS.get(config.dataset)
    if entry is not None and entry.size is not None:
        entry.check(config)
        return entry.size
    task = load_task(config, data_dir)
    return task.shape, task.examples
