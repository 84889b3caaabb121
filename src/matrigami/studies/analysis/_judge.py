"""From errors to findings: the best order, the gain, and whether a structure is there."""

import statistics
from collections.abc import Mapping, Sequence

from matrigami.studies.analysis._curves import Curve
from matrigami.studies.analysis._families import Family
from matrigami.studies.analysis._result import BETTER, DEVIATIONS, PRESENT, TRACE, Finding

CLEARLY = 0.8
"""An order is taken before one named earlier if its error is at most this part."""

COUNTING = ("spectrum", "norms", "gaussian")
"""Null models that a structure is held against; low rank, which they share, against the last."""


def findings_of(
    families: Sequence[Family],
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    nulls: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    storages: Sequence[float],
    rounding: float,
) -> list[Finding]:
    """One finding for each structure.

    Args:
        families: The structures.
        curves: For each structure and order its curves.
        nulls: For each structure and null model, at each storage, the errors of the draws.
        storages: Where errors are compared; the first decides on the order.
        rounding: Errors below this are not told apart when an order is chosen.
    """
    low = curves.get("low_rank")
    bounds = [float("inf") for _ in storages]
    if low is not None:
        curve = next(iter(low.values()))[0]
        bounds = [BETTER * curve.at(s) for s in storages]
    return [
        _finding(f, curves[f.name], nulls[f.name], storages, bounds, rounding) for f in families
    ]


def _mean_errors(curves: Sequence[Curve], storages: Sequence[float]) -> list[float]:
    """The errors of several curves at each storage."""
    return [statistics.fmean(c.at(s) for c in curves) for s in storages]


def _against(
    nulls: Sequence[Sequence[Sequence[float]]], i: int, error: float
) -> tuple[float, bool]:
    """How much lower an error is than those of null models, and whether it is below all of them."""
    gain = min((statistics.fmean(draws[i]) / error for draws in nulls), default=1.0)
    return gain, all(error < _lower_end(draws[i]) for draws in nulls)


def _finding(
    family: Family,
    curves: Mapping[str, Sequence[Curve]],
    nulls: Mapping[str, Sequence[Sequence[float]]],
    storages: Sequence[float],
    bounds: Sequence[float],
    rounding: float,
) -> Finding:
    """The finding of one structure."""
    errors = {name: _mean_errors(several, storages) for name, several in curves.items()}
    ordering = _best_order(errors, rounding)
    own, is_low = errors[ordering], family.name == "low_rank"
    counting = [nulls[m] for m in (COUNTING[-1:] if is_low else COUNTING) if m in nulls]
    gains, clear = [], []
    for i, error in enumerate(own):
        gain, below = _against(counting, i, error)
        gains.append(gain)
        clear.append(below and (is_low or error < bounds[i]))
    return Finding(
        structure=family.name,
        label=family.label,
        world=family.world,
        optimal=family.optimal,
        ordering=ordering,
        errors=errors,
        nulls=nulls,
        curves={name: _points(curves[name][0]) for name in {next(iter(curves)), ordering}},
        gains=gains,
        present=[c and g >= PRESENT for c, g in zip(clear, gains, strict=True)],
        traces=[c and g >= TRACE for c, g in zip(clear, gains, strict=True)],
    )


def _best_order(errors: Mapping[str, Sequence[float]], rounding: float) -> str:
    """The first order whose error at the budget is near the lowest; random ones do not count."""
    first = next(iter(errors))
    own = {n: max(e[0], rounding) for n, e in errors.items() if n != "random" or n == first}
    return next(name for name, error in own.items() if CLEARLY * error <= min(own.values()))


def _lower_end(errors: Sequence[float]) -> float:
    """Three standard deviations below the mean."""
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return statistics.fmean(errors) - DEVIATIONS * spread


def _points(curve: Curve) -> dict[str, list[float]]:
    """A curve for JSON, with few digits."""
    thin = curve.thinned()
    return {
        "storage": [float(f"{s:.5g}") for s in thin.storage.tolist()],
        "error": [float(f"{e:.4g}") for e in thin.error.tolist()],
    }
