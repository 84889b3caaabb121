"""One training loop for every task, model and optimiser: cosine to zero, checkpoints, metrics.

All random numbers come from two generators seeded by the run: one for the initial weights, one
whose state at the start of an epoch determines the epoch. A checkpoint is a single safetensors
file, written aside and renamed; a run that resumes from it repeats the uninterrupted one bit by
bit. Several processes may train one run together; see `_team.py`.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.studies._checkpoint import load_checkpoint, save_checkpoint
from matrigami.studies._config import RunConfig
from matrigami.studies._models import Model, build_model
from matrigami.studies._optimizers import build_optimizer
from matrigami.studies._record import write_atomic
from matrigami.studies._tasks import Batch, Plan, Score, Task, load_task
from matrigami.studies._team import Team

Progress = Callable[[float, Mapping[str, Any]], None]
"""Told about once a second: the fraction of the run that is done, and where it stands."""

CHECKPOINT = Path("ckpt") / "state.safetensors"
METRICS = "metrics.jsonl"
REPORT_SECONDS = 1.0


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """A run was stopped on request and has written its checkpoint."""


class _Diverged(Exception):  # noqa: N818 - caught here
    """The loss of a run is no longer finite."""


@dataclass
class Position:
    """How far a run has come, beyond its tensors.

    Args:
        epoch: Finished epochs.
        start: Examples of the current epoch that are done.
        loss_sum: Sum of their losses.
        error_sum: Sum of their errors.
        seconds: Time spent in training steps, without evaluation and files.
        cpu_seconds: Processor time of the same.
        history: Metrics of each finished epoch.
    """

    epoch: int = 0
    start: int = 0
    loss_sum: float = 0.0
    error_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class _Clock:
    """Time of the training steps, added to a position, and what is due at intervals."""

    def __init__(self, position: Position, checkpoint_seconds: float) -> None:
        self.position, self.checkpoint_seconds = position, checkpoint_seconds
        self.reported = self.saved = time.monotonic()
        self.skip()

    def lap(self) -> None:
        """Add the time since the last call."""
        wall, cpu = self.started
        self.skip()
        self.position.seconds += self.started[0] - wall
        self.position.cpu_seconds += self.started[1] - cpu

    def skip(self) -> None:
        """Leave out the time since the last call."""
        self.started = (time.perf_counter(), time.process_time())

    def report_due(self) -> bool:
        """Whether to report now; if so, the interval begins again."""
        due = time.monotonic() - self.reported >= REPORT_SECONDS
        self.reported = time.monotonic() if due else self.reported
        return due

    def save_due(self) -> bool:
        """Whether to write a checkpoint now; if so, the interval begins again."""
        due = time.monotonic() - self.saved >= self.checkpoint_seconds
        self.saved = time.monotonic() if due else self.saved
        return due


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
    run.resume()
    cause = None
    try:
        run.train(progress or _silent, stop or _never)
    except _Diverged as error:
        cause = str(error)
    return run.record(cause)


class Run:
    """The state of one run: model, optimiser, generator and position.

    Args:
        config: The run.
        folder: Where its files are.
        task: Its task.
        device: Where to train.
        team: The processes that train it.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        task: Task,
        device: torch.device,
        team: Team | None = None,
    ) -> None:
        self.config, self.folder, self.task, self.device = config, folder, task, device
        self.team = team or Team()
        self.model: Model = build_model(
            config, task.shape, torch.Generator().manual_seed(2 * config.seed)
        ).to(device)
        self.together: nn.Module = self.team.wrapped(self.model)
        self.optimizer = build_optimizer(self.model, config, task.likelihood, self.together)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(2 * config.seed + 1)
        self.epoch_state = self.generator.get_state()
        self.position = Position()
        self.steps_per_epoch = -(-task.examples // config.batch_size)

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        state = load_checkpoint(self.folder / CHECKPOINT, self.config, self.model, self.optimizer)
        if state is not None:
            values, self.epoch_state = state
            self.position = Position(**values)

    def train(self, progress: Progress, stop: Callable[[], bool]) -> None:
        """Train to the end."""
        clock = _Clock(self.position, self.config.checkpoint_seconds)
        for _ in range(self.position.epoch, self.config.epochs):
            self.generator.set_state(self.epoch_state)
            plan = self.task.plan(self.config.batch_size, self.generator)
            self._epoch(plan, clock, progress, stop)
            self._finish_epoch()
            clock.skip()
        self.save()

    def record(self, cause: str | None = None) -> dict[str, Any]:
        """What the run has found; `cause` is why it failed."""
        config, history = self.config, self.position.history
        tail = history[-max(1, min(10, config.epochs // 10)) :]
        last = history[-1] if history else {}
        return {
            **{
                name: getattr(config, name)
                for name in ("dataset", "model", "structure", "width", "seed", "lr")
            },
            "params": sum(p.numel() for p in self.model.parameters()),
            "macs": self.model.macs(),
            **{
                name: sum(h[name] for h in tail) / len(tail) if tail else None
                for name in ("train_loss", "train_error")
            },
            **{name: last.get(name) for name in ("test_loss", "test_error")},
            "seconds": self.position.seconds,
            "cpu_seconds": self.position.cpu_seconds,
            "status": "done" if cause is None else "failed",
            "cause": cause,
            "examples": self.position.epoch * self.task.examples + self.position.start,
            "epochs": self.position.epoch,
            "device": self.device.type,
            "id": config.id,
            **({} if config.optimizer == "adamw" else {"optimizer": config.optimizer}),
        }

    def save(self) -> None:
        """Write a checkpoint; that of a finished run keeps the weights only."""
        if not self.team.leads:
            return
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
        self, plan: Plan, clock: _Clock, progress: Progress, stop: Callable[[], bool]
    ) -> None:
        """The rest of one epoch."""
        at, n = self.position, self.task.examples
        before = [at.loss_sum, at.error_sum] if self.team.leads else [0.0, 0.0]
        sums = torch.tensor(before, dtype=torch.float64, device=self.device)
        self.model.train()
        while at.start < n:
            self._step(plan, sums)
            at.start = min(at.start + self.config.batch_size, n)
            stopping, saving, reporting = self.team.any(
                [stop(), clock.save_due(), clock.report_due()]
            )
            if stopping or saving or reporting or at.start == n:
                at.loss_sum, at.error_sum = self.team.total(sums)
                clock.lap()
                self._refuse_divergence()
                progress(self._fraction(), self._standing())
            if stopping or saving:
                self.save()
                clock.skip()
            if stopping:
                raise Interrupted(
                    f"Run {self.config.id} stopped in epoch {at.epoch + 1} of {self.config.epochs}."
                )

    def _step(self, plan: Plan, sums: Tensor) -> None:
        """One batch."""
        at, size = self.position, self.config.batch_size
        done = at.epoch * self.steps_per_epoch + at.start // size
        factor = 0.5 * (1 + math.cos(math.pi * done / (self.config.epochs * self.steps_per_epoch)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        batch = self.task.batch(plan, at.start, size)
        self.optimizer.zero_grad(set_to_none=True)
        self._score(self.together, batch, sums).loss.backward()
        self.optimizer.step()

    def _score(self, model: nn.Module, batch: Batch, sums: Tensor) -> Score:
        """This process' share of a batch; its mean loss, weighted, is averaged over the team."""
        mine, weight = self.team.share(len(batch.inputs))
        if self.team.size > 1:
            batch = batch.part(mine)
        score = self.task.score(model(batch.inputs), batch)
        if weight > 0:
            sums += torch.stack([score.loss_sum.double(), score.error_sum.double()])
        return score if self.team.size == 1 else score._replace(loss=score.loss * weight)

    def _refuse_divergence(self) -> None:
        """Stop if the loss is not finite."""
        at = self.position
        if not math.isfinite(at.loss_sum):
            raise _Diverged(f"the loss was {at.loss_sum} in epoch {at.epoch + 1}")

    def _finish_epoch(self) -> None:
        """Evaluate, note the metrics, and move to the next epoch."""
        at, n = self.position, self.task.examples
        test_loss, test_error = self._evaluate()
        metrics = {
            "epoch": at.epoch + 1,
            "train_loss": at.loss_sum / n,
            "train_error": 100 * at.error_sum / n,
            "test_loss": test_loss,
            "test_error": test_error,
            "seconds": at.seconds,
        }
        at.history.append(metrics)
        at.epoch, at.start, at.loss_sum, at.error_sum = at.epoch + 1, 0, 0.0, 0.0
        self.epoch_state = self.generator.get_state()
        lines = [json.dumps(entry) for entry in at.history]
        if self.team.leads:
            write_atomic(self.folder / METRICS, "\n".join(lines) + "\n")

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Loss and error in percent on the test set."""
        self.model.eval()
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        for batch in self.task.test_batches():
            self._score(self.model, batch, sums)
            count += len(batch.inputs)
        loss, error = (total / count for total in self.team.total(sums))
        return loss, 100 * error

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
