"""What an analysis found, as values that go to JSON and back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from matrigami.studies.analysis._nulls import NULLS
from matrigami.studies.analysis._orderings import LABELS

PRESENT = 2.0
"""The gain over every null model from which a structure is called present."""

TRACE = 1.1
"""The gain from which there is a trace of it."""

DEVIATIONS = 3.0
"""Standard deviations of the null models that the error must be below their mean."""

BETTER = 0.9
"""The most error, relative to low rank of the same storage, that a structure may have."""

NEAR = 1.25
"""Errors up to this multiple of the lowest count as reaching it."""

ROUNDING = 1e-6
"""Errors below are exact, at least: entries may have been in single precision, or in less."""

SAME = 1.02
"""Storages within this ratio are the same: the structure named first is taken."""


@dataclass(frozen=True)
class Finding:
    """One structure on one matrix.

    Args:
        structure: Its name.
        label: What people call it.
        world: Where it comes from: `HPC`, `AI` or both.
        optimal: Whether the members are the best ones or quasi-best.
        ordering: The order with the lowest error at the budget; the given one unless another is
            clearly better.
        errors: For each order the error at each of the storages; of random orders the mean.
        nulls: For each null model the errors of its draws at each of the storages, each the lowest
            of the same search for orders.
        curves: Storage and error along the curve, for the given and for the best order.
        gains: At each storage the error of the null models over that of the matrix, the lowest of
            the models that count.
        present: At each storage whether the structure is there.
        traces: At each storage whether there is at least a trace of it.
        metrics: What the best member of this storage does, by the name of the metric.
    """

    structure: str
    label: str
    world: str
    optimal: bool
    ordering: str
    errors: Mapping[str, Sequence[float]]
    nulls: Mapping[str, Sequence[Sequence[float]]]
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    gains: Sequence[float]
    present: Sequence[bool]
    traces: Sequence[bool]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Sequence[float]:
        """The errors at the storages in the best order."""
        return self.errors[self.ordering]

    def storage_of(self, error: float) -> float:
        """The least storage with at most this error in the best order, or infinity."""
        curve = self.curves[self.ordering]
        pairs = zip(curve["storage"], curve["error"], strict=True)
        return next((s for s, e in pairs if e <= error), math.inf)

    def words(self, i: int) -> str:
        """Name, order and gain at a storage."""
        where = "" if self.ordering == "given" else f" after {LABELS[self.ordering]}"
        return f"{self.label}{where}: {{}}, gain {times(self.gains[i])}"


@dataclass(frozen=True)
class Analysis:
    """Which structure a matrix has, and the evidence.

    Args:
        name: Of the matrix.
        shape: Rows and columns.
        storages: Where errors are compared, fractions of the dense one; the first is the budget.
        findings: One for each structure.
        singular_values: Relative to the largest, at most 200 of them, evenly spaced.
        exponents: For each order, by `weak` and `strong` admissibility, the exponent of the growth
            of ranks for each accuracy; None where sizes are too few.
        blocks: Blocks of the best hierarchical member: row, column, rows, columns, rank, rank that
            stands for a whole block.
        blocks_of: The structure and the order of these blocks.
        notes: What was done to the matrix before, such as cutting a corner.
        rounding: Errors below are exact: that of the type which the entries came in.
    """

    name: str
    shape: tuple[int, int]
    storages: tuple[float, ...]
    findings: tuple[Finding, ...]
    singular_values: Sequence[float]
    exponents: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    blocks: Sequence[Sequence[int]]
    blocks_of: tuple[str, str]
    notes: Sequence[str] = ()
    rounding: float = ROUNDING

    def __getitem__(self, structure: str) -> Finding:
        """The finding of one structure."""
        return {f.structure: f for f in self.findings}[structure]

    @property
    def structure(self) -> str | None:
        """The name of the structure that the verdict names; None if there is none."""
        found = judged(self.findings, self.storages, self.rounding)
        return None if found is None else found[0].structure

    @property
    def verdict(self) -> str:
        """In one sentence."""
        return verdict_of(self.findings, self.storages, self.rounding)[0]

    @property
    def evidence(self) -> list[str]:
        """What it rests on, sentence by sentence."""
        return verdict_of(self.findings, self.storages, self.rounding)[1]

    def __str__(self) -> str:
        """The verdict and its evidence."""
        m, n = self.shape
        return "\n".join(
            [f"{self.name} ({m}x{n}): {self.verdict}", *map("  {}".format, self.evidence)]
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"verdict": self.verdict, "evidence": self.evidence, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Analysis":
        """The inverse of `to_json`."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        findings = tuple([_finding(finding) for finding in values["findings"]])
        pairs = {key: tuple(values[key]) for key in ("shape", "storages", "blocks_of")}
        return cls(**{**own, "findings": findings, **pairs})


def _finding(values: Mapping[str, Any]) -> Finding:
    """From JSON, which has null for an infinite metric."""
    metrics = {k: math.inf if v is None else v for k, v in values["metrics"].items()}
    return Finding(**{**values, "metrics": metrics})


def judged(
    findings: Sequence[Finding], storages: Sequence[float], rounding: float = ROUNDING
) -> tuple[Finding, int] | None:
    """The structure that is present, and the index of the storage that shows it.

    An exact one at the least storage; else at the first storage where any is present: of those
    whose error is within a quarter of the lowest, the one that reaches it with the least storage.
    Low rank only if there is no other.
    """
    for i, chosen in _candidates(findings, storages, rounding):
        if chosen:
            return _thriftiest(chosen, i, rounding), i
    return None


def _candidates(
    findings: Sequence[Finding], storages: Sequence[float], rounding: float
) -> Iterator[tuple[int, list[Finding]]]:
    """What may be the answer: first what is exact, from the least storage; then what is present."""
    for i in sorted(range(len(storages)), key=lambda i: storages[i]):
        yield i, [f for f in findings if f.present[i] and f.best[i] <= rounding]
    for i in range(len(storages)):
        yield i, _rather_than_low_rank([f for f in findings if f.present[i]])


def _rather_than_low_rank(findings: list[Finding]) -> list[Finding]:
    """Low rank only if there is no other."""
    return [f for f in findings if f.structure != "low_rank"] or findings


def _thriftiest(findings: Sequence[Finding], i: int, rounding: float) -> Finding:
    """The one with the least storage for nearly the lowest error."""
    target = max(NEAR * min(f.best[i] for f in findings), rounding)
    near = [f for f in findings if f.best[i] <= target]
    least = min(f.storage_of(target) for f in near)
    return next(f for f in near if f.storage_of(target) <= SAME * least)


def verdict_of(
    findings: Sequence[Finding], storages: Sequence[float], rounding: float = ROUNDING
) -> tuple[str, list[str]]:
    """The sentence, and what it rests on."""
    found = judged(findings, storages, rounding)
    if found is None:
        return _no_structure(findings, storages)
    finding, i = found
    others = [f for f in findings if f.present[i] and f.structure != finding.structure]
    others = sorted(others, key=lambda f: f.best[i])[:3]
    evidence = [_evidence(f, i, storages) for f in (finding, *others)]
    return finding.words(i).format("present"), [*evidence, *_orders(finding, i)]


def _no_structure(findings: Sequence[Finding], storages: Sequence[float]) -> tuple[str, list[str]]:
    """The sentence where none is present, with the nearest, and what it rests on."""
    low = next((f for f in findings if f.structure == "low_rank"), None)
    decays = low is not None and low.gains[0] >= TRACE
    verdict = "no structure" + (" beyond a decaying spectrum" if decays else "")
    traces = sorted(
        [f for f in findings if f.traces[0] and f is not low], key=lambda f: -f.gains[0]
    )
    if traces:
        verdict += f"; {traces[0].words(0).format('a trace')}"
    nearest = sorted(findings, key=lambda f: f.best[0])[:3]
    shown = {f.structure: f for f in [*traces[:1], *([low] if low else []), *nearest]}
    return verdict, [_evidence(f, 0, storages) for f in shown.values()]


def _evidence(finding: Finding, i: int, storages: Sequence[float]) -> str:
    """Errors of the matrix and of its null models."""
    kind = "" if finding.optimal else " (quasi-best)"
    own = f"{finding.label}{kind}, {LABELS[finding.ordering]}"
    models = [f"{NULLS[name]} {_mean(draws[i]):.2g}" for name, draws in finding.nulls.items()]
    return (
        f"{own}: error {finding.best[i]:.2g} at {storages[i]:.1%} storage; null models: "
        f"{', '.join(models)}."
    )


def _orders(finding: Finding, i: int) -> list[str]:
    """What the order does to the structure."""
    if len(finding.errors) < 2:
        return []
    parts = [f"{errors[i]:.2g} in {LABELS[name]}" for name, errors in finding.errors.items()]
    return [f"{finding.label} by order: {', '.join(parts)}."]


def _mean(values: Sequence[float]) -> float:
    """The average."""
    return sum(values) / max(len(values), 1)


def times(gain: float) -> str:
    """A gain for people.

    Examples:
        >>> times(165.3), times(1.08), times(2e9)
        ('165x', '1.1x', 'over 100000x')
    """
    return f"{gain:.1f}x" if gain < 10 else f"{gain:.0f}x" if gain < 1e5 else "over 100000x"
