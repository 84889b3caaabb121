"""Regression onto a random network: a task of unlimited data.

Shapes: b = examples in a batch, f = features.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies.tasks._base import DTYPE, Batch, Draws, Entry, Score, Shape, regressed

TESTS = 8000
"""Examples in the test set of a teacher, and for the mean and variance of its outputs."""

TEST_BATCH = 2000

SAMPLES_PER_EPOCH = 50_000
"""Examples in an epoch, unless the run says otherwise."""


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
        self.shape, self.examples, self.tests = Shape(inputs, 1, 1), samples, TESTS
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        sizes = [inputs, *[width] * (layers - 1), 1]
        weights = [
            torch.randn(n, m, generator=generator, dtype=DTYPE) * math.sqrt(2 / n)
            for n, m in pairwise(sizes)
        ]
        self._weights = [W.to(self.device) for W in weights]
        first, test = (
            torch.randn(TESTS, inputs, generator=generator, dtype=DTYPE).to(self.device)
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

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:  # noqa: ARG002 - one signature for all tasks
        """Draw an epoch."""
        sizes = (self.examples, self.shape.features)
        inputs = torch.randn(sizes, generator=generator, dtype=DTYPE)
        return Draws(inputs.to(self.device), None, [])

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
        """Examples `start` to `start + size` of an epoch."""
        x = plan.order[start : start + size]
        return Batch(x, self._teach(x))

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        inputs, targets = (t.split(TEST_BATCH) for t in (self._test.inputs, self._test.targets))
        yield from map(Batch, inputs, targets)

    def score(self, outputs: Float[Tensor, "b o"], batch: Batch) -> Score:
        """Mean square error, and its sum."""
        return regressed(outputs, batch)

    @torch.no_grad()
    def _teach(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b 1"]:
        """Outputs of the teacher."""
        *hidden, last = self._weights
        for W in hidden:
            x = nn.functional.relu(x @ W)
        return (x @ last - self._mean) / self._std


def _load(
    width: int, layers: int, config: RunConfig, _: Path | None, device: torch.device
) -> TeacherTask:
    """The teacher of a run."""
    return TeacherTask(width, layers, config.samples_per_epoch or SAMPLES_PER_EPOCH, device=device)


TEACHERS: dict[str, Entry] = {
    "teacher": Entry(
        "regression on a random network of width 1024 and 6 layers, the published one",
        partial(_load, 1024, 6),
        "made on the spot, fresh at every step",
        ("samples_per_epoch",),
    ),
    "teacher_small": Entry(
        "the same of width 128 and 4 layers, which costs little more than its students",
        partial(_load, 128, 4),
        "made on the spot, fresh at every step",
        ("samples_per_epoch",),
    ),
}
"""The teachers."""
