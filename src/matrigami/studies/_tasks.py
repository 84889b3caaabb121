"""What a study trains on: labelled images in memory, or a random teacher with unlimited data.

A task draws all random choices of an epoch at once (`plan`), from one generator, and turns slices
of that plan into batches. So an epoch is a function of the generator's state at its start, whatever
the device, and a run resumes in its middle.

Shapes: b = examples in a batch, n = examples in an epoch, f = features, o = outputs.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from matrigami.studies._augment import Crops, crop_table, draw_crops, draw_mixing, resample
from matrigami.studies._config import RunConfig
from matrigami.studies._datasets import IMAGE_SETS, Images, Split, load_images
from matrigami.studies._models import DTYPE, Shape

SHUFFLE_SEED = 2024
"""Seed of the fixed permutation of the pixels: the same in every run."""

TEST_BATCH = 2000

TEACHER_TESTS = 8000
"""Examples in the test set of a teacher, and for the mean and variance of its outputs."""


class Plan(NamedTuple):
    """The random choices of one epoch: examples or fresh inputs, crops, a weight for each batch."""

    order: Tensor
    crops: Crops | None
    mixing: list[float]


class Batch(NamedTuple):
    """Inputs, targets; of a mixture also the second targets, and the weight of the first."""

    inputs: Float[Tensor, "b f"]
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

    def plan(self, batch_size: int, generator: torch.Generator) -> Plan:
        """Draw an epoch."""
        ...

    def batch(self, plan: Plan, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        ...

    def score(self, outputs: Float[Tensor, "b o"], batch: Batch) -> Score:
        """Loss to minimise, and sums of loss and error."""
        ...


class ImageTask:
    """Classification of images.

    The train error of a mixture counts, batch by batch, the better of the hits on its two sets of
    labels, as the published study does. Pixels are normalised by the mean and deviation of each
    channel of the training set.

    Args:
        train: Training images.
        test: Test images.
        classes: Number of classes.
        augment: Random resized crops and flips.
        mixup: Parameter of the Beta distribution of the mixing weight; 0 for none.
        label_smoothing: Share of the target that is spread over all classes.
        shuffle_pixels: One fixed permutation of all features.
        device: Where images are kept and batches are made.
    """

    def __init__(
        self,
        train: Images,
        test: Images,
        classes: int,
        *,
        augment: bool = False,
        mixup: float = 0.0,
        label_smoothing: float = 0.0,
        shuffle_pixels: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        _, side, channels, _ = train.pixels.shape
        self.shape = Shape(channels, side, classes)
        self.examples, self.tests = len(train.labels), len(test.labels)
        self.augment, self.mixup, self.label_smoothing = augment, mixup, label_smoothing
        self.device = torch.device(device)
        self._train, self._test = _to(train, self.device), _to(test, self.device)
        mean, std = _channel_statistics(train.pixels)
        order = _feature_order(self.shape, shuffle_pixels)
        channel = order // side % channels
        self._order = order.to(self.device)
        self._scale = (1 / std[channel]).to(self.device)
        self._shift = (-mean / std)[channel].to(self.device)
        self._table = crop_table(side, self.device)

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for, without smoothing and mixing."""
        return nn.CrossEntropyLoss()

    def plan(self, batch_size: int, generator: torch.Generator) -> Plan:
        """Draw an epoch."""
        n = self.examples
        order = torch.randperm(n, generator=generator)
        crops = draw_crops(n, self.shape.side, generator) if self.augment else None
        mixing = draw_mixing(-(-n // batch_size), self.mixup, generator)
        moved = None if crops is None else Crops(*[t.to(self.device) for t in crops])
        return Plan(order.to(self.device), moved, mixing)

    def batch(self, plan: Plan, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        chosen = plan.order[start : start + size]
        pixels, labels = (t.index_select(0, chosen) for t in self._train)
        if plan.crops is None:
            x = pixels.float()
        else:
            x = resample(pixels, Crops(*[t[start : start + size] for t in plan.crops]), self._table)
        x, weight = self._features(x), plan.mixing[start // size]
        if self.mixup == 0:
            return Batch(x, labels)
        return Batch(torch.lerp(x, x.roll(1, 0), 1 - weight), labels, labels.roll(1), weight)

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        for pixels, labels in zip(*[t.split(TEST_BATCH) for t in self._test], strict=True):
            yield Batch(self._features(pixels.float()), labels)

    def score(self, outputs: Float[Tensor, "b o"], batch: Batch) -> Score:
        """Cross-entropy, and wrong classes."""
        smoothing = self.label_smoothing
        loss = nn.functional.cross_entropy(outputs, batch.targets, label_smoothing=smoothing)
        guess = outputs.argmax(1)
        hits = (guess == batch.targets).sum()
        if batch.others is not None:
            other = nn.functional.cross_entropy(outputs, batch.others, label_smoothing=smoothing)
            loss = batch.weight * loss + (1 - batch.weight) * other
            hits = torch.maximum(hits, (guess == batch.others).sum())
        return Score(loss, loss.detach() * len(guess), len(guess) - hits)

    def _features(self, x: Float[Tensor, "b s c s"]) -> Float[Tensor, "b f"]:
        """Normalised features in the order (channel, row, column), or shuffled."""
        return torch.addcmul(self._shift, x.flatten(1).index_select(1, self._order), self._scale)


class TeacherTask:
    """Regression onto a fixed random ReLU network of Gaussian inputs; every example is fresh.

    Outputs of the teacher have mean 0 and variance 1, so that the loss is relative to predicting
    the mean; the error is the same number in percent. Source: Potapczynski et al. (2024),
    arXiv:2410.02117.

    Args:
        width: Hidden features of the teacher.
        layers: Its layers.
        samples: Examples in an epoch.
        inputs: Features of an example.
        device: Where batches are made.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        samples: int,
        *,
        inputs: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.examples, self.tests = Shape(inputs, 1, 1), samples, TEACHER_TESTS
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        sizes = [inputs, *[width] * (layers - 1), 1]
        weights = [
            torch.randn(n, m, generator=generator, dtype=DTYPE) * math.sqrt(2 / n)
            for n, m in pairwise(sizes)
        ]
        self._weights = [W.to(self.device) for W in weights]
        first, test = (
            torch.randn(TEACHER_TESTS, inputs, generator=generator, dtype=DTYPE).to(self.device)
            for _ in range(2)
        )
        self._mean, self._std = 0.0, 1.0
        y = self._teach(first)
        self._mean, self._std = float(y.mean()), float(y.std())
        self._test = Batch(test, self._teach(test))

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for."""
        return nn.MSELoss()

    def plan(self, batch_size: int, generator: torch.Generator) -> Plan:  # noqa: ARG002 - one signature for all tasks
        """Draw an epoch."""
        sizes = (self.examples, self.shape.features)
        inputs = torch.randn(sizes, generator=generator, dtype=DTYPE)
        return Plan(inputs.to(self.device), None, [])

    def batch(self, plan: Plan, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        x = plan.order[start : start + size]
        return Batch(x, self._teach(x))

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        inputs, targets = (t.split(TEST_BATCH) for t in (self._test.inputs, self._test.targets))
        yield from map(Batch, inputs, targets)

    def score(self, outputs: Float[Tensor, "b o"], batch: Batch) -> Score:
        """Mean square error, and its sum."""
        loss = nn.functional.mse_loss(outputs, batch.targets)
        total = loss.detach() * len(outputs)
        return Score(loss, total, total)

    @torch.no_grad()
    def _teach(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b 1"]:
        """Outputs of the teacher."""
        *hidden, last = self._weights
        for W in hidden:
            x = nn.functional.relu(x @ W)
        return (x @ last - self._mean) / self._std


TEACHERS: dict[str, tuple[int, int]] = {"teacher": (1024, 6), "teacher_small": (128, 4)}
"""Width and layers of each teacher: the published one, and one that costs little more than its
students."""

TASKS: tuple[str, ...] = (*IMAGE_SETS, *TEACHERS)
"""Names of all tasks."""

SAMPLES_PER_EPOCH = 50_000
"""Examples in an epoch of a task with unlimited data, unless the run says otherwise."""


def load_task(
    config: RunConfig, data_dir: str | Path | None = None, device: torch.device | str = "cpu"
) -> Task:
    """The task of a run, with its data in memory.

    Args:
        config: The run.
        data_dir: Data folder; by default `$MATRIGAMI_DATA`, else `~/.cache/matrigami`.
        device: Where batches are made.

    Raises:
        ValueError: If there is no such task, or its data are missing or damaged.
    """
    device = torch.device(device)
    if config.dataset in TEACHERS:
        width, layers = TEACHERS[config.dataset]
        return TeacherTask(
            width, layers, config.samples_per_epoch or SAMPLES_PER_EPOCH, device=device
        )
    if config.dataset not in IMAGE_SETS:
        raise ValueError(
            f"Task {config.dataset!r} was asked for.\nKnown are {', '.join(TASKS)}.\n"
            "Check `dataset` of [task]."
        )
    split: Split = load_images(config.dataset, data_dir)
    return ImageTask(
        *split,
        augment=config.augment,
        mixup=config.mixup,
        label_smoothing=config.label_smoothing,
        shuffle_pixels=config.shuffle_pixels,
        device=device,
    )


def _channel_statistics(
    pixels: UInt8[Tensor, "n s c s"],
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and standard deviation of each channel, from its histogram."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack(
        [torch.bincount(channel.flatten().int(), minlength=256) for channel in pixels.unbind(2)]
    ).double()
    total = counts.sum(1)
    mean = counts @ levels / total
    return mean.float(), (counts @ levels.square() / total - mean.square()).sqrt().clamp_min(
        1e-6
    ).float()


def _feature_order(shape: Shape, shuffled: bool) -> Int64[Tensor, " f"]:
    """For each feature, where it is in (row, channel, column): channel by channel, or shuffled."""
    s, c = shape.side, shape.channels
    order = torch.arange(shape.features).view(s, c, s).transpose(0, 1).flatten()
    if not shuffled:
        return order
    return order[
        torch.randperm(shape.features, generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    ]


def _to(images: Images, device: torch.device) -> Images:
    """Images on a device."""
    return Images(images.pixels.to(device), images.labels.to(device))
