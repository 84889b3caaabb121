"""Scaling laws of a study: exponents, the frontier, and who is better at equal compute.

The law of each structure is in `_fit_law`, the comparison in `_fit_rank`, with their sources.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matrigami.studies._fit_law import SIZES, PowerLaw, fit_power_law, law_fault
from matrigami.studies._fit_rank import Curve, curve, frontier, noise, rank
from matrigami.studies._record import Record, labelled, write_json

METRICS = ("train_error", "test_error")
"""The errors that laws are fitted to, in percent."""

METHOD = (
    "Law: least squares of log error on log MACs over all runs, plain (c MACs^-a) and with an "
    "offset (E + c MACs^-a, 0 <= E < smallest error); the one with the lower AICc, where there "
    "are 6 runs at 4 different MACs or more, else the plain one. "
    "An error of 0 has no logarithm: it is left out and counted. "
    "Seeds are runs that differ in the seed only; other runs of equal MACs are sizes of their own. "
    "Rank: by the error at the geometric middle of the range of MACs that all ranked structures "
    "cover, by linear interpolation in log-log coordinates between the two nearest sizes, "
    "mean over seeds; fewer than 3 different MACs are not ranked, and without a common range "
    "nothing is. "
    "Noise: the differences between seeds of one size, pooled over the structures of the dataset, "
    "or, where no size has two seeds, the distances from the laws. "
    "Intervals of errors: 95 % percentile bootstrap of that noise; of exponents: of the distances "
    "from the law; both widened by Student's over the normal quantile. "
    "Letters: structures that share one are not told apart. Two are told apart if the interval of "
    "the ratio of their errors excludes 1; these intervals hold for all pairs of the dataset "
    "together at 95 % (largest studentised difference, by the same bootstrap)."
)
"""How the numbers of `fit.json` come about; stored with them."""

LAW_RESAMPLES = 200
"""Most bootstrap samples of an exponent: each solves a non-linear problem if it has an offset."""


class Runs(NamedTuple):
    """The runs of a structure by what can be done with one of their errors."""

    positive: list[Record]
    zero: list[Record]
    broken: list[Record]


def fit_results(
    records: Sequence[Record], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Laws, frontier and ranking of each dataset.

    Args:
        records: Rows of `results.csv`; runs that failed are left out.
        resamples: Bootstrap samples; at most 200 of them for an exponent.
        seed: Seed of the bootstrap.

    Returns:
        What `fit.json` holds: the method, and for each dataset `structures[name][metric]`, a
        `PowerLaw` as a mapping with `seeds` and `reason` (why there is no law), and by metric
        `compute` (`macs`, `range`, `overlap`), `frontier`, `ranking` (rank, error in percent,
        interval, letters), `comparisons` (all pairs), `unranked` (why) and `noise`.

    Examples:
        >>> runs = [
        ...     {
        ...         "dataset": "d",
        ...         "structure": s,
        ...         "width": m,
        ...         "macs": m,
        ...         "seed": 0,
        ...         "status": "done",
        ...         "train_error": c * m**-0.2,
        ...         "test_error": c * m**-0.2,
        ...     }
        ...     for s, c in (("dense", 300.0), ("btt", 200.0))
        ...     for m in (10, 100, 1000)
        ... ]
        >>> [
        ...     (r["structure"], round(r["error"], 1), r["letters"])
        ...     for r in fit_results(runs)["datasets"]["d"]["ranking"]["test_error"]
        ... ]
        [('btt', 79.6, 'a'), ('dense', 119.4, 'b')]
    """
    good = [r for r in labelled(records) if r.get("status") == "done"]
    datasets = sorted({str(r["dataset"]) for r in good})
    fits = {
        name: _fit_dataset([r for r in good if r["dataset"] == name], resamples, seed)
        for name in datasets
    }
    return {"method": METHOD, "resamples": resamples, "seed": seed, "datasets": fits}


def write_fit(path: Path, result: Mapping[str, Any]) -> None:
    """Write `fit.json`."""
    write_json(path, result)


def _fit_dataset(records: Sequence[Record], resamples: int, seed: int) -> dict[str, Any]:
    """Laws, frontier and ranking of one dataset, by metric."""
    groups: dict[str, list[Record]] = {}
    for r in sorted(records, key=_order):  # so that sums end in the same bits
        groups.setdefault(str(r["structure"]), []).append(r)
    result: dict[str, Any] = {"structures": {name: {} for name in groups}}
    for metric in METRICS:
        runs = {name: _sorted_out(group, metric) for name, group in groups.items()}
        curves = {name: curve(r.positive, metric) for name, r in runs.items()}
        laws: dict[str, PowerLaw] = {}
        for name, r in runs.items():
            law, entry = _law(r, curves[name], metric, min(resamples, LAW_RESAMPLES), seed)
            result["structures"][name][metric] = entry
            laws |= {name: law} if law else {}
        for key, value in _compared(curves, laws, resamples, seed).items():
            result.setdefault(key, {})[metric] = value
    return result


def _order(r: Record) -> tuple[Any, ...]:
    """Runs by structure, cost and seed."""
    return str(r["structure"]), _number(r.get("macs")), r["width"] or 0, r["seed"] or 0


def _sorted_out(group: Sequence[Record], metric: str) -> Runs:
    """Positive errors, errors of 0, and what is no error or has no cost."""
    runs = Runs([], [], [])
    for r in group:
        error, macs = _number(r.get(metric)), _number(r.get("macs"))
        whole = error >= 0 and macs > 0
        (runs.broken if not whole else runs.positive if error > 0 else runs.zero).append(r)
    return runs


def _number(value: Any) -> float:
    """A finite number, or -1 for what is none."""
    return float(value) if isinstance(value, int | float) and isfinite(value) else -1.0


def _law(
    runs: Runs, sizes: Curve, metric: str, resamples: int, seed: int
) -> tuple[PowerLaw | None, dict[str, Any]]:
    """The law of a structure, and its entry in `fit.json`, which says why if there is none."""
    whole = [*runs.positive, *runs.zero]
    x, y = (np.array([float(r[key]) for r in whole]) for key in ("macs", metric))
    seeds = sizes.seeds.tolist()
    counts = {
        "points": len(runs.positive),
        "sizes": len(seeds),
        "seeds": [min(seeds), max(seeds)] if seeds else [0, 0],
        "zeros": len(runs.zero),
        "zero_macs": [r["macs"] for r in runs.zero],
        "broken": len(runs.broken),
    }
    fault = law_fault(x, y)
    if fault:
        empty: dict[str, Any] = dict.fromkeys(field.name for field in fields(PowerLaw))
        return None, {**empty, **counts, "reason": fault[0]}
    law = fit_power_law(x, y, resamples=resamples, seed=seed)
    return law, {**asdict(law), **counts, "reason": None}


def _compared(
    curves: Mapping[str, Curve], laws: Mapping[str, PowerLaw], resamples: int, seed: int
) -> dict[str, Any]:
    """Frontier, common compute, ranking, pairs and noise of one metric."""
    different = {name: len(np.unique(c.x)) for name, c in curves.items()}
    unranked = {
        name: f"not enough sizes: {n} different MACs with a positive error, {SIZES} are needed"
        for name, n in different.items()
        if n < SIZES
    }
    entering = {name: c for name, c in curves.items() if name not in unranked}
    compute, reason = _compute(entering)
    spread = noise(curves, laws)
    unranked |= dict.fromkeys(entering, reason) if reason else {}
    ranking, pairs = (
        rank(entering, spread.pool, float(np.log(compute["macs"])), resamples, seed)
        if compute["macs"]
        else ([], [])
    )
    return {
        "compute": compute,
        "frontier": frontier(curves),
        "ranking": ranking,
        "comparisons": pairs,
        "unranked": unranked,
        "noise": {k: v for k, v in spread._asdict().items() if k != "pool"},
    }


def _compute(curves: Mapping[str, Curve]) -> tuple[dict[str, Any], str]:
    """The range of MACs that all curves cover, its geometric middle, and why there is none."""
    if not curves:
        return {"macs": None, "range": None, "overlap": False}, ""
    starts = {name: float(np.exp(c.x[0])) for name, c in curves.items()}
    ends = {name: float(np.exp(c.x[-1])) for name, c in curves.items()}
    last, first = max(starts, key=lambda n: starts[n]), min(ends, key=lambda n: ends[n])
    low, high = starts[last], ends[first]
    overlap = low <= high * (1 + 1e-9)
    reason = (
        f"no common range of MACs: {last} begins at {low:.3g}, {first} ends at {high:.3g}"
        if not overlap
        else ""
    )
    macs = float(np.sqrt(low * high)) if overlap else None
    return {"macs": macs, "range": [low, high], "overlap": overlap}, reason


HEADER = [
    "rank",
    "structure",
    "error %",
    "95 % interval",
    "law",
    "exponent",
    "E %",
    "ΔAICc",
    "R²",
    "sizes",
    "seeds",
    "zeros",
]
"""Columns of `fit_tables`; ΔAICc is that of the plain law less that of the law with an offset."""


def fit_tables(
    result: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[Any]], list[str]]]:
    """Ranking and laws for people, for each dataset and kind of error.

    Args:
        result: From `fit_results`.

    Returns:
        Title, header, rows, and notes of what the rows do not say.
    """
    tables = []
    for dataset, fit in result["datasets"].items():
        for metric in METRICS:
            macs = fit["compute"][metric]["macs"]
            place = f"at {macs:.2e} MACs" if macs else "(not ranked)"
            title = f"{dataset}: {metric.replace('_', ' ')} {place}"
            tables.append((title, HEADER, _rows(fit, metric), list(_notes(fit, metric))))
    return tables


def _rows(fit: Mapping[str, Any], metric: str) -> list[list[Any]]:
    """One row for each structure, the ranked ones first."""
    ranked = {entry["structure"]: entry for entry in fit["ranking"][metric]}
    names = [*ranked, *(name for name in fit["structures"] if name not in ranked)]
    return [_row(name, ranked.get(name), fit["structures"][name][metric]) for name in names]


def _row(name: str, entry: Mapping[str, Any] | None, law: Mapping[str, Any]) -> list[Any]:
    """What is known of a structure; a dash where it is not."""
    fewest, most = law["seeds"]
    return [
        f"{entry['rank']} {entry['letters'] or ''}".strip() if entry else "–",
        name,
        f"{entry['error']:.2f}" if entry else "–",
        "{:.2f} – {:.2f}".format(*entry["interval"]) if entry and entry["interval"] else "–",
        "–" if law["exponent"] is None else "E + c·x^-a" if law["offset"] else "c·x^-a",
        exponent_text(law),
        f"{law['offset']:.2f}" if law["offset"] else "–",
        "–" if law["gain"] is None else f"{law['gain']:.1f}",
        "–" if law["r_squared"] is None else f"{law['r_squared']:.2f}",
        law["sizes"],
        f"{fewest}" if fewest == most else f"{fewest}–{most}",
        law["zeros"],
    ]


def exponent_text(law: Mapping[str, Any]) -> str:
    """An exponent with its interval; a dash if there is none."""
    if law["exponent"] is None:
        return "–"
    interval = "" if law["interval"] is None else " [{:.3f}, {:.3f}]".format(*law["interval"])
    return f"{law['exponent']:.3f}{interval}"


def _notes(fit: Mapping[str, Any], metric: str) -> Iterator[str]:
    """What was left out and why, what the letters mean, which curves bend."""
    laws = {name: both[metric] for name, both in fit["structures"].items()}
    if fit["ranking"][metric]:
        yield "Structures that share a letter are not told apart (95 % for all pairs together)."
    for name, reason in fit["unranked"][metric].items():
        yield f"{name} is not ranked: {reason}."
    for name, law in laws.items():
        yield from _left_out(name, law)
    yield from _bends(laws)
    spread = fit["noise"][metric]
    found = {"between seeds": spread["between_seeds"], "around the laws": spread["around_laws"]}
    if known := [f"{100 * value:.2g} % {what}" for what, value in found.items() if value]:
        yield (
            f"Spread, as a share of the error: {', '.join(known)}; intervals and letters are from "
            f"the {spread['source']} ({spread['degrees']} degrees of freedom)."
        )


def _left_out(name: str, law: Mapping[str, Any]) -> Iterator[str]:
    """Why a structure has no law, and which of its runs have no part in it."""
    if law["reason"]:
        yield f"{name} has no law: {law['reason']}."
    if law["zeros"]:
        places = ", ".join(f"{macs:.3g}" for macs in sorted(set(law["zero_macs"])))
        yield (
            f"{name}: {law['zeros']} of {law['points'] + law['zeros']} runs have an error "
            f"of 0 and are left out of law and rank, at {places} MACs."
        )
    if law["broken"]:
        yield f"{name}: runs without a finite error are left out, {law['broken']} in all."


def _bends(laws: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Where an offset could not be judged: the exponents of both halves of the sizes."""
    unjudged = {
        name: law["ends"]
        for name, law in laws.items()
        if law["exponent"] is not None and law["gain"] is None and law["ends"][0] != law["ends"][1]
    }
    if unjudged:
        halves = ", ".join(f"{name} {a:.3f} → {b:.3f}" for name, (a, b) in unjudged.items())
        yield (
            "Too few runs to judge an offset by AICc (6 at 4 different MACs or more); exponents of "
            f"the lower and the upper half of the sizes: {halves}."
        )
