"""One training loop for every task, model and optimiser: cosine to zero, checkpoints, metrics.

All random numbers come from two generators seeded by the run: one for the initial weights, one
whose state at the start of an epoch determines the epoch. A checkpoint is a single safetensors
file, written aside and renamed; a run that resumes from it repeats the uninterrupted one bit by
bit. Several processes may train one run together; see `_team.py`.
"""

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matrigami.nn import routing_loss
from matrigami.studies._accelerator import Accelerator, accelerator
from matrigami.studies._checkpoint import load_checkpoint, save_checkpoint
from matrigami.studies._config import RunConfig
from matrigami.studies._environment import machine
from matrigami.studies._optimizers import build_optimizer
from matrigami.studies._position import Position, StepClock
from matrigami.studies._stacked import Stack
from matrigami.studies._team import Team
from matrigami.studies.models import Network, build_model
from matrigami.studies.tasks import Batch, Draws, Score, Task, load_task

Progress = Callable[[float, Mapping[str, Any]], None]
"""Told about once a second: the fraction of the run that is done, and where it stands."""

Training = Generator[tuple[int, int], None, dict[str, Any]]
"""Steps of a run, and its record."""

CHECKPOINT = Path("ckpt") / "state.safetensors"
METRICS = "metrics.jsonl"


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """A run was stopped on request and has written its checkpoint."""


class _Diverged(Exception):  # noqa: N818 - caught here
    """The loss of a run is no longer finite."""


def train_run(
    config: RunConfig,
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Train one run, or resume it from its last checkpoint.

    Args:
        config: The run.
        folder: Where `metrics.jsonl` and `ckpt/` are.
        data_dir: Data folder; by default `$MATRIGAMI_DATA`, else `~/.cache/matrigami`.
        device: Where to train.
        progress: Called about once a second with the fraction done and a mapping of numbers.
        stop: Asked at each step; true makes the run write a checkpoint and raise `Interrupted`.
        team: The processes that train the run together; by default this one alone.

    Returns:
        The record: sizes, losses, errors in percent (train: mean of the last tenth of the epochs,
        at most ten, on augmented data), seconds of training, and `status`, which is `failed` with a
        `cause` if the loss stopped being finite.

    Raises:
        Interrupted: If `stop` said so.
        ValueError: If the task, the model or the structure is unknown or does not fit, or data are
            missing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    task = load_task(config, data_dir, device)
    run = Run(config, Path(folder), task, torch.device(device), team or Team())
    for _ in run.train(progress or _silent, stop or _never):
        pass
    return run.record()


def training(
    config: RunConfig,
    folder: Path,
    *,
    task: Task,
    device: torch.device | str,
    progress: Progress,
    stop: Callable[[], bool],
    shared: bool = False,
    stack: Stack | None = None,
) -> Training:
    """`train_run` a step at a time, so that a process can train several runs.

    They take turns (`shared`), or some are one batch (`stack`).

    Returns:
        An iterator that yields the epoch and the example after each step, and returns the record.
    """
    device = torch.device(device)
    run = Run(config, folder, task, device, shared=shared and device.type == "cuda", stack=stack)
    yield from run.train(progress, stop)
    return run.record()


class Run:
    """The state of one run: model, optimiser, generator and position.

    Args:
        config: The run.
        folder: Where its files are.
        task: Its task.
        device: Where to train.
        team: The processes that train it.
        shared: Other runs use the device at the same time, so that it has no seconds of its own.
        stack: Runs that take their steps together with it; None if there are none.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        task: Task,
        device: torch.device,
        team: Team | None = None,
        *,
        shared: bool = False,
        stack: Stack | None = None,
    ) -> None:
        self.config, self.folder, self.task, self.device = config, folder, task, device
        self.team, self.shared = team or Team(), shared
        self.model: Network = build_model(
            config, task.shape, torch.Generator().manual_seed(2 * config.seed)
        ).to(device)
        self.together: nn.Module = self.team.wrapped(self.model)
        self.optimizer = build_optimizer(self.model, config, task.likelihood, self.together)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(2 * config.seed + 1)
        self.epoch_state = self.generator.get_state()
        self.position = Position()
        self.steps_per_epoch = -(-task.examples // config.batch_size)
        self.sums, self.test_sums = torch.zeros(2, 2, dtype=torch.float64, device=device).unbind()
        self.cause: str | None = None
        self.accelerator = Accelerator(self)
        self.stack = stack if stack is not None and stack.pays(self) else None
        self.shared = self.shared or self.stack is not None

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        state = load_checkpoint(self.folder / CHECKPOINT, self.config, self.model, self.optimizer)
        if state is not None:
            values, self.epoch_state = state
            self.position = Position(**values)
            self._note(self.position.history, "w")

    def train(self, progress: Progress, stop: Callable[[], bool]) -> Iterator[tuple[int, int]]:
        """Train from the last checkpoint to the end; yields epoch and example after each step.

        A loss that stops being finite ends the run and is its `cause`.
        """
        self.resume()
        alone = self.team.size == 1 and self.model.recordable
        self.accelerator = self.stack.join(self) if self.stack else accelerator(self, alone=alone)
        clock = StepClock(self.position, self.config.checkpoint_seconds)
        try:
            for _ in range(self.position.epoch, self.config.epochs):
                self.generator.set_state(self.epoch_state)
                plan = self.task.plan(self.config.batch_size, self.generator)
                yield from self._epoch(plan, clock, progress, stop)
                yield from self._finish_epoch(progress)
                clock.skip()
            self.save()
        except _Diverged as error:
            self.cause = str(error)
        finally:
            if self.stack:
                self.stack.leave(self)

    def record(self) -> dict[str, Any]:
        """What the run has found."""
        config, history = self.config, self.position.history
        tail = history[-max(1, min(10, config.epochs // 10)) :]
        last = history[-1] if history else {}
        return {
            **{name: getattr(config, name) for name in ("dataset", "model", "width", "seed", "lr")},
            "structure": config.label,
            "params": sum(p.numel() for p in self.model.parameters()),
            "macs": self.model.macs(),
            **{
                name: sum(h[name] for h in tail) / len(tail) if tail else None
                for name in ("train_loss", "train_error")
            },
            **{name: last.get(name) for name in ("test_loss", "test_error")},
            "seconds": None if self.shared else self.position.seconds,
            "cpu_seconds": self.position.cpu_seconds,
            "status": "done" if self.cause is None else "failed",
            "cause": self.cause,
            **({"stacked": True} if self.stack else {}),
            "examples": self.position.epoch * self.task.examples + self.position.start,
            "epochs": self.position.epoch,
            "device": self.device.type,
            "machine": machine(self.device),
            "id": config.id,
            **({} if config.optimizer == "adamw" else {"optimizer": config.optimizer}),
        }

    def save(self) -> None:
        """Write a checkpoint; that of a finished run keeps the weights only."""
        if not self.team.leads:
            return
        self.accelerator.wait()
        finished = self.position.epoch == self.config.epochs
        optimizer = None if finished else self.optimizer
        save_checkpoint(
            self.folder / CHECKPOINT,
            self.config,
            self.model,
            optimizer,
            vars(self.position),
            self.epoch_state,
        )

    def _epoch(
        self, plan: Draws, clock: StepClock, progress: Progress, stop: Callable[[], bool]
    ) -> Iterator[tuple[int, int]]:
        """The rest of one epoch."""
        at, n = self.position, self.task.examples
        before = [at.loss_sum, at.error_sum] if self.team.leads else [0.0, 0.0]
        self.sums.copy_(torch.tensor(before, dtype=torch.float64))
        self.model.train()
        while at.start < n:
            self._step(plan)
            at.start = min(at.start + self.config.batch_size, n)
            clock.lap()
            yield at.epoch, at.start  # before anything is asked of the step: others may share it
            clock.skip()
            stopping, saving, reporting = self.team.any(
                [stop(), clock.save_due(), clock.report_due()]
            )
            if stopping or saving or reporting:
                self._read_sums()
                clock.lap()
                progress(self._fraction(), self._standing())
            if stopping or saving:
                self.save()
                clock.skip()
            if stopping:
                raise Interrupted(
                    f"Run {self.config.id} stopped in epoch {at.epoch + 1} of {self.config.epochs}."
                )
            clock.lap()
        self.accelerator.settle()
        clock.lap()

    def _step(self, plan: Draws) -> None:
        """One batch."""
        at, size = self.position, self.config.batch_size
        done = at.epoch * self.steps_per_epoch + at.start // size
        factor = 0.5 * (1 + math.cos(math.pi * done / (self.config.epochs * self.steps_per_epoch)))
        self.accelerator.step(self.task.batch(plan, at.start, size), factor)

    def update(self, batch: Batch) -> None:
        """Move the weights along the gradient of one batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._score(self.together, batch, self.sums).loss
        if self.config.experts > 1:
            loss = loss + routing_loss(self.model)
        loss.backward()
        self.optimizer.step()

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        return self.task.test_batches()

    @torch.no_grad()
    def test(self, batches: Iterable[Batch]) -> None:
        """Add loss and error on the test set to `test_sums`."""
        for batch in batches:
            self._score(self.model, batch, self.test_sums)

    def _score(self, model: nn.Module, batch: Batch, sums: Tensor) -> Score:
        """This process' share of a batch; its mean loss, weighted, is averaged over the team."""
        mine, weight = self.team.share(len(batch.inputs))
        if self.team.size > 1:
            batch = batch.part(mine)
        score = self.task.score(model(batch.inputs), batch)
        if weight > 0:
            sums += torch.stack([score.loss_sum.double(), score.error_sum.double()])
        return score if self.team.size == 1 else score._replace(loss=score.loss * weight)

    def _read_sums(self) -> None:
        """Know the loss and the error so far; stop if they are not finite."""
        at = self.position
        self.accelerator.wait()
        at.loss_sum, at.error_sum = self.team.total(self.sums)
        if not math.isfinite(at.loss_sum):
            raise _Diverged(f"the loss was {at.loss_sum} in epoch {at.epoch + 1}")

    def _finish_epoch(self, progress: Progress) -> Iterator[tuple[int, int]]:
        """Evaluate, note the metrics, and move to the next epoch."""
        at, n = self.position, self.task.examples
        self.model.eval()
        self.test_sums.zero_()
        self.accelerator.test()
        yield (
            at.epoch,
            n,
        )  # runs side by side all queue their work before the first waits for its numbers
        self._read_sums()
        progress(self._fraction(), self._standing())
        tested = self.team.total(self.test_sums)
        test_loss, test_error = (total / self.task.tests for total in tested)
        at.history.append(
            {
                "epoch": at.epoch + 1,
                "train_loss": at.loss_sum / n,
                "train_error": 100 * at.error_sum / n,
                "test_loss": test_loss,
                "test_error": 100 * test_error,
                "seconds": at.seconds,
            }
        )
        at.epoch, at.start, at.loss_sum, at.error_sum = at.epoch + 1, 0, 0.0, 0.0
        self.epoch_state = self.generator.get_state()
        self._note(at.history[-1:], "a")

    def _note(self, entries: Sequence[Mapping[str, Any]], mode: Literal["a", "w"]) -> None:
        """Write the metrics of epochs to the file of the run, one line for each."""
        if self.team.leads:
            with (self.folder / METRICS).open(mode, encoding="utf-8") as file:
                file.writelines(f"{json.dumps(entry)}\n" for entry in entries)

    def _fraction(self) -> float:
        """Share of the run that is done."""
        return (self.position.epoch + self.position.start / self.task.examples) / self.config.epochs

    def _standing(self) -> dict[str, Any]:
        """Numbers for a progress line."""
        at = self.position
        last = at.history[-1] if at.history else {}
        return {
            "epoch": at.epoch + 1,
            "epochs": self.config.epochs,
            "examples": at.epoch * self.task.examples + at.start,
            "seconds": at.seconds,
            "train_loss": at.loss_sum / max(at.start, 1),
            "train_error": 100 * at.error_sum / max(at.start, 1),
            "test_error": last.get("test_error"),
        }


def _silent(fraction: float, info: Mapping[str, Any]) -> None:
    """Tell nobody."""


def _never() -> bool:
    """Go on."""
    return False
