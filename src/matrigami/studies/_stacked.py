"""Runs that differ only in seed and learning rate, trained as one batch.

The weights of S runs are one tensor with a leading axis S, of which those of each run are a view:
one pass forward and back under `torch.func.vmap`, and one step of one optimiser, move them all.
Everything else of a run is as it is alone: its batches, rates, state, checkpoints and end. Nothing
passes from one run to another, so one that diverges leaves the others alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from matrigami.nn import called_with
from matrigami.optim import MatrixOptimizer
from matrigami.studies._accelerator import Accelerator, Steps
from matrigami.studies._config import RunConfig
from matrigami.studies._position import Position
from matrigami.studies._stacked_adam import JoinedAdamW
from matrigami.studies._stacked_graph import recorded
from matrigami.studies.models import Network
from matrigami.studies.tasks import Batch, Task

LARGEST = 2e7
"""Multiply-adds of a forward pass of a batch from which runs are not stacked.

With more of them, arithmetic takes the time and not the calls: `python -m benchmarks.stacked`.
"""


RECORD_FROM = 40
"""Steps with batches of one size from which they are recorded.

Recording takes as long as ten steps; the list of kernels that it makes runs without `vmap` and
autograd, whose bookkeeping is up to half of a small step.
"""

Passes = Callable[[Batch], tuple[list[Tensor], Tensor]]
"""From a batch to gradients and sums."""


class Stackable(Steps, Protocol):
    """What a stack needs of a run."""

    config: RunConfig
    model: Network
    task: Task
    sums: Tensor
    position: Position


def alike(config: RunConfig) -> RunConfig:
    """What runs must have in common to be stacked: all but seed and learning rate."""
    return replace(config, seed=0, lr=1.0)


class Stack:
    """Runs that are alike and take their steps together.

    The first step of a run is its own, for it makes the state of its optimiser. Afterwards the step
    waits until all runs have handed in a batch. A run whose result is asked for before, because it
    is behind or ahead of the others, takes the step alone.
    """

    def __init__(self) -> None:
        self.runs: list[Stackable] = []
        self.waiting: dict[Stackable, Batch] = {}
        self.place = (0, 0)
        self.weights: dict[str, Tensor] = {}
        self.parameters: list[list[Tensor]] = []
        self.optimizer: torch.optim.Optimizer | JoinedAdamW | None = None
        self.recorded: dict[tuple[int, ...], Passes] = {}

    def pays(self, run: Stackable) -> bool:
        """Whether a run is small enough, and its step known to be the same in a stack."""
        small = run.model.macs() * run.config.batch_size < LARGEST
        known = run.model.recordable and getattr(run.optimizer, "reads_gradients_only", True)
        return small and known and run.device.type == "cpu"

    def join(self, run: Stackable) -> "Member":
        """Let a run take part."""
        self.runs.append(run)
        self.optimizer = None
        return Member(run, self)

    def leave(self, run: Stackable) -> None:
        """Go on without a run."""
        if run in self.runs:
            self.settle(run)
            self.runs.remove(run)
            self.optimizer = None

    def hand_in(self, run: Stackable, batch: Batch) -> None:
        """Queue a step; take it once all have, at the same place of their epoch."""
        place = run.position.epoch, run.position.start
        if place != self.place:
            for other in list(self.waiting):
                self.settle(other)
        self.place, self.waiting[run] = place, batch
        if len(self.waiting) == len(self.runs):
            self.step()

    def settle(self, run: Stackable) -> None:
        """See to it that the step of a run is done."""
        if run in self.waiting:
            run.update(self.waiting.pop(run))

    def step(self) -> None:
        """The step of all runs."""
        batches = [self.waiting[run] for run in self.runs]
        if len(self.runs) == 1 or not all(run.optimizer.state for run in self.runs):
            for run in self.runs:
                self.settle(run)
            return
        before = time.process_time()
        self.waiting.clear()
        if self.optimizer is None:
            self.optimizer = self._joined()
        self._move(self.optimizer, batches)
        self._share(time.process_time() - before)

    def _move(
        self, optimizer: torch.optim.Optimizer | JoinedAdamW, batches: Sequence[Batch]
    ) -> None:
        """Gradients of all runs, and the step of one optimiser."""
        gradients = self._backward(batches)
        if isinstance(optimizer, JoinedAdamW):
            optimizer.step(gradients)
            return
        for same, name in zip(self.parameters, self.weights, strict=True):
            for p, g in zip(same, gradients[name].unbind(), strict=True):
                p.grad = g
        _merge(optimizer, [run.optimizer for run in self.runs])
        optimizer.step()

    def _joined(self) -> torch.optim.Optimizer | JoinedAdamW:
        """Weights that are views of stacks, and one optimiser with the groups and states of all."""
        self.recorded.clear()
        tables = [dict(run.model.named_parameters()) for run in self.runs]
        optimizers = [run.optimizer for run in self.runs]
        if JoinedAdamW.fits(optimizers[0]):
            joined = JoinedAdamW(optimizers, tables)
            self.weights = joined.weights
            return joined
        self._stack(tables)
        return _joined_optimizer(optimizers)

    def _stack(self, tables: Sequence[dict[str, nn.Parameter]]) -> None:
        """Stacks of the weights of all runs, of which those of each become a part."""
        self.weights = {
            name: torch.stack([table[name].detach() for table in tables]) for name in tables[0]
        }
        self.parameters = [[table[name] for table in tables] for name in self.weights]
        for same, W in zip(self.parameters, self.weights.values(), strict=True):
            _make_views(same, W)

    def _backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradients of all runs, as stacks; their sums go to the runs."""
        shared = all(batch is batches[0] for batch in batches)
        batch = _with_tensors(batches[0]) if shared else _stacked(batches)
        gradients, sums = self._passes(shared, batch)(batch)
        for run, total in zip(self.runs, sums, strict=True):
            run.sums += total
        return dict(zip(self.weights, gradients, strict=True))

    def _passes(self, shared: bool, batch: Batch) -> Passes:
        """Forward and back; recorded for each size of batch, if it comes often."""
        size = tuple(batch.inputs.shape)
        if size not in self.recorded:
            passes = _passes(self.runs[0], self.weights, batched=not shared)
            often = self._steps(size[0 if shared else 1]) >= RECORD_FROM
            self.recorded[size] = recorded(passes, batch) if often else passes
        return self.recorded[size]

    def _steps(self, examples: int) -> int:
        """Of a run, with batches of so many examples; the last of an epoch may have fewer."""
        config, every = self.runs[0].config, self.runs[0].task.examples
        return config.epochs * (every // examples if examples == config.batch_size else 1)

    def _share(self, seconds: float) -> None:
        """Of the time of a step each run has its part; it was measured in the last one's turn."""
        for run in self.runs:
            run.position.cpu_seconds += seconds / len(self.runs)
        self.runs[-1].position.cpu_seconds -= seconds


class Member(Accelerator):
    """The steps of a run that is part of a stack."""

    def __init__(self, run: Stackable, stack: Stack) -> None:
        super().__init__(run)
        self.member, self.stack = run, stack

    def step(self, batch: Batch, factor: float) -> None:
        """Hand in a batch."""
        self.wait()  # at the rates of that step
        self.set_rates(factor)
        self.stack.hand_in(self.member, batch)

    def wait(self) -> None:
        """Until the step is done."""
        self.stack.settle(self.member)

    settle = wait


def _passes(run: Stackable, weights: dict[str, Tensor], *, batched: bool) -> Passes:
    """Forward and back; all runs have one batch, or each its own."""

    def one(weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        score = run.task.score(called_with(run.model, weights, batch.inputs), batch)
        sums = torch.stack([score.loss_sum.double(), score.error_sum.double()])
        return score.loss, sums.detach()

    def passes(batch: Batch) -> tuple[list[Tensor], Tensor]:
        leaves = {name: W.detach().requires_grad_() for name, W in weights.items()}
        axes = tree_map(lambda part: None if part is None else 0, batch) if batched else None
        losses, sums = vmap(one, in_dims=(0, axes))(leaves, batch)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return [G.contiguous() for G in gradients], sums  # fused steps do not read strides

    return passes


def _make_views(parameters: Sequence[Tensor], W: Tensor) -> None:
    """Let equal parameters of several runs be the parts of a stack."""
    for p, w in zip(parameters, W.unbind(), strict=True):
        p.data = w


def _joined_optimizer(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimiser whose groups and states are those of several; a step of it is one of each."""
    groups = [dict(group) for optimizer in optimizers for group in optimizer.param_groups]
    make: Any = type(optimizers[0])  # its base class has another signature
    made: torch.optim.Optimizer = make(groups, lr=0.0)
    for optimizer in optimizers:
        made.state.update(optimizer.state)
    return made


def _merge(joined: torch.optim.Optimizer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """The groups as they are now; for torch, which has a loop over them, as few as possible."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not isinstance(joined, MatrixOptimizer):
        numbers = itemgetter("lr", "weight_decay")
        alike = groupby(sorted(groups, key=numbers), numbers)
        groups = [
            {**same[0], "params": [p for group in same for p in group["params"]]}
            for same in (list(group) for _, group in alike)
        ]
    joined.param_groups[:] = groups


def _with_tensors(batch: Batch) -> Batch:
    """A batch whose weight is a tensor: a number would be recorded."""
    return batch._replace(weight=torch.as_tensor(batch.weight))


def _stacked(batches: Sequence[Batch]) -> Batch:
    """One batch with a leading axis."""
    others = [batch.others for batch in batches]
    weights = [torch.as_tensor(batch.weight) for batch in batches]
    return Batch(
        torch.stack([batch.inputs for batch in batches]),
        torch.stack([batch.targets for batch in batches]),
        None if others[0] is None else torch.stack([t for t in others if t is not None]),
        torch.stack(weights),
    )
