"""Several structures for one matrix, of which the nearest in a metric is looked for.

A search in a metric takes many times as long as a projection without one, and after a few steps it
is seen who can still be the best: each search is begun, and only those that come near the best are
carried through.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from matrigami.operators import LinearOperator, Structure, project

FEW = 2
"""Steps after which candidates are compared: rounds over all tensors, which get far."""

HOPEFUL = 1.15
"""Times the least loss after these that a candidate may have to be carried through: the later steps
gain a tenth to a third, of all candidates nearly alike."""

Tried = list[tuple[Structure, LinearOperator]]
"""Structures, and a member of each."""


def hopeful(
    recipes: Sequence[Structure],
    W: Float[Tensor, "m n"],
    loss: Callable[[LinearOperator], float],
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tried:
    """Members near to a matrix: in a metric only of the structures that can be the best.

    Args:
        recipes: The structures.
        W: The matrix.
        loss: What members are judged by; not negative.
        left: Metric of the rows, or None.
        right: Metric of the columns, or None.
    """

    def searched(some: Sequence[Structure], **how: int) -> Tried:
        """The nearest member of each that is found."""
        return [(recipe, project(recipe, W, left=left, right=right, **how)) for recipe in some]

    if len(recipes) == 1 or (left is None and right is None):
        return searched(recipes)
    losses = [loss(A) for _, A in searched(recipes, steps=FEW)]
    limit = HOPEFUL * min(losses)
    return searched([r for r, far in zip(recipes, losses, strict=True) if far <= limit])
