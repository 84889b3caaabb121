"""Arrays of your own: vectors or images, with classes or numbers to learn.

Images of bytes are taken as such, with augmentation if it is asked for; anything else is a vector
of features, normalised one by one (of a stack of planes, plane by plane). Whole numbers as targets
are classes; other numbers are learned by least squares, normalised, and the error is the mean
square in percent of that of the mean.

Shapes: n = examples, b = examples in a batch, f = features, o = outputs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami._words import cause
from matrigami.studies._config import OF_DATA, RunConfig, refuse_settings
from matrigami.studies.tasks._augment import draw_mixing
from matrigami.studies.tasks._base import (
    DTYPE,
    Batch,
    Draws,
    Score,
    Shape,
    Task,
    classified,
    regressed,
)
from matrigami.studies.tasks._datasets import Images, Split
from matrigami.studies.tasks._images import IMAGE_SETTINGS, image_task

NAMES = ("x_train", "y_train", "x_test", "y_test")
"""What arrays are called, and their order."""

MANY = 1000
"""Classes up to which labels may have gaps, as in a part of a large data set."""

CHANNELS = (1, 3, 4)
"""Channels of an image of bytes."""

TEST_BATCH = 2000


class ArrayTask:
    """Vectors in memory, with classes or numbers to learn.

    Args:
        train: Inputs of any shape and targets: whole numbers are classes.
        test: The same of the test set.
        mixup: Parameter of the Beta distribution of the mixing weight; 0 for none.
        label_smoothing: Share of the target that is spread over all classes.
        device: Where batches are made.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        mixup: float = 0.0,
        label_smoothing: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        (x, y), device = train, torch.device(device)
        self.has_classes = not y.is_floating_point()
        outputs = int(y.max()) + 1 if self.has_classes else y.shape[1]
        self.shape = _shape_of(x, outputs)
        self.examples, self.tests = len(x), len(test[0])
        self.mixup, self.label_smoothing, self.device = mixup, label_smoothing, device
        inputs = [_planes(t, self.shape) for t in (x, test[0])]
        inputs = [t.flatten(1).to(device, DTYPE) for t in _normalised(inputs, 2)]
        targets = [y, test[1]] if self.has_classes else _normalised([y, test[1]], 0)
        self._train, self._test = (
            (t, u.to(device, torch.int64 if self.has_classes else DTYPE))
            for t, u in zip(inputs, targets, strict=True)
        )

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for, without smoothing and mixing."""
        return nn.CrossEntropyLoss() if self.has_classes else nn.MSELoss()

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw an epoch."""
        order = torch.randperm(self.examples, generator=generator)
        mixing = draw_mixing(-(-self.examples // batch_size), self.mixup, generator)
        return Draws(order.to(self.device), None, mixing)

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        x, y = (t.index_select(0, plan.order[start : start + size]) for t in self._train)
        if self.mixup == 0:
            return Batch(x, y)
        weight = plan.mixing[start // size]
        return Batch(torch.lerp(x, x.roll(1, 0), 1 - weight), y, y.roll(1, 0), weight)

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        yield from map(Batch, *[t.split(TEST_BATCH) for t in self._test])

    def score(self, outputs: Float[Tensor, "b o"], batch: Batch) -> Score:
        """Cross-entropy and wrong classes, or mean square error."""
        if self.has_classes:
            return classified(outputs, batch, self.label_smoothing)
        return regressed(outputs, batch)


def task_of_arrays(arrays: Any, config: RunConfig, device: torch.device) -> Task:
    """The task of a run on arrays.

    Args:
        arrays: A mapping of `x_train`, `y_train`, `x_test`, `y_test`, or these four in order.
        config: The run.
        device: Where batches are made.

    Raises:
        ValueError: If one is missing, or they do not fit each other.
    """
    x, y, x_test, y_test = (_tensor(config.dataset, n, a) for n, a in _four(config, arrays))
    for name, a, b in (("train", x, y), ("test", x_test, y_test)):
        if len(a) != len(b) or len(a) == 0:
            raise _refusal(
                config.dataset,
                f"x_{name} has {len(a)} examples, y_{name} has {len(b)}",
                "Give as many of both, and at least one.",
            )
    _check_alike(config.dataset, "x", x, x_test)
    y, y_test = _targets(config.dataset, y, y_test)
    pixels = _pixels(x), _pixels(x_test)
    if pixels[0] is not None and pixels[1] is not None and not y.is_floating_point():
        refuse_settings(config, OF_DATA, IMAGE_SETTINGS, "arrays of images")
        train, test = Images(pixels[0], y), Images(pixels[1], y_test)
        return image_task(Split(train, test, int(y.max()) + 1), config, device)
    mixing = ("mixup", "label_smoothing")
    if y.is_floating_point():
        refuse_settings(config, mixing, (), "targets that are no classes")
    refuse_settings(config, OF_DATA, mixing, "arrays that are no images of bytes")
    more = {"mixup": config.mixup, "label_smoothing": config.label_smoothing}
    return ArrayTask((x, y), (x_test, y_test), **more, device=device)


def _four(config: RunConfig, arrays: Any) -> list[tuple[str, Any]]:
    """The arrays by name."""
    if isinstance(arrays, Mapping):
        lacking = [name for name in NAMES if name not in arrays]
        if lacking:
            raise _refusal(
                config.dataset,
                f"it lacks {', '.join(lacking)}; it has {', '.join(map(str, arrays)) or 'nothing'}",
                f"Give the arrays {', '.join(NAMES)}.",
            )
        return [(name, arrays[name]) for name in NAMES]
    if not isinstance(arrays, tuple | list) or len(arrays) != len(NAMES):
        raise _refusal(
            config.dataset,
            f"it gave a {type(arrays).__name__}",
            f"Give a tuple ({', '.join(NAMES)}), a mapping of these names, a text, or a Task.",
        )
    return list(zip(NAMES, arrays, strict=True))


def _tensor(dataset: str, name: str, a: Any) -> Tensor:
    """An array of finite numbers."""
    try:
        t = a.detach().cpu() if isinstance(a, Tensor) else torch.from_numpy(_numbers(a))
    except (TypeError, ValueError) as error:
        raise _refusal(
            dataset,
            f"{name} is no array of numbers: {cause(error)}",
            "Give numbers; numpy.unique(labels, return_inverse=True)[1] numbers classes from 0.",
        ) from error
    kinds = {"sparse": t.layout is not torch.strided, "complex": t.is_complex()}
    if wrong := [k for k, is_so in ({**kinds, "a single number": t.ndim == 0}).items() if is_so]:
        raise _refusal(
            dataset, f"{name} is {wrong[0]}", "Give one row of real numbers for each example."
        )
    if t.is_floating_point() and not torch.isfinite(t.to(DTYPE)).all():
        raise _refusal(
            dataset,
            f"{name} has NaN or infinite entries, or some beyond single precision",
            "Remove or replace them.",
        )
    return t


def _numbers(a: Any) -> np.ndarray:
    """An array that torch can take, in the order of bytes of this machine.

    Raises:
        TypeError: If it holds something else.
    """
    array = np.array(a)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"its type is {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_alike(dataset: str, name: str, train: Tensor, test: Tensor) -> None:
    """Refuse two parts of different shapes or kinds of numbers, and examples without any."""
    if train.shape[1:] != test.shape[1:] or train[0].numel() == 0:
        raise _refusal(
            dataset,
            f"examples of {name}_train are {tuple(train.shape[1:])}, of {name}_test "
            f"{tuple(test.shape[1:])}",
            "Give both the same shape, with one number or more.",
        )
    if train.is_floating_point() != test.is_floating_point():
        raise _refusal(
            dataset,
            f"{name}_train is of {train.dtype}, {name}_test of {test.dtype}",
            "Give both whole numbers, or both floats.",
        )


def _targets(dataset: str, y: Tensor, y_test: Tensor) -> tuple[Tensor, Tensor]:
    """Classes from 0 without a test class that training lacks, or a column for each number."""
    parts = [t.reshape(len(t), -1) for t in (y, y_test)]
    _check_alike(dataset, "y", *parts)
    if (parts[0] == parts[0][0]).all():
        raise _refusal(
            dataset,
            f"all {len(y)} targets of y_train are the same, {parts[0][0].tolist()}",
            "Give examples that differ in what is to be learned.",
        )
    if y.is_floating_point():
        return parts[0].to(DTYPE), parts[1].to(DTYPE)
    if parts[0].shape[1] != 1:
        raise _refusal(
            dataset,
            f"labels have the shapes {tuple(y.shape)} and {tuple(y_test.shape)}",
            "Give one whole number for each example, or floats for numbers to learn.",
        )
    y, y_test = (t.flatten().long() for t in parts)
    _check_classes(dataset, y, y_test)
    return y, y_test


def _check_classes(dataset: str, y: Tensor, y_test: Tensor) -> None:
    """Refuse labels that do not number the classes."""
    least, last, most = int(min(y.min(), y_test.min())), int(y.max()), int(y_test.max())
    if least < 0 or most > last:
        raise _refusal(
            dataset,
            f"labels run from {least} to {max(most, last)}; those of y_train to {last}",
            "Number the classes from 0, and have each class of y_test in y_train.",
        )
    found = len(y.unique())
    if last >= max(MANY, 10 * found):
        raise _refusal(
            dataset,
            f"labels run to {last}, a class for each number, but only {found} different ones occur",
            "Number them by numpy.unique(labels, return_inverse=True)[1], or give floats to learn.",
        )


def _pixels(x: Tensor) -> Tensor | None:
    """Images of bytes by row, channel, column; None if the arrays are none."""
    if x.dtype != torch.uint8 or x.ndim not in (3, 4):
        return None
    if x.ndim == 3:
        return x[:, :, None, :] if x.shape[1] == x.shape[2] else None
    if x.shape[1] == x.shape[2] and x.shape[3] in CHANNELS:
        return x.transpose(2, 3).contiguous()
    if x.shape[2] == x.shape[3] and x.shape[1] in CHANNELS:
        return x.transpose(1, 2).contiguous()
    return None


def _shape_of(x: Tensor, outputs: int) -> Shape:
    """Planes of a square, or one vector."""
    if x.ndim == 4 and x.shape[2] == x.shape[3]:
        return Shape(x.shape[1], x.shape[2], outputs)
    return Shape(max(1, x[0].numel()), 1, outputs)


def _planes(x: Tensor, shape: Shape) -> Tensor:
    """Examples, channels, positions."""
    return x.reshape(len(x), shape.channels, -1).to(torch.float64)


def _normalised(parts: list[Tensor], last: int) -> list[Tensor]:
    """Mean 0 and deviation 1 on the first, over examples and an axis of positions, if any."""
    axes = (0, last) if last else (0,)
    first = parts[0].double()
    mean, std = first.mean(axes, keepdim=True), first.std(axes, correction=0, keepdim=True)
    std = torch.where(std > 1e-12 * mean.abs().clamp_min(1e-300), std, torch.ones_like(std))
    return [(t.double() - mean) / std for t in parts]


def _refusal(dataset: str, what: str, advice: str) -> ValueError:
    """What to raise for arrays that make no task."""
    return ValueError(f"{dataset}: its arrays make no task: {what}.\n{advice}")
