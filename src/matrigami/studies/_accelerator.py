"""How a run calls its device: directly, or as recorded graphs of kernels on an NVIDIA card.

A step of a small network is a hundred kernels that take less time to run than to launch. A CUDA
graph launches them as one. Each run has a stream of its own, so that the graphs of runs that are
trained side by side overlap. The first steps are plain ones, which also make the optimiser's state;
the next is recorded. Learning rate, weight of the mixture and inputs are copied into the tensors
that the graph reads.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from matrigami.studies.tasks import DTYPE, Batch

PLAIN_STEPS = 3
"""Steps of each size of batch before one is recorded; torch asks for a few."""


@runtime_checkable
class Steps(Protocol):
    """What a run can do on its device."""

    optimizer: torch.optim.Optimizer
    rates: list[float]
    device: torch.device
    shared: bool

    def update(self, batch: Batch) -> None:
        """Move the weights along the gradient of one batch."""
        ...

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        ...

    def test(self, batches: Iterable[Batch]) -> None:
        """Count losses and errors of batches of the test set."""
        ...


def prepare(device: torch.device | str) -> None:
    """Let a card multiply in TensorFloat-32 and run up to 32 streams at once (8 by default)."""
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        torch.set_float32_matmul_precision("high")


class Accelerator:
    """Calls the device step by step.

    Args:
        run: The run whose steps it takes.
    """

    def __init__(self, run: Steps) -> None:
        self.run = run

    def step(self, batch: Batch, factor: float) -> None:
        """Train on a batch, at a share of the learning rates."""
        self.set_rates(factor)
        self.run.update(batch)

    def set_rates(self, factor: float) -> None:
        """Give each group its share of its learning rate."""
        for group, rate in zip(self.run.optimizer.param_groups, self.run.rates, strict=True):
            group["lr"] = rate * factor

    def test(self) -> None:
        """Evaluate on the test set."""
        self.run.test(self.run.test_batches())

    def wait(self) -> None:
        """Until what was asked for can be read."""

    def settle(self) -> None:
        """Until what was asked for is done, so that a clock sees it."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


class _Recorded:
    """A function without arguments and results, recorded after a few plain calls.

    One that cannot be recorded, since it asks for a number in between, is called plainly for good.
    """

    def __init__(
        self,
        function: Callable[[], None],
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.function, self.stream, self.pool = function, stream, pool
        self.plain: float = PLAIN_STEPS
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call it, or record and replay it."""
        if self.plain:
            self.plain -= 1
            self.function()
            return
        self.graph = self.graph or self._record()
        if self.graph is None:
            self.plain = math.inf
            self.function()
        else:
            self.graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """The kernels of a call; None if they cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.function()
        except RuntimeError as error:
            warnings.warn(f"A step is called plainly: {str(error).splitlines()[0]}", stacklevel=2)
            return None
        return graph


class Graphs(Accelerator):
    """Records a step for each size of batch, and an evaluation, and replays them."""

    def __init__(self, run: Steps) -> None:
        super().__init__(run)
        self.stream = torch.cuda.Stream(run.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.factor = torch.ones((), dtype=DTYPE, device=run.device)
        self.full_rates = torch.tensor(run.rates, dtype=DTYPE, device=run.device)
        self.rates = self.full_rates.clone()
        self._place_rates()
        self.steps: dict[int, tuple[Batch, _Recorded]] = {}
        self.tests: _Recorded | None = None

    def step(self, batch: Batch, factor: float) -> None:
        """Train on a batch, at a share of the learning rates."""
        current, size = torch.cuda.current_stream(self.run.device), len(batch.inputs)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            place, call = self.steps.get(size) or self._recorded(_like(batch))
            self.steps[size] = place, call
            _copy(batch, place)
            self.factor.fill_(factor)
            copied = self.stream.record_event()
            call()
        current.wait_event(copied)  # the next batch may take the place of this one

    def test(self) -> None:
        """Evaluate on the test set."""
        self.stream.wait_stream(torch.cuda.current_stream(self.run.device))
        with torch.cuda.stream(self.stream):
            if self.tests is None:
                kept = list(self.run.test_batches())
                self.tests = _Recorded(lambda: self.run.test(kept), self.stream, self.pool)
            self.tests()

    def wait(self) -> None:
        """Until what was asked for can be read."""
        torch.cuda.current_stream(self.run.device).wait_stream(self.stream)

    def settle(self) -> None:
        """Wait if the device works for this run alone; else it would wait for the others."""
        if not self.run.shared:
            super().settle()

    def _recorded(self, batch: Batch) -> tuple[Batch, _Recorded]:
        """A place in memory, and the step that reads it."""

        def step() -> None:
            torch.mul(self.full_rates, self.factor, out=self.rates)
            self.run.update(batch)

        return batch, _Recorded(step, self.stream, self.pool)

    def _place_rates(self) -> None:
        """Let the optimiser read its learning rates from memory; a checkpoint has numbers."""
        groups = self.run.optimizer.param_groups
        for group, rate in zip(groups, self.rates.unbind(), strict=True):
            group.update(lr=rate, capturable=True)


def accelerator(run: Steps, *, alone: bool) -> Accelerator:
    """Graphs, where the device has them and the optimiser can be recorded.

    Args:
        run: The run.
        alone: No other process takes part in its steps.
    """
    recordable = alone and isinstance(run.optimizer, torch.optim.AdamW)
    return Graphs(run) if recordable and run.device.type == "cuda" else Accelerator(run)


def _like(batch: Batch) -> Batch:
    """Room for a batch."""
    others = None if batch.others is None else torch.empty_like(batch.others)
    return Batch(
        torch.empty_like(batch.inputs),
        torch.empty_like(batch.targets),
        others,
        batch.inputs.new_ones(()),
    )


def _copy(batch: Batch, place: Batch) -> None:
    """Put a batch into its place."""
    for new, old in zip(batch, place, strict=True):
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            old.copy_(new)
        elif isinstance(old, Tensor) and new is not None:
            old.fill_(new)
