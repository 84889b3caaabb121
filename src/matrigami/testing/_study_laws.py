"""The laws of what a study trains: of a task, and of a model on a shape of task.

Shapes: b = examples in a batch, f = features of an example, o = outputs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from matrigami.studies import (
    Batch,
    Network,
    RunConfig,
    Shape,
    Task,
    build_model,
    build_optimizer,
    counted_macs,
)
from matrigami.testing._expectations import expect, expect_close, expect_equal
from matrigami.testing._suite import enforce

BATCH = 7
"""Examples in a batch of the laws: no divisor of usual numbers."""

ROUNDING = 1e-4
"""Relative error of single precision."""

STEPS = 6
"""After so many steps every parameter of a model has had a gradient, in spite of zeros at first."""


def an_epoch_is_a_function_of_the_generator(task: Task) -> None:
    """The same state gives the same batches, in any order; the next state gives others."""
    generator = torch.Generator().manual_seed(1)
    plans = [task.plan(BATCH, generator)]
    after = generator.get_state()
    plans += [task.plan(BATCH, generator)]
    again = task.plan(BATCH, torch.Generator().manual_seed(1))
    starts = list(range(0, task.examples, BATCH))[:3]
    batches = [task.batch(plans[0], start, BATCH) for start in starts]
    for start, batch in reversed(list(zip(starts, batches, strict=True))):
        same = task.batch(again, start, BATCH)
        expect(_equal(batch, same), f"the batch at {start} differs when it is made again")
    generator.set_state(after)
    second = task.batch(task.plan(BATCH, generator), 0, BATCH)
    expect(_equal(second, task.batch(plans[1], 0, BATCH)), "a second epoch differs when made again")
    expect(not _equal(second, batches[0]), "all epochs are the same")


def an_epoch_has_its_examples(task: Task) -> None:
    """Batches are as long as asked for, the last one shorter."""
    plan = task.plan(BATCH, torch.Generator().manual_seed(0))
    start = task.examples - task.examples % BATCH
    start = start if start < task.examples else task.examples - BATCH
    for at in (0, max(0, start)):
        wanted = min(BATCH, task.examples - at)
        batch = task.batch(plan, at, BATCH)
        expect_equal(tuple(batch.inputs.shape), (wanted, task.shape.features), "a batch's shape")
        expect_equal(len(batch.targets), wanted, "the number of its targets")


def inputs_are_of_the_kind_of_the_task(task: Task) -> None:
    """Single precision and finite, or token numbers of the vocabulary."""
    batch = _first(task)
    if task.shape.is_text:
        expect_equal(batch.inputs.dtype, torch.int64, "the type of token numbers")
        inside = bool((batch.inputs >= 0).all() and (batch.inputs < task.shape.outputs).all())
        expect(inside, f"token numbers are not from 0 to {task.shape.outputs - 1}")
        return
    expect_equal(batch.inputs.dtype, torch.float32, "the type of features")
    expect(bool(torch.isfinite(batch.inputs).all()), "features are not finite")


def the_test_set_is_whole(task: Task) -> None:
    """Its batches have the examples that it says, twice the same."""
    first, second = list(task.test_batches()), list(task.test_batches())
    expect_equal(sum(len(batch.inputs) for batch in first), task.tests, "examples of the test set")
    same = all(_equal(a, b) for a, b in zip(first, second, strict=True))
    expect(same, "the test set differs when it is asked for again")


def scores_are_sums(task: Task) -> None:
    """Of loss and error over the examples; the loss is their mean and has a slope."""
    for batch in (_first(task), next(task.test_batches())):
        outputs = _outputs(task, len(batch.inputs)).requires_grad_()
        score = task.score(outputs, batch)
        expect_equal(tuple(score.loss.shape), (), "the shape of the loss")
        total = score.loss.detach() * len(batch.inputs)
        expect_close(score.loss_sum, total, "the sum of the losses", ROUNDING)
        expect(float(score.error_sum) >= 0, f"the sum of the errors is {float(score.error_sum)}")
        score.loss.backward()
        slope = outputs.grad
        expect(slope is not None and bool((slope != 0).any()), "the loss has no slope")


def the_likelihood_takes_its_outputs(task: Task) -> None:
    """A number for the outputs and targets of the test set, as curvature asks for it."""
    batch = next(task.test_batches())
    loss = task.likelihood(_outputs(task, len(batch.inputs)), batch.targets)
    expect(bool(torch.isfinite(loss)) and loss.ndim == 0, f"the likelihood gives {loss}")


TASK_LAWS: tuple[Callable[[Task], None], ...] = (
    an_epoch_is_a_function_of_the_generator,
    an_epoch_has_its_examples,
    inputs_are_of_the_kind_of_the_task,
    the_test_set_is_whole,
    scores_are_sums,
    the_likelihood_takes_its_outputs,
)
"""Every law of a task."""


def check_task(task: Task, *, laws: Iterable[Callable[[Task], None]] = TASK_LAWS) -> None:
    """Check that a task is what a study can train on.

    Args:
        task: The task, of at least ten examples.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names it.

    Examples:
        >>> from matrigami.studies import TeacherTask
        >>> check_task(TeacherTask(width=8, layers=2, samples=20))
    """
    for law in laws:
        enforce(law, type(task).__name__, task)


def sizes_are_known_without_numbers(config: RunConfig, shape: Shape) -> None:
    """On `meta` the same parameters and multiply-adds."""
    real, empty = _model(config, shape), build_model(config, shape, device="meta")
    sizes = [[(n, tuple(p.shape)) for n, p in m.named_parameters()] for m in (real, empty)]
    expect_equal(sizes[1], sizes[0], "the list of parameters without numbers")
    expect_equal(empty.macs(), real.macs(), "the multiply-adds without numbers")


def weights_are_a_function_of_the_generator(config: RunConfig, shape: Shape) -> None:
    """The same seed gives the same model."""
    first, second = (_model(config, shape).state_dict() for _ in range(2))
    different = [name for name, t in first.items() if not torch.equal(t, second[name])]
    expect(not different, f"{different} differ when the model is built again")


def examples_do_not_see_each_other(config: RunConfig, shape: Shape) -> None:
    """Outputs have their shape, and those of a batch are those of each example alone."""
    model, x = _trained(config, shape).eval(), _examples(shape)
    with torch.no_grad():
        y, alone = model(x), torch.cat([model(row[None]) for row in x])
    wanted = (len(x), shape.outputs, *([shape.channels] if shape.is_text else []))
    expect_equal(tuple(y.shape), wanted, "the shape of the outputs")
    expect_close(y, alone, "a batch of examples one by one", ROUNDING)


def every_parameter_learns(config: RunConfig, shape: Shape) -> None:
    """Each has one learning rate, and after a few steps each has had a gradient."""
    model = _model(config, shape)
    groups = build_optimizer(model, config).param_groups
    rates = [p for group in groups for p in group["params"]]
    expect_equal(len(rates), len(list(model.parameters())), "the number of learning rates")
    moved = _trained(config, shape).state_dict()
    still = [n for n, p in model.named_parameters() if torch.equal(p.detach(), moved[n])]
    expect(not still, f"{still} do not move")


def multiply_adds_are_counted(config: RunConfig, shape: Shape) -> None:
    """No more than torch counts, and no less than half: a causal score need not be whole."""
    model = _model(config, shape).eval()
    counted, _ = counted_macs(model, _examples(shape)[:1])
    expect(counted / 2 <= model.macs() <= counted, f"macs() is {model.macs()}, counted {counted}")


MODEL_LAWS: tuple[Callable[[RunConfig, Shape], None], ...] = (
    sizes_are_known_without_numbers,
    weights_are_a_function_of_the_generator,
    examples_do_not_see_each_other,
    every_parameter_learns,
    multiply_adds_are_counted,
)
"""Every law of a model."""


def check_model(
    config: RunConfig,
    shape: Shape,
    *,
    laws: Iterable[Callable[[RunConfig, Shape], None]] = MODEL_LAWS,
) -> None:
    """Check that a model is what a study can train.

    Args:
        config: A run of the model.
        shape: Sizes of the task.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names it.

    Examples:
        >>> config = RunConfig("x", "mlp", "dense", 8, seed=0, lr=0.01, epochs=1, batch_size=4)
        >>> check_model(config, Shape(channels=1, side=4, outputs=3))
    """
    for law in laws:
        enforce(law, config.model, config, shape)


def _equal(a: Batch, b: Batch) -> bool:
    """Whether two batches are the same, bit by bit."""
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def _first(task: Task) -> Batch:
    """A batch for training."""
    return task.batch(task.plan(BATCH, torch.Generator().manual_seed(0)), 0, BATCH)


def _outputs(task: Task, n: int) -> Tensor:
    """Random answers."""
    sizes = (n, task.shape.outputs, *([task.shape.channels] if task.shape.is_text else []))
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def _examples(shape: Shape) -> Tensor:
    """Random examples."""
    generator = torch.Generator().manual_seed(3)
    if shape.is_text:
        return torch.randint(shape.outputs, (4, shape.features), generator=generator)
    return torch.randn(4, shape.features, generator=generator, dtype=torch.float32)


def _model(config: RunConfig, shape: Shape) -> Network:
    """The model of a run."""
    return build_model(config, shape, torch.Generator().manual_seed(2 * config.seed))


def _trained(config: RunConfig, shape: Shape) -> nn.Module:
    """The model after a few steps."""
    model, x = _model(config, shape), _examples(shape)
    optimizer = build_optimizer(model, config)
    goal = torch.linspace(-1, 1, shape.outputs, dtype=torch.float32)
    for _ in range(STEPS):
        y = model(x)
        loss = (y - (goal[:, None] if shape.is_text else goal)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
