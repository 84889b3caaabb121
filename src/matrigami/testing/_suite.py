"""Run the laws and say which one breaks, for what, at which size."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from matrigami.operators import LinearOperator, Structure
from matrigami.testing._algebra_laws import ALGEBRA_LAWS
from matrigami.testing._derivative_laws import DERIVATIVE_LAWS
from matrigami.testing._expectations import complexified
from matrigami.testing._habit_laws import HABIT_LAWS
from matrigami.testing._question_laws import QUESTION_LAWS
from matrigami.testing._structure_laws import STRUCTURE_LAWS, member, refuses_in_one_voice
from matrigami.testing._torch_laws import TORCH_LAWS

Size = tuple[int, int]

SMALL = 16
"""Most entries of a member that is differentiated twice in every way."""

MIDDLING = 24
"""Most entries of a member that is tried in complex numbers, too."""

OPERATOR_LAWS = (
    *ALGEBRA_LAWS,
    *HABIT_LAWS,
    *QUESTION_LAWS,
    *TORCH_LAWS,
    *DERIVATIVE_LAWS,
)
"""The laws of a value: functions of a matrix."""

LAWS = (*STRUCTURE_LAWS, *OPERATOR_LAWS)
"""Every law, of recipes and of values."""

SIZES: tuple[Size, ...] = (
    (1, 1),
    (1, 5),
    (5, 1),
    (4, 4),
    (4, 6),
    (6, 4),
    (6, 6),
    (7, 7),
    (7, 3),
    (12, 8),
    (9, 16),
    (16, 16),
)
"""Rows and columns: one, primes, squares, rectangles both ways, sizes that do not factor."""


def check_operator(A: LinearOperator, laws: Iterable[Callable[..., None]] = OPERATOR_LAWS) -> None:
    """Check that every rule of a value agrees with `A.dense()`.

    Args:
        A: A single matrix (no batch axes) in double precision, real or complex.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names the law and the value.

    Examples:
        >>> import torch
        >>> from matrigami import DiagonalMatrix
        >>> check_operator(DiagonalMatrix(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    """
    for law in laws:
        enforce(law, repr(A), A)


def check_structure(
    recipe: Structure,
    sizes: Iterable[Size] | None = None,
    laws: Collection[Callable[..., None]] = LAWS,
) -> None:
    """Check a structure: its values against their dense matrices, its `init` and its projection.

    A size that the recipe refuses must be refused by `init` and `project` alike, with a
    `ValueError` of at most three lines; at least one size must be accepted.

    Args:
        recipe: The structure, e.g. `Monarch(blocks=2)`.
        sizes: Rows and columns to try; `SIZES` by default.
        laws: Some of `LAWS`; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names the law, the recipe and the size.

    Examples:
        >>> from matrigami import Diagonal
        >>> check_structure(Diagonal(), sizes=[(2, 3), (3, 3)])
    """
    tried = tuple(SIZES if sizes is None else sizes)
    accepted = [size for size in tried if not refuses_in_one_voice(recipe, *size)]
    if not accepted:
        raise AssertionError(f"{recipe} refuses all of the sizes {tried}")
    for m, n in accepted:
        A = member(recipe, m, n)
        for law in laws:
            if law in OPERATOR_LAWS:
                _enforce_on_value(law, f"{recipe} at {m}x{n}", A)
            else:
                enforce(law, f"{recipe} at {m}x{n}", recipe, m, n)


def _enforce_on_value(law: Callable[..., None], what: str, A: LinearOperator) -> None:
    """A law of operators, on a member and on a complex one, where they are small enough for it."""
    size, derivative = A.shape[-2] * A.shape[-1], law in DERIVATIVE_LAWS
    if size <= SMALL or not derivative:
        enforce(law, what, A)
    if size <= (SMALL if derivative else MIDDLING):
        enforce(law, f"a complex {what}", complexified(A))


def enforce(law: Callable[..., None], where: str, *subject: Any) -> None:
    """Call a law; whatever it raises becomes a report of the breach."""
    try:
        law(*subject)
    except Exception as error:
        reason = str(error) if isinstance(error, AssertionError) else f"raised {error!r}"
        raise AssertionError(f"{where} breaks the law {law.__name__!r}: {reason}") from error
