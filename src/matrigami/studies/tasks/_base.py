"""What a study trains on: the protocol of a task, and the entry of one in the table.

A task draws all random choices of an epoch at once (`plan`), from one generator, and turns slices
of that plan into batches. So an epoch is a function of the generator's state at its start, whatever
the device, and a run resumes in its middle. `matrigami.testing.check_task` holds a task to it.

Shapes: b = examples in a batch, o = outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.studies._config import OF_DATA, RunConfig, refuse_settings
from matrigami.studies.tasks._augment import Crops

DTYPE = torch.float32
"""Type of all numbers, whatever the default of the session is."""


class Shape(NamedTuple):
    """Channels and side of an image (a vector has side 1), and the outputs asked for.

    A text is a vector of `channels` token numbers below `outputs`; a model answers at each of them.
    """

    channels: int
    side: int
    outputs: int
    is_text: bool = False

    @property
    def features(self) -> int:
        """Numbers in one example."""
        return self.channels * self.side**2


class Draws(NamedTuple):
    """The random choices of one epoch: examples or fresh inputs, crops, a weight for each batch."""

    order: Tensor
    crops: Crops | None
    mixing: list[float]


class Batch(NamedTuple):
    """Inputs, targets; of a mixture also the second targets, and the weight of the first."""

    inputs: Tensor
    targets: Tensor
    others: Tensor | None = None
    weight: float | Tensor = 1.0

    def part(self, which: slice) -> "Batch":
        """Some of the examples."""
        others = None if self.others is None else self.others[which]
        return Batch(self.inputs[which], self.targets[which], others, self.weight)


class Score(NamedTuple):
    """Loss to minimise, and sums over the batch of loss and error (a count, or a square)."""

    loss: Float[Tensor, ""]
    loss_sum: Float[Tensor, ""]
    error_sum: Float[Tensor, ""]


@runtime_checkable
class Task(Protocol):
    """What a run trains on: its sizes, epochs, batches, test set and loss."""

    shape: Shape
    examples: int
    tests: int

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for, without smoothing and mixing."""
        ...

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw an epoch."""
        ...

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        ...

    def score(self, outputs: Tensor, batch: Batch) -> Score:
        """Loss to minimise, and sums of loss and error."""
        ...


def classified(outputs: Tensor, batch: Batch, smoothing: float) -> Score:
    """Cross-entropy, and wrong classes; of a mixture the better of the hits on both labels."""
    loss = nn.functional.cross_entropy(outputs, batch.targets, label_smoothing=smoothing)
    guess = outputs.argmax(1)
    hits = (guess == batch.targets).sum()
    if batch.others is not None:
        other = nn.functional.cross_entropy(outputs, batch.others, label_smoothing=smoothing)
        loss = batch.weight * loss + (1 - batch.weight) * other
        hits = torch.maximum(hits, (guess == batch.others).sum())
    return Score(loss, loss.detach() * len(guess), len(guess) - hits)


def regressed(outputs: Tensor, batch: Batch) -> Score:
    """Mean square error, and its sum."""
    loss = nn.functional.mse_loss(outputs, batch.targets)
    total = loss.detach() * len(outputs)
    return Score(loss, total, total)


@dataclass(frozen=True)
class Entry:
    """A task in the table.

    Args:
        about: What it is, in a line.
        load: Makes the task of a run from the data folder, on a device.
        source: How its data come to be there, in a few words.
        settings: Fields of a run that mean something for it, of those that do for some data only.
        size: Shape and training examples, where they are known without the data: a study can then
            be planned without them.
    """

    about: str
    load: Callable[[RunConfig, Path | None, torch.device], Task]
    source: str
    settings: tuple[str, ...]
    size: tuple[Shape, int] | None = None

    def check(self, config: RunConfig) -> None:
        """Refuse a run with settings that mean nothing for this task.

        Raises:
            ValueError: If it has one.
        """
        refuse_settings(config, OF_DATA, self.settings, f"task {config.dataset}")
