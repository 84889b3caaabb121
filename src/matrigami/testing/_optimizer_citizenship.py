"""The laws of an optimiser as a citizen of torch: saving, schedules, scalers, hooks, groups."""

import copy
import io
import pickle
import warnings

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from matrigami.optim import MatrixOptimizer
from matrigami.testing._expectations import expect, expect_close, expect_equal
from matrigami.testing._optimizer_laws import SHAPES
from matrigami.testing._optimizer_targets import (
    Factory,
    classification,
    feed,
    gradients,
    parameters,
)


def resumes_exactly(factory: Factory) -> None:
    """Saved, loaded with `weights_only=True` and continued is the same to the last bit."""
    steps = 24
    whole = parameters(*SHAPES)
    stream = gradients(whole, steps)
    feed(factory(whole, lr=0.1), whole, stream)
    for cut in (1, 5, 9, 10, 11, 20):  # at refreshes and between them
        ps = parameters(*SHAPES)
        first = factory(ps, lr=0.1)
        feed(first, ps, stream[:cut])
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        second = factory(qs, lr=0.7)
        second.load_state_dict(_through_a_file(first.state_dict()))
        feed(second, qs, stream[cut:])
        for p, q in zip(whole, qs, strict=True):
            expect(torch.equal(p, q), f"a run that was resumed after {cut} steps is another one")


def _through_a_file(state: dict) -> dict:
    """Save and load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies_exactly(factory: Factory) -> None:
    """A deep copy and a pickled copy go on as the original does."""
    ps = parameters(*SHAPES)
    stream = gradients(ps, 20)
    optimizer = factory(ps, lr=0.1)
    feed(optimizer, ps, stream[:7])
    deep = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))  # noqa: S301 - our own bytes
    feed(optimizer, ps, stream[7:])
    for twin in (deep, pickled):
        qs = [q for group in twin.param_groups for q in group["params"]]
        feed(twin, qs, stream[7:])
        expect(all(map(torch.equal, ps, qs)), "a copy of the optimiser goes another way")


def takes_what_torch_takes(factory: Factory) -> None:
    """Parameters, named parameters and groups; a learning rate of each group, or a tensor."""
    stream = gradients(parameters(*SHAPES), 3)

    def run(shape_of_source: int, lr: float | Tensor) -> list[Tensor]:
        """Three steps."""
        ps = parameters(*SHAPES)
        sources = (
            ps,
            [(f"p{i}", p) for i, p in enumerate(ps)],
            [{"params": ps[:2]}, {"params": ps[2:], "lr": lr}],
        )
        feed(factory(sources[shape_of_source], lr=lr), ps, stream)
        return [p.detach() for p in ps]

    expected = run(0, 0.1)
    for i, lr in ((1, 0.1), (2, 0.1), (0, torch.tensor(0.1, dtype=torch.float64))):
        for p, q in zip(run(i, lr), expected, strict=True):
            expect_close(p, q, "the same parameters from another source", 1e-12)


def follows_schedules_and_closures(factory: Factory) -> None:
    """Schedulers, closures, step hooks and groups that are added later work; `grad` is left."""
    target = classification()
    optimizer = factory(target.model, lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> Tensor:
        """The loss, with gradients."""
        optimizer.zero_grad()
        loss = target.loss(target.model)
        loss.backward()
        return loss

    before = target.loss(target.model)
    expect_close(optimizer.step(closure).detach(), before.detach(), "the loss of the closure", 0.0)
    scheduler.step()
    expect_close(torch.tensor(optimizer.param_groups[0]["lr"]), torch.tensor(0.01), "the rate")
    grads = [p.grad for p in target.model.parameters() if p.grad is not None]
    copies = [G.clone() for G in grads]
    optimizer.step()
    expect(all(map(torch.equal, grads, copies)), "a step has changed a gradient")
    expect_equal(len(calls), 2, "the number of calls of a hook")
    late = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    group: dict = {"params": [late]}
    if "param_names" in optimizer.param_groups[0]:
        group = {"params": [("late", late)]}
    optimizer.add_param_group(group)
    optimizer.add_param_group({"params": []})
    late.grad = torch.ones_like(late)
    with warnings.catch_warnings():  # one that watches a model may say that this is not of it
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    expect(bool((late != 1).any()), "a parameter that was added later has not moved")


def works_with_scalers(factory: Factory) -> None:
    """`GradScaler` unscales, skips a step with an infinity, and clipping works in between."""
    target, plain = classification(), classification()
    optimizer, other = factory(target.model, lr=0.1), factory(plain.model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        for t, o in ((target, optimizer), (plain, other)):
            o.zero_grad()
            loss = t.loss(t.model)
            (scaler.scale(loss) if o is optimizer else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(target.model.parameters(), 0.1)
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        other.step()
    for p, q in zip(target.model.parameters(), plain.model.parameters(), strict=True):
        expect_close(p.detach(), q.detach(), "a parameter trained with a scaler", 1e-9)
    _skips_infinite(optimizer, target.model, scaler)


def _skips_infinite(
    optimizer: MatrixOptimizer, model: nn.Module, scaler: torch.amp.GradScaler
) -> None:
    """The scaler leaves out the whole step."""
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros((), dtype=torch.float64))
    scaler.step(optimizer)
    scaler.update()
    same = all(map(torch.equal, before, model.parameters()))
    expect(same, "a step that the scaler skips has moved a parameter")


def ignores_autocast(factory: Factory) -> None:
    """A step inside of `torch.autocast` is the same to the bit."""
    ps, qs = (parameters((5, 4), (4,), dtype=torch.float32) for _ in range(2))
    stream = gradients(ps, 4)
    feed(factory(ps, lr=0.1), ps, stream)
    optimizer = factory(qs, lr=0.1)
    with torch.autocast("cpu"):
        feed(optimizer, qs, stream)
    expect(all(map(torch.equal, ps, qs)), "a step inside of autocast is another one")


def waits_for_gradients(factory: Factory) -> None:
    """A parameter without a gradient stays as it is, with its state, and joins when it has one."""
    ps, qs = parameters((4, 3), (4, 3)), parameters((4, 3), (4, 3))
    stream = gradients(ps, 6)
    first, second = factory(ps, lr=0.1), factory(qs, lr=0.1)
    for t, Gs in enumerate(stream):
        ps[0].grad, ps[1].grad = Gs[0].clone(), Gs[1].clone() if t in {1, 2, 5} else None
        before = ps[1].detach().clone()
        first.step()
        moved = not torch.equal(ps[1].detach(), before)
        expect_equal(moved, t in {1, 2, 5}, f"whether the second parameter moves at step {t}")
    feed(second, qs, stream)
    expect_equal(int(first.state[ps[1]]["step"]), 3, "the steps of a parameter")
    expect_equal(int(first.state[ps[1]]["skipped"]), 0, "its skipped steps")


CITIZENSHIP_LAWS = (
    resumes_exactly,
    copies_exactly,
    takes_what_torch_takes,
    follows_schedules_and_closures,
    works_with_scalers,
    waits_for_gradients,
    ignores_autocast,
)
"""The laws of this file."""
