"""What the laws of optimisers train on: four targets, and streams of gradients.

Shapes: b = examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from matrigami.nn import StructuredLinear
from matrigami.optim import MatrixOptimizer
from matrigami.structures import BlockTensorTrain, Kronecker, LowRank, Monarch
from matrigami.testing._expectations import random

Factory = Callable[..., MatrixOptimizer]
"""An optimiser class, or one with some options filled in by `functools.partial`."""


class Target(NamedTuple):
    """A model and its loss, and a learning rate at which it falls."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


def least_squares() -> Target:
    """A badly scaled linear regression with an exact solution."""
    X = random(32, 6, seed=1) * torch.logspace(0, -1, 6, dtype=torch.float64)
    Y = X @ random(6, 4, seed=2)
    return Target(linear(6, 4), lambda model: (model(X) - Y).square().mean())


def classification() -> Target:
    """Two layers, four classes."""
    X = random(48, 5, seed=3)
    y = (X @ random(5, 4, seed=4)).argmax(-1)
    model = nn.Sequential(linear(5, 8, seed=5), nn.Tanh(), linear(8, 4, seed=6))
    return Target(model, lambda net: nn.functional.cross_entropy(net(X), y))


def factorisation() -> Target:
    """`U V'` of rank 2 from its entries: not convex."""
    W = random(6, 2, seed=7) @ random(2, 5, seed=8)
    model = nn.Sequential(linear(5, 2, seed=9, bias=False), linear(2, 6, seed=10, bias=False))
    eye = torch.eye(5, dtype=torch.float64)
    return Target(model, lambda net: (net(eye).mT - W).square().mean())


def structured() -> Target:
    """Four structures one after the other."""
    recipes = (Monarch(blocks=2), BlockTensorTrain(rank=2), LowRank(rank=3), Kronecker())
    generator = torch.Generator().manual_seed(11)
    layers = [
        StructuredLinear(8, 8, recipe, generator=generator, dtype=torch.float64)
        for recipe in recipes
    ]
    X = random(32, 8, seed=12)
    Y = X @ random(8, 2, seed=13) @ random(2, 8, seed=14) / 4
    return Target(nn.Sequential(*layers), lambda net: (net(X) - Y).square().mean())


TARGETS: tuple[Callable[[], Target], ...] = (
    least_squares,
    classification,
    factorisation,
    structured,
)
"""Every optimiser has to make progress on all four."""


def linear(n: int, m: int, seed: int = 0, *, bias: bool = True) -> nn.Linear:
    """A layer in double precision that depends on nothing but its arguments."""
    layer = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(random(*p.shape, seed=100 * seed + i) / n**0.5)
    return layer


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Parameters of given shapes."""
    return [nn.Parameter(random(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]


def gradients(like: list[nn.Parameter], steps: int, seed: int = 50) -> list[list[Tensor]]:
    """A stream of gradients for some parameters."""
    return [
        [random(*p.shape, seed=seed + 1000 * i + t, dtype=p.dtype) for i, p in enumerate(like)]
        for t in range(steps)
    ]


def feed(
    optimizer: torch.optim.Optimizer, ps: list[nn.Parameter], stream: list[list[Tensor]]
) -> None:
    """A step for each set of gradients."""
    for Gs in stream:
        for p, G in zip(ps, Gs, strict=True):
            p.grad = G.clone()
        optimizer.step()


def descend(target: Target, optimizer: torch.optim.Optimizer, steps: int) -> tuple[float, float]:
    """Train on a target, the learning rate falling to zero; the losses before and after."""
    first = target.loss(target.model).item()
    rates = [group["lr"] for group in optimizer.param_groups]
    for t in range(steps):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - t / steps)
        optimizer.zero_grad()
        target.loss(target.model).backward()
        optimizer.step()
    return first, target.loss(target.model).item()
