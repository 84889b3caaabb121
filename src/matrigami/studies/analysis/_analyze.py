"""The question "which structure does this matrix have?".

For each structure, in each order of rows and columns, the error for every storage; the same for
null models that share the entries, the norm, or the singular values; ranks against sizes of
blocks; what a member does as an operator. A structure is present where the error is below that of
every null model that counts, by a factor of 2 and by three standard deviations, and below that of
low rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import LinearOperator, Structure
from matrigami.studies.analysis._families import Blocks, Family, Place, projected
from matrigami.studies.analysis._growth import growth
from matrigami.studies.analysis._input import check_names, checked_matrix, point_pair, rounding_of
from matrigami.studies.analysis._judge import findings_of
from matrigami.studies.analysis._measure import (
    Arrangement,
    Question,
    arrangements,
    curves_of,
    null_errors,
)
from matrigami.studies.analysis._metrics import Metric, measured, standard_metrics
from matrigami.studies.analysis._orderings import ORDERINGS, inverse, traits_of
from matrigami.studies.analysis._partitions import strong, weak
from matrigami.studies.analysis._result import Analysis, Finding
from matrigami.studies.analysis._table import FAMILIES

Progress = Callable[[int, int], None]
"""Told how many of how many parts are done."""

HIERARCHICAL = ("blr", "hodlr", "h")
"""Structures whose blocks are drawn."""

SHOWN_VALUES = 200
"""Singular values that are kept."""


def analyze(
    A: Tensor | LinearOperator | Any,
    structures: Sequence[str | Structure] | None = None,
    points: Tensor | tuple[Tensor, Tensor] | None = None,
    orderings: Sequence[str] = ORDERINGS,
    budget: float = 0.1,
    *,
    draws: int = 5,
    metrics: Mapping[str, Metric] | None = None,
    name: str = "matrix",
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Which structure a matrix has: error against storage, null models, a verdict in words.

    `E(s) = min ||A - B||_F / ||A||_F` over the members `B` with at most `s m n` numbers, in each
    order. The gain is the error of null models, with the same search for orders, over that of the
    matrix; a structure is present as the top of this module says, at `budget`, or else at `2.5
    budget` or `budget / 2`.

    Args:
        A: The matrix, `m x n`, a tensor, an array or an operator.
        structures: Names out of `FAMILIES`, or recipes; by default all families.
        points: Coordinates `(n, d)` of rows and columns, or a pair of them: for `geometric` order,
            and for which blocks are admissible in it.
        orderings: Names of orders; those that do not exist for the matrix are left out.
        budget: Storage at which structures are compared, a fraction of the dense matrix.
        draws: Of each null model that keeps the singular values; of the others there is one.
        metrics: Functions of a dense member of the size of `A`; those of solutions with a positive
            definite matrix are always measured.
        name: Of the matrix, in the result.
        seed: Of random orders and null models.
        progress: Told the parts done, and all.

    Returns:
        The findings and the verdict.

    Raises:
        ValueError: If it is not a finite real matrix other than zero, a name is unknown, or it
            would not fit into memory.

    Examples:
        >>> x = torch.linspace(0, 1, 64, dtype=torch.float64)
        >>> found = analyze(torch.exp(-(x[:, None] - x).abs()), ["low_rank", "hodlr"], budget=0.3)
        >>> found.structure, found["hodlr"].best[0] < 1e-3
        ('hodlr', True)
    """
    W = checked_matrix(A, budget, draws)
    check_names("orderings", orderings, ORDERINGS)
    question = Question(
        families=_families(structures),
        orderings=tuple(dict.fromkeys(["given", *orderings])),
        storages=(budget, min(2.5 * budget, 1.0), budget / 2),
        draws={"spectrum": draws, "norms": draws, "gaussian": 1, "shuffled": 1},
        seed=seed,
        points=point_pair(points, W),
        rounding=rounding_of(A),
    )
    return _answered(W, question, dict(metrics or {}), name, progress)


def _families(structures: Sequence[str | Structure] | None) -> list[Family]:
    """The families of names and recipes."""
    if structures is None:
        return list(FAMILIES.values())
    check_names("structures", [s for s in structures if isinstance(s, str)], FAMILIES)
    return [
        FAMILIES[s] if isinstance(s, str) else projected(repr(s), [s], world="both")
        for s in structures
    ]


def _answered(
    A: Float[Tensor, "m n"],
    question: Question,
    metrics: dict[str, Metric],
    name: str,
    progress: Progress | None,
) -> Analysis:
    """Errors, null models, judgement."""
    done = 0

    def tick() -> None:
        """One part more is done."""
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, question.parts)

    traits, place = traits_of(A), Place((A.shape[0], A.shape[1]))
    arranged = arrangements(A, traits, question, question.orderings, place)
    curves = curves_of(arranged, question.families, tick)
    nulls = null_errors(A, traits, question, place, tick)
    findings = findings_of(question.families, curves, nulls, question.storages, question.rounding)
    metrics = {**standard_metrics(A, traits.symmetric), **metrics}
    if metrics:
        findings = _with_metrics(findings, question, arranged, metrics)
    values = torch.linalg.svdvals(A)
    shown = torch.linspace(0, len(values) - 1, min(len(values), SHOWN_VALUES)).long()
    blocks, blocks_of = _blocks(findings, question, arranged)
    return Analysis(
        name=name,
        shape=place.size,
        storages=question.storages,
        findings=tuple(findings),
        singular_values=(values / values[0])[shown].tolist(),
        exponents={o: _exponents(several[0]) for o, several in arranged.items()},
        blocks=blocks,
        blocks_of=blocks_of,
        rounding=question.rounding,
    )


def _exponents(arranged: Arrangement) -> dict[str, dict[str, float | None]]:
    """Of the growth of ranks, by weak and by strong admissibility."""
    A, place = arranged.matrix, arranged.place
    return {
        "weak": growth(A, weak(*place.size)),
        "strong": growth(A, strong(*place.size, place.admissible())),
    }


def _with_metrics(
    findings: Sequence[Finding],
    question: Question,
    arranged: Mapping[str, Sequence[Arrangement]],
    metrics: Mapping[str, Metric],
) -> list[Finding]:
    """What the best member of each structure does, in the given order of the matrix."""
    found = []
    for family, finding in zip(question.families, findings, strict=True):
        a = arranged[finding.ordering][0]
        B = family.member(a.matrix, a.place, question.storages[0])
        rows, columns = map(inverse, a.order)
        found.append(replace(finding, metrics=measured(B[rows][:, columns], metrics)))
    return found


def _blocks(
    findings: Sequence[Finding],
    question: Question,
    arranged: Mapping[str, Sequence[Arrangement]],
) -> tuple[list[list[int]], tuple[str, str]]:
    """The ranks of the blocks of the best hierarchical member at the budget."""
    pairs = [
        (finding, family)
        for finding, family in zip(findings, question.families, strict=True)
        if finding.structure in HIERARCHICAL and isinstance(family, Blocks)
    ]
    if not pairs:
        return [], ("", "")
    finding, family = min(pairs, key=lambda pair: pair[0].best[0])
    a = arranged[finding.ordering][0]
    part = family.best_partition(a.matrix, a.place, question.storages[0])
    rows: list[list[int]] = []
    for places, (ranks, most) in zip(
        part.places, family.ranks(a.matrix, part, question.storages[0]), strict=True
    ):
        corners = places[:, 0, 0].tolist()
        n, size = part.size[1], list(places.shape[1:])
        rows += [
            [corner // n, corner % n, *size, int(rank), most]
            for corner, rank in zip(corners, ranks, strict=True)
            if corner < part.size[0] * n
        ]
    return rows, (finding.structure, finding.ordering)
