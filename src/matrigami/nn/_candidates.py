"""Several structures for one matrix, of which the nearest in a metric is looked for.

A search in a metric takes many times as long as a projection without one, and after a few steps it
is seen who can still be the best: each search is begun, and only those that come near the best go
on from there.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from matrigami.operators import LinearOperator, Structure, Target, metric_of, nearing, project
from matrigami.operators._projection import ROUNDS

FEW = 2
"""Steps after which candidates are compared: rounds over all tensors, which get far."""

HOPEFUL = 1.15
"""Times the least loss after these that a candidate may have to go on: the later steps gain a tenth
to a third, of all candidates nearly alike."""

MORE = 12
"""Steps after which those that are left are compared again."""

CLOSE = 1.03
"""Times the least loss after these that a candidate may have to be carried through."""

Tried = list[tuple[Structure, LinearOperator]]
"""Structures, and a member of each."""

Loss = Callable[[LinearOperator], float]
"""What members are judged by; not negative."""


@dataclass(frozen=True)
class Approach:
    """A search for the nearest member of one structure, as far as it has come.

    Attributes:
        recipe: The structure.
        target: The matrix and the metric.
        judge: What members are judged by.
        found: The nearest member so far, or where to begin; None for projections.
        ended: Whether it goes no further: a closed form, or steps that gain no more.
    """

    recipe: Structure
    target: Target
    judge: Loss
    found: LinearOperator | None = None
    ended: bool = False

    def further(self, steps: int) -> "Approach":
        """After more steps."""
        if self.ended:
            return self
        told: list[Any] = []
        options = {"steps": steps, "progress": lambda *now: told.append(now)}
        A = nearing(self.recipe, self.target, start=self.found, **options)
        return replace(self, found=A, ended=len(told) < steps)

    @cached_property
    def loss(self) -> float:
        """That of what was found."""
        return self.judge(self.found)  # pyright: ignore[reportArgumentType]


def begun(
    recipes: Sequence[Structure],
    target: Target,
    judge: Loss,
    starts: Mapping[Structure, LinearOperator | None] | None = None,
) -> list[Approach]:
    """Searches that come near the best after a few steps.

    Args:
        recipes: The structures.
        target: The matrix and the metric.
        judge: What members are judged by.
        starts: Where to begin, by structure.
    """
    first = [Approach(recipe, target, judge, (starts or {}).get(recipe)) for recipe in recipes]
    return _near_best([one.further(FEW) for one in first], HOPEFUL)


def gone_on(begun: list[Approach]) -> list[Approach]:
    """The searches that stay near the best after more steps."""
    return _near_best([one.further(MORE) for one in begun], CLOSE)


def carried_through(begun: list[Approach]) -> Tried:
    """The members to which searches come in the end."""
    return [(one.recipe, one.further(ROUNDS).found) for one in begun]  # pyright: ignore[reportReturnType]


def _near_best(found: list[Approach], factor: float) -> list[Approach]:
    """Those whose loss is at most so many times the least."""
    limit = factor * min(one.loss for one in found)
    return [one for one in found if one.loss <= limit]


def hopeful(
    recipes: Sequence[Structure],
    W: Float[Tensor, "m n"],
    judge: Loss,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tried:
    """Members near to a matrix: in a metric only of the structures that can be the best.

    Args:
        recipes: The structures.
        W: The matrix.
        judge: What members are judged by.
        left: Metric of the rows, or None.
        right: Metric of the columns, or None.
    """
    if left is None and right is None:
        return [(recipe, project(recipe, W)) for recipe in recipes]
    found = begun(recipes, Target(W, metric_of(W, left, right)), judge)
    return carried_through(gone_on(found) if len(found) > 1 else found)
