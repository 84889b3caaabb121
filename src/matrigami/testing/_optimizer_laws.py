"""The laws of an optimiser's mathematics: progress, robustness, precision, equality with itself.

Each law is a function of a factory: an optimiser class, with or without options.
"""

import torch
from torch import Tensor, nn

from matrigami.optim import MatrixOptimizer
from matrigami.testing._expectations import expect, expect_close, expect_equal, random
from matrigami.testing._optimizer_targets import (
    TARGETS,
    Factory,
    descend,
    feed,
    gradients,
    parameters,
)

SHAPES = ((4, 3), (4, 3), (3, 5), (5,), ())
"""Two matrices that share a stack, one that does not, a vector and a scalar."""


def converges(factory: Factory) -> None:
    """The loss of each of four targets falls to less than a fifth, at one of four rates."""
    for make in TARGETS:
        ratios = []
        for lr in (0.3, 0.1, 0.03, 0.01):
            target = make()
            optimizer = factory(target.model, lr=lr, weight_decay=0.0)
            first, last = descend(target, optimizer, steps=150)
            ratios.append(last / first)
            if ratios[-1] < 0.2:
                break
        expect(ratios[-1] < 0.2, f"the loss of {make.__name__} falls to {ratios} of the first")


def equals_its_reference(factory: Factory) -> None:
    """A step is `p - lr (U + wd p)` with `U` from `direction`, called by hand for each matrix."""
    (p,) = parameters((4, 3))
    optimizer = factory([p], lr=0.1, weight_decay=0.2)
    view, options = optimizer.param_groups[0]["views"][0], dict(optimizer.param_groups[0])
    stream = [Gs[0] for Gs in gradients([p], 12)]
    expected, method = p.detach().clone(), type(optimizer)
    state = method.init(view.split(stream[0]), options)
    state |= {"step": torch.zeros(view.stack[0])}
    for t, G in enumerate(stream, 1):
        feed(optimizer, [p], [[G]])
        state |= {"offset": optimizer.state[p]["offset"]}
        U, after = method.direction(view.split(G), state, options | {"clock": t})
        state = state | after | {"step": state["step"] + 1}
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * view.merge(U)
        expect_close(p.detach(), expected, f"the parameter after step {t}", 1e-9)


def direction_is_pure(factory: Factory) -> None:
    """`direction` changes neither the gradient nor the state that it is given."""
    (p,) = parameters((4, 3))
    optimizer = factory([p])
    feed(optimizer, [p], gradients([p], 3))
    group = optimizer.param_groups[0]
    G = group["views"][0].split(random(4, 3, seed=9))
    state = {k: S for k, S in optimizer.state[p].items() if k not in {"skipped", "seeded"}}
    state |= {"step": state["step"].expand(len(G))}
    before, kept = {k: S.clone() for k, S in state.items()}, G.clone()
    for clock in range(4, 15):
        type(optimizer).direction(G, state, group | {"clock": clock})
    expect(torch.equal(G, kept), "the gradient has changed")
    changed = [k for k, S in state.items() if not torch.equal(S, before[k])]
    expect_equal(changed, [], "the entries of the state that have changed")


def batching_is_invisible(factory: Factory) -> None:
    """Parameters that share stacks are trained as each of them would be alone."""
    ps = parameters(*SHAPES)
    stream = gradients(ps, 14)
    together = factory(ps, lr=0.1)
    feed(together, ps, stream[:1])
    alone = []
    for i, p in enumerate(ps):
        q = nn.Parameter(p.detach().clone())
        single = factory([q], lr=0.1)
        feed(single, [q], [[stream[0][i]]])
        q.data.copy_(p.detach())
        single.state[q]["offset"] = together.state[p].get("offset", torch.zeros(1, 2))
        single.load_state_dict(single.state_dict())  # takes over its turn in the cycle
        feed(single, [q], [[Gs[i]] for Gs in stream[1:]])
        alone.append(q.detach())
    feed(together, ps, stream[1:])
    for p, q in zip(ps, alone, strict=True):
        expect_close(p.detach(), q, f"the parameter of shape {tuple(p.shape)}", 1e-8)


def bad_gradients_are_skipped(factory: Factory) -> None:
    """A NaN or Inf skips its parameter and nothing else; the state stays finite; it recovers."""
    for bad in (float("nan"), float("inf"), 1e200):
        for when in (0, 4, 10):
            _skips(factory, bad, when)


def _skips(factory: Factory, bad: float, when: int) -> None:
    """One bad entry in the second parameter at one step."""
    clean, hurt = parameters(*SHAPES), parameters(*SHAPES)
    stream = gradients(clean, 13)
    spoiled = [[G.clone() for G in Gs] for Gs in stream]
    spoiled[when][1][0, 0] = bad
    ours = factory(hurt, lr=0.1)
    feed(ours, hurt, spoiled[:when])
    before = hurt[1].detach().clone()
    feed(ours, hurt, spoiled[when : when + 1])
    expect(torch.equal(hurt[1].detach(), before), f"a gradient with {bad} has moved its parameter")
    feed(ours, hurt, spoiled[when + 1 :])
    feed(factory(clean, lr=0.1), clean, stream)
    for i in (0, 2, 3, 4):
        same = torch.equal(clean[i].detach(), hurt[i].detach())
        expect(same, f"{bad} in one gradient at step {when} has changed another parameter")
    entries = [S for p in hurt for S in ours.state[p].values()]
    expect(all(bool(S.isfinite().all()) for S in entries), f"{bad} has entered the state")
    expect_equal(int(ours.state[hurt[1]]["skipped"]), 1, "the number of skipped steps")
    moved = not torch.equal(hurt[1].detach(), before)
    expect(moved and bool(hurt[1].isfinite().all()), f"training has not gone on after {bad}")


def poor_gradients_are_harmless(factory: Factory) -> None:
    """Zero gradients move nothing; gradients of rank one move everything by finite amounts."""
    ps = parameters(*SHAPES)
    start = [p.detach().clone() for p in ps]
    optimizer = factory(ps, lr=0.1, weight_decay=0.0)
    feed(optimizer, ps, [[torch.zeros_like(p) for p in ps]] * 2)
    for p, before in zip(ps, start, strict=True):
        expect(torch.equal(p.detach(), before), "a gradient of zeros has moved its parameter")
    one = [torch.ones_like(p) for p in ps]
    feed(optimizer, ps, [one] * 12 + [[torch.zeros_like(p) for p in ps]] * 3)
    for p, before in zip(ps, start, strict=True):
        moved = (p.detach() - before).abs().max()
        expect(0.01 < float(moved) < 100, f"gradients of rank one have moved it by {moved}")


def low_precision_parameters(factory: Factory) -> None:
    """bfloat16 parameters have a state in float32, and keep it when it is loaded."""
    ps = parameters(*SHAPES, dtype=torch.bfloat16)
    optimizer, stream = factory(ps, lr=0.1), gradients(ps, 13)
    feed(optimizer, ps, stream)
    twins = parameters(*SHAPES, dtype=torch.bfloat16)
    other = factory(twins, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(ps, twins, strict=True):
        expect_equal(p.dtype, torch.bfloat16, "the dtype of a parameter")
        expect(bool(p.isfinite().all()), "a parameter is not finite")
        _same_state(optimizer, p, other, q)
        floats = {S.dtype for S in other.state[q].values() if S.is_floating_point()}
        expect_equal(floats, {torch.float32}, "the dtypes of the state")


def _same_state(ours: MatrixOptimizer, p: Tensor, theirs: MatrixOptimizer, q: Tensor) -> None:
    """Both states are equal to the last bit."""
    expect_equal(sorted(ours.state[p]), sorted(theirs.state[q]), "the names in the state")
    for name, S in ours.state[p].items():
        expect(torch.equal(S, theirs.state[q][name]), f"{name} has changed on the way")


def decay_is_decoupled(factory: Factory) -> None:
    """Weight decay multiplies the parameter by `1 - lr wd` and enters nothing else."""
    ps, qs = parameters(*SHAPES), parameters(*SHAPES)
    one = gradients(ps, 1)
    feed(factory(ps, lr=0.1, weight_decay=0.0), ps, one)
    feed(factory(qs, lr=0.1, weight_decay=0.5), qs, one)
    for p, q, start in zip(ps, qs, parameters(*SHAPES), strict=True):
        expect_close(q.detach(), p.detach() - 0.05 * start.detach(), "the decayed parameter", 1e-9)


def turns_with_its_coordinates(factory: Factory) -> None:
    """Turning all gradients by orthogonal `A` and `B` turns the trajectory, where declared."""
    probe = factory(parameters((4, 3)))
    if not type(probe).is_equivariant(probe.defaults):
        return
    A, B = (torch.linalg.qr(random(k, k, seed=k)).Q for k in (4, 3))
    (p,) = parameters((4, 3))
    q = nn.Parameter(A @ p.detach() @ B.mT)
    stream = gradients([p], 25)
    feed(factory([p], lr=0.01), [p], stream)
    feed(factory([q], lr=0.01), [q], [[A @ G @ B.mT] for (G,) in stream])
    expect_close(q.detach(), A @ p.detach() @ B.mT, "the turned trajectory", 1e-4)


def ignores_the_scale_of_the_loss(factory: Factory) -> None:
    """Multiplying all gradients by a constant changes only the weight of `eps`, if declared."""
    probe = factory(parameters((4, 3)))
    if not type(probe).is_scale_invariant(probe.defaults):
        return
    ps, qs = parameters(*SHAPES), parameters(*SHAPES)
    stream = gradients(ps, 13)
    feed(factory(ps, lr=0.1), ps, stream)
    feed(factory(qs, lr=0.1), qs, [[64 * G for G in Gs] for Gs in stream])
    for p, q in zip(ps, qs, strict=True):
        expect_close(q.detach(), p.detach(), "the trajectory of a scaled loss", 1e-5)


MATHEMATICS_LAWS = (
    converges,
    equals_its_reference,
    direction_is_pure,
    batching_is_invisible,
    bad_gradients_are_skipped,
    poor_gradients_are_harmless,
    low_precision_parameters,
    decay_is_decoupled,
    turns_with_its_coordinates,
    ignores_the_scale_of_the_loss,
)
"""The laws of this file."""
