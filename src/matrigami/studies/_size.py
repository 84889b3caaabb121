"""How big a run is, known before it is trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matrigami.operators._memory import free_memory
from matrigami.studies._config import RunConfig
from matrigami.studies._models import Shape, build_model
from matrigami.studies._tasks import load_task

PUBLISHED = {
    "cifar10": (Shape(3, 32, 10), 50_000),
    "cifar100": (Shape(3, 32, 100), 50_000),
    "fashion_mnist": (Shape(1, 28, 10), 60_000),
}
"""Shape and training examples of data sets to fetch: a study can be planned without them."""


class RunSize(NamedTuple):
    """Parameters, multiply-adds of one forward pass of one example, training examples."""

    params: int
    macs: int
    examples: int


def run_size(config: RunConfig) -> RunSize:
    """Size of a run, from its model.

    Raises:
        ValueError: If the structure does not fit the width.

    Examples:
        >>> config = RunConfig(
        ...     "cifar100", "mlp", "btt(rank=1)", 512, seed=0, lr=3e-3, epochs=2, batch_size=1024
        ... )
        >>> run_size(config)
        RunSize(params=603236, macs=591872, examples=100000)
    """
    shape, samples = _shape_and_examples(config)
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
    for config in {config.dataset: config for config in configs}.values():
        load_task(config, data_dir)


def known_shape(config: RunConfig) -> Shape:
    """Sizes of the task of a run, without data that would have to be fetched."""
    return _shape_and_examples(config)[0]


def _shape_and_examples(config: RunConfig) -> tuple[Shape, int]:
    """Published ones, or those of a task whose data are always at hand."""
    if config.dataset in PUBLISHED:
        return PUBLISHED[config.dataset]
    task = load_task(config)
    return task.shape, task.examples
