"""Errors of all structures in all orders, of a matrix and of its null models."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from matrigami.studies.analysis._curves import Curve
from matrigami.studies.analysis._families import Family, Place
from matrigami.studies.analysis._nulls import Nulls
from matrigami.studies.analysis._orderings import (
    RANDOM,
    SEARCHED,
    Order,
    Traits,
    order,
)

Points = tuple[Float[Tensor, "m d"], Float[Tensor, "n d"]]
"""Coordinates of rows and of columns."""

Curves = dict[str, dict[str, list[Curve]]]
"""For each structure and order its curves: several for random orders."""

Errors = dict[str, dict[str, list[list[float]]]]
"""For each structure and null model, at each storage, the errors of the draws."""


@dataclass(frozen=True)
class Question:
    """What is asked of a matrix.

    Args:
        families: The structures.
        orderings: Names of orders.
        storages: Where errors are compared.
        draws: Of each null model.
        seed: Of random orders and null models.
        points: Coordinates of rows and columns.
        rounding: The relative error of the entries: errors below it are not told apart.
    """

    families: Sequence[Family]
    orderings: Sequence[str]
    storages: tuple[float, ...]
    draws: Mapping[str, int]
    seed: int
    points: Points | None
    rounding: float

    @property
    def parts(self) -> int:
        """Steps of the work."""
        return len(self.orderings) + sum(self.draws.values())


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A matrix in one order.

    Args:
        order: Which rows and columns come first.
        matrix: The matrix in this order.
        place: Its size, and the points in this order if blocks follow them.
    """

    order: Order
    matrix: Float[Tensor, "m n"]
    place: Place


def arrangements(
    A: Float[Tensor, "m n"], traits: Traits, question: Question, names: Iterable[str], place: Place
) -> dict[str, list[Arrangement]]:
    """The matrix in each of the orders that exist; in several random ones."""
    found = {}
    for name in names:
        seeds = range(question.seed, question.seed + (RANDOM if name == "random" else 1))
        orders = [order(name, A, traits, question.points, seed) for seed in seeds]
        if orders[0] is not None:
            found[name] = [_arranged(A, o, name, question, place) for o in orders if o is not None]
    return found


def _arranged(
    A: Float[Tensor, "m n"], found: Order, name: str, question: Question, place: Place
) -> Arrangement:
    """The matrix in one order; in geometric order blocks follow the points."""
    rows, columns = found
    if name == "geometric" and question.points is not None:
        X, Y = question.points
        place = Place(place.size, (X[rows], Y[columns]))
    return Arrangement(found, A[rows][:, columns], place)


def curves_of(
    arranged: Mapping[str, Sequence[Arrangement]],
    families: Sequence[Family],
    tick: Callable[[], None],
) -> Curves:
    """The curves of all structures in all orders; one order for those that do not depend on it."""
    found: Curves = {family.name: {} for family in families}
    first = next(iter(arranged))
    for name, several in arranged.items():
        for family in families:
            if family.ordered or name == first:
                curves = [family.curve(a.matrix, a.place) for a in several]
                found[family.name][name] = curves if family.ordered else curves[:1]
        tick()
    return found


def null_errors(
    A: Float[Tensor, "m n"],
    traits: Traits,
    question: Question,
    place: Place,
    tick: Callable[[], None],
) -> Errors:
    """The lowest errors of each null model over the given order and those made from entries.

    The models are the same in law in every order that does not look at the entries, but for their
    norms of rows and columns, so that random and geometric orders add nothing.
    """
    models = Nulls(A, traits)
    names = ["given", *[name for name in question.orderings if name in SEARCHED]]
    errors: Errors = {family.name: {} for family in question.families}
    drawn = [(model, i) for model, draws in question.draws.items() for i in range(draws)]
    for model, i in drawn:
        B = models.draw(model, question.seed + i)
        curves = curves_of(
            arrangements(B, traits, question, names, place), question.families, lambda: None
        )
        _note_lowest(errors, model, curves, question.storages)
        tick()
    return errors


def _note_lowest(errors: Errors, model: str, curves: Curves, storages: Sequence[float]) -> None:
    """Append, for each structure and storage, the lowest error over the orders."""
    for structure, by_order in curves.items():
        row = errors[structure].setdefault(model, [[] for _ in storages])
        for column, storage in zip(row, storages, strict=True):
            column.append(min(c[0].at(storage) for c in by_order.values()))
