"""Runs trained side by side: one pass over the data for all of them.

Runs of one task, batch size and number of epochs take turns, a step each. Those of one seed see the
same batches, whatever their structure, width, learning rate or optimiser: a batch is made once for
all of them. Each run stays what it is alone: its own generator, checkpoint and end.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from matrigami.studies._config import RunConfig
from matrigami.studies.tasks import Batch, Draws, Score, Task

DATA = (
    "dataset",
    "epochs",
    "batch_size",
    "augment",
    "mixup",
    "label_smoothing",
    "shuffle_pixels",
    "samples_per_epoch",
    "context",
    "vocabulary",
    "side",
    "folder",
    "data_hash",
)
"""Settings that determine, but for the seed, the batches of a run and what their scores are."""


def data(config: RunConfig) -> tuple[Any, ...]:
    """What runs must have in common to be trained side by side."""
    return tuple(getattr(config, name) for name in DATA)


class SharedTask:
    """A task that remembers its last epoch, its last batch and its test set.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shape, self.examples, self.tests = task.shape, task.examples, task.tests
        self._plans: dict[bytes, tuple[Draws, torch.Tensor]] = {}
        self._batch: tuple[Draws, int, Batch] | None = None
        self._tests: tuple[Batch, ...] | None = None

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for."""
        return self.task.likelihood

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:
        """The epoch that begins at this state of the generator."""
        before = generator.get_state().numpy().tobytes()
        if before not in self._plans:
            plan = self.task.plan(batch_size, generator)
            self._plans = {before: (plan, generator.get_state())}
        plan, after = self._plans[before]
        generator.set_state(after)
        return plan

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        last = self._batch
        if last is None or last[0] is not plan or last[1] != start:
            last = self._batch = (plan, start, self.task.batch(plan, start, size))
        return last[2]

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        self._tests = self._tests or tuple(self.task.test_batches())
        return iter(self._tests)

    def score(self, outputs: torch.Tensor, batch: Batch) -> Score:
        """Loss and errors."""
        return self.task.score(outputs, batch)


def in_turns(trainings: Sequence[Iterator[tuple[int, int]]]) -> None:
    """Train runs to their ends, a step each; those that are ahead wait for the others."""
    at: dict[Iterator[tuple[int, int]], tuple[int, int]] = dict.fromkeys(trainings, (-1, 0))
    while at:
        least = min(at.values())
        for training in [each for each, where in at.items() if where == least]:
            where = next(training, None)
            if where is None:
                del at[training]
            else:
                at[training] = where
