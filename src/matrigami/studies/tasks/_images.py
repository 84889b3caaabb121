"""Classification of images, augmented, mixed and shuffled.

Shapes: b = examples in a batch, n = images, s = side in pixels, c = channels, f = features.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies.tasks._augment import Crops, crop_table, draw_crops, draw_mixing, resample
from matrigami.studies.tasks._base import Batch, Draws, Entry, Score, Shape, classified
from matrigami.studies.tasks._datasets import Images, Split, load_images

IMAGE_SETTINGS = ("augment", "shuffle_pixels", "mixup", "label_smoothing")
"""Settings of a run that mean something for images."""

SHUFFLE_SEED = 2024
"""Seed of the fixed permutation of the pixels: the same in every run."""

TEST_BATCH = 2000


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

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw an epoch."""
        n = self.examples
        order = torch.randperm(n, generator=generator)
        crops = draw_crops(n, self.shape.side, generator) if self.augment else None
        mixing = draw_mixing(-(-n // batch_size), self.mixup, generator)
        moved = None if crops is None else Crops(*[t.to(self.device) for t in crops])
        return Draws(order.to(self.device), moved, mixing)

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
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
        return classified(outputs, batch, self.label_smoothing)

    def _features(self, x: Float[Tensor, "b s c s"]) -> Float[Tensor, "b f"]:
        """Normalised features in the order (channel, row, column), or shuffled."""
        return torch.addcmul(self._shift, x.flatten(1).index_select(1, self._order), self._scale)


def image_task(split: Split, config: RunConfig, device: torch.device) -> ImageTask:
    """The task of a run on a split."""
    return ImageTask(
        *split,
        augment=config.augment,
        mixup=config.mixup,
        label_smoothing=config.label_smoothing,
        shuffle_pixels=config.shuffle_pixels,
        device=device,
    )


def _load(name: str, config: RunConfig, data_dir: Path | None, device: torch.device) -> ImageTask:
    """The task of a run on a data set that is known by name."""
    return image_task(load_images(name, data_dir), config, device)


def _entry(name: str, about: str, source: str, size: tuple[Shape, int] | None = None) -> Entry:
    """A row of the table."""
    return Entry(about, partial(_load, name), source, IMAGE_SETTINGS, size)


IMAGES: dict[str, Entry] = {
    "digits": _entry("digits", "grey images of 8 x 8, 1797", "ships with scikit-learn"),
    "cifar10": _entry(
        "cifar10",
        "colour images of 32 x 32, 60 000, in the official binary files",
        "matrigami data get cifar10",
        (Shape(3, 32, 10), 50_000),
    ),
    "cifar100": _entry(
        "cifar100",
        "colour images of 32 x 32, 60 000, in the official binary files",
        "matrigami data get cifar100",
        (Shape(3, 32, 100), 50_000),
    ),
    "fashion_mnist": _entry(
        "fashion_mnist",
        "grey images of 28 x 28, 70 000, in idx files",
        "matrigami data get fashion_mnist",
        (Shape(1, 28, 10), 60_000),
    ),
}
"""The data sets of images."""


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
