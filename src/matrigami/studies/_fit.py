"""Scaling laws: exponents, the frontier, and who is better at equal compute, with intervals.

Sources: `error = c * MACs^-a` by least squares in log-log coordinates as in Qiu et al. (2024),
arXiv:2406.06248; percentile intervals
by resampling residuals, Efron and Tibshirani (1993), chapter 9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matrigami.studies._record import Record, labelled, write_json

METRICS = ("train_error", "test_error")
"""The errors that laws are fitted to, in percent."""

METHOD = (
    "Law: least squares of log error on log MACs over all runs; an error of 0 counts as half "
    "the smallest positive one of its dataset. "
    "Common compute: geometric middle of the range of MACs that all structures cover. "
    "Error there: linear interpolation in log-log coordinates between the two nearest sizes "
    "of the structure's own curve, mean over seeds; "
    "outside its range its law is used, and the structure is named in `extrapolated`. "
    "Intervals: 95 % percentile bootstrap; the residuals are the differences between seeds at "
    "equal size, pooled over the structures of the dataset, "
    "or, where no size has two seeds, the distances from the laws. Neighbours are a tie if "
    "the interval of their log ratio holds 0."
)
"""How the numbers of `fit.json` come about; stored with them."""


@dataclass(frozen=True)
class PowerLaw:
    """`error = prefactor * MACs ** -exponent`; what the points do not determine is None."""

    exponent: float | None
    standard_error: float | None
    prefactor: float | None
    r_squared: float | None
    points: int

    def __call__(self, macs: float) -> float | None:
        """The error at a cost."""
        if self.exponent is None or self.prefactor is None:
            return None
        return self.prefactor * macs**-self.exponent


class Curve(NamedTuple):
    """Means over seeds of one structure: log MACs ascending, log errors, number of seeds, width."""

    x: np.ndarray
    y: np.ndarray
    seeds: np.ndarray
    widths: list[int]


def fit_power_law(macs: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """Least squares in log-log coordinates.

    Args:
        macs: Multiply-adds of each run, positive.
        errors: Error of each run, positive.

    Returns:
        The law; its standard error is None with fewer than 3 points, and all is None with a single
        size.

    Examples:
        >>> law = fit_power_law([1e4, 1e5, 1e6], [40.0, 20.0, 10.0])
        >>> round(law.exponent, 4), round(law(1e5), 4)
        (0.301, 20.0)
    """
    x, y = np.log(np.asarray(macs, float)), np.log(np.asarray(errors, float))
    if len(set(x.tolist())) < 2:
        return PowerLaw(None, None, None, None, len(x))
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    residual = float(np.sum((dy - slope * dx) ** 2))
    error = float(np.sqrt(residual / (len(x) - 2) / (dx @ dx))) if len(x) > 2 else None
    total = float(dy @ dy)
    r_squared = 1 - residual / total if total > 0 else None
    return PowerLaw(-slope, error, float(np.exp(y.mean() - slope * x.mean())), r_squared, len(x))


def fit_results(
    records: Sequence[Record], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Laws, frontier and ranking of each dataset.

    Args:
        records: Rows of `results.csv`; runs that failed are left out.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        What `fit.json` holds: `datasets[name]` with `structures`, `frontier`, `ranking`,
        `common_macs`, `range`; and the method.
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


def frontier(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """The compute-optimal points: the descending part of the lower hull in log-log coordinates.

    Args:
        curves: The curve of each structure.

    Returns:
        Structure, width, MACs and error of each point, by ascending MACs.
    """
    points = sorted(
        (x, y, name, width)
        for name, c in curves.items()
        for x, y, width in zip(c.x.tolist(), c.y.tolist(), c.widths, strict=True)
    )
    hull: list[tuple[float, float, str, int]] = []
    for p in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], p) <= 0:
            hull.pop()
        hull.append(p)
    lowest = min((y for _, y, _, _ in hull), default=0.0)
    end = next((i for i, p in enumerate(hull) if p[1] == lowest), -1)
    return [
        {"structure": n, "width": w, "macs": round(np.exp(x)), "error": float(np.exp(y))}
        for x, y, n, w in hull[: end + 1]
    ]


def _turn(a: tuple[Any, ...], b: tuple[Any, ...], c: tuple[Any, ...]) -> float:
    """Positive if the way a, b, c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _fit_dataset(records: Sequence[Record], resamples: int, seed: int) -> dict[str, Any]:
    """Laws, frontier and ranking of one dataset."""
    groups: dict[str, list[Record]] = {}
    for r in sorted(records, key=lambda r: (str(r["structure"]), r["macs"], r["seed"])):
        groups.setdefault(str(r["structure"]), []).append(r)
    low = max(min(float(r["macs"]) for r in group) for group in groups.values())
    high = min(max(float(r["macs"]) for r in group) for group in groups.values())
    macs = float(np.sqrt(low * high))
    laws: dict[str, dict[str, Any]] = {name: {} for name in groups}
    fronts, rankings = {}, {}
    for metric in METRICS:
        logs = _log_errors(groups, metric)
        curves = {name: _curve(groups[name], logs[name]) for name in groups}
        fitted = {
            name: fit_power_law([r["macs"] for r in groups[name]], np.exp(logs[name]).tolist())
            for name in groups
        }
        for name, law in fitted.items():
            laws[name][metric] = asdict(law)
        fronts[metric] = frontier(curves)
        pool = _residuals(groups, logs, fitted)
        rankings[metric] = _rank(curves, fitted, pool, macs, resamples, seed)
    outside = [
        name
        for name, group in groups.items()
        if not min(r["macs"] for r in group) <= macs * (1 + 1e-9)
        or not max(r["macs"] for r in group) >= macs * (1 - 1e-9)
    ]
    return {
        "common_macs": macs,
        "range": [low, high],
        "overlap": low <= high,
        "extrapolated": outside,
        "structures": laws,
        "frontier": fronts,
        "ranking": rankings,
    }


def _log_errors(groups: Mapping[str, Sequence[Record]], metric: str) -> dict[str, np.ndarray]:
    """Log error of each run; 0 is raised to half the smallest positive error."""
    values = {name: np.array([float(r[metric]) for r in group]) for name, group in groups.items()}
    positive = np.concatenate(list(values.values()))
    positive = positive[positive > 0]
    floor = positive.min() / 2 if len(positive) else 1e-3
    return {name: np.log(np.maximum(v, floor)) for name, v in values.items()}


def _curve(group: Sequence[Record], logs: np.ndarray) -> Curve:
    """Mean over seeds at each size."""
    macs = np.array([float(r["macs"]) for r in group])
    sizes = np.unique(macs)
    means = np.array([logs[macs == m].mean() for m in sizes])
    widths = [int(next(r["width"] for r in group if float(r["macs"]) == m)) for m in sizes]
    return Curve(np.log(sizes), means, np.array([int((macs == m).sum()) for m in sizes]), widths)


def _residuals(
    groups: Mapping[str, Sequence[Record]],
    logs: Mapping[str, np.ndarray],
    laws: Mapping[str, PowerLaw],
) -> np.ndarray:
    """The pool of the bootstrap; residuals are inflated for the mean or line fitted to them."""
    between, around = [], []
    for name, group in groups.items():
        macs = np.array([float(r["macs"]) for r in group])
        for m in np.unique(macs):
            y = logs[name][macs == m]
            between += [(y - y.mean()) * np.sqrt(len(y) / (len(y) - 1))] if len(y) > 1 else []
        law, n = laws[name], len(macs)
        if n > 2 and law.exponent is not None and law.prefactor is not None:
            line = np.log(law.prefactor) - law.exponent * np.log(macs)
            around.append((logs[name] - line) * np.sqrt(n / (n - 2)))
    chosen = between or around
    return np.concatenate(chosen) if chosen else np.zeros(0)


def _rank(
    curves: Mapping[str, Curve],
    laws: Mapping[str, PowerLaw],
    pool: np.ndarray,
    macs: float,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Structures by ascending error at `macs`."""
    generator = np.random.default_rng(seed)
    samples = {
        name: _samples(c, laws[name], pool, np.log(macs), resamples, generator)
        for name, c in curves.items()
    }
    order = sorted(samples, key=lambda name: samples[name][0])
    entries: list[dict[str, Any]] = []
    for i, name in enumerate(order):
        value, draws = samples[name]
        interval = np.exp(np.percentile(draws, [2.5, 97.5])).tolist() if len(pool) else None
        tie = None
        if len(pool) and i + 1 < len(order):
            low, high = np.percentile(draws - samples[order[i + 1]][1], [2.5, 97.5])
            tie = bool(low <= 0 <= high)
        tied_before = bool(entries) and entries[-1]["tie_with_next"] is True
        rank = entries[-1]["rank"] if tied_before else i + 1
        entries.append(
            {
                "rank": rank,
                "structure": name,
                "error": float(np.exp(value)),
                "interval": interval,
                "tie_with_next": tie,
            }
        )
    return entries


def _samples(
    curve: Curve,
    law: PowerLaw,
    pool: np.ndarray,
    x: float,
    resamples: int,
    generator: np.random.Generator,
) -> tuple[float, np.ndarray]:
    """Log error at log MACs `x`, and its bootstrap samples."""
    weights, offset = _weights(curve, law, x)
    value = float(weights @ curve.y + offset)
    if not len(pool):
        return value, np.full(resamples, value)
    noise = np.stack([generator.choice(pool, (resamples, n)).mean(1) for n in curve.seeds], 1)
    return value, value + noise @ weights


def _weights(curve: Curve, law: PowerLaw, x: float) -> tuple[np.ndarray, float]:
    """The error at `x` as a linear function of the curve's log errors."""
    weights = np.zeros(len(curve.x))
    if len(curve.x) == 1 or law.exponent is None:
        weights[np.abs(curve.x - x).argmin()] = 1.0
        return weights, 0.0
    inside = curve.x[0] - 1e-9 <= x <= curve.x[-1] + 1e-9
    if inside:
        right = int(np.clip(np.searchsorted(curve.x, x), 1, len(curve.x) - 1))
        share = float(
            np.clip((x - curve.x[right - 1]) / (curve.x[right] - curve.x[right - 1]), 0, 1)
        )
        weights[right - 1], weights[right] = 1 - share, share
        return weights, 0.0
    dx = curve.x - curve.x.mean()
    return 1 / len(dx) + dx * (x - curve.x.mean()) / (dx @ dx), 0.0


def fit_tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Ranking and laws for people: title, header, rows for each dataset and kind of error."""
    tables = []
    header = ["rank", "structure", "error %", "95 % interval", "exponent", "R²", "runs"]
    for dataset, fit in result["datasets"].items():
        for metric in METRICS:
            title = f"{dataset}: {metric.replace('_', ' ')} at {fit['common_macs']:.2e} MACs"
            title += "" if fit["overlap"] else " (the structures share no range; extrapolated)"
            tables.append((title, header, _rows(fit, metric)))
    return tables


def _rows(fit: Mapping[str, Any], metric: str) -> list[list[Any]]:
    """One row for each structure."""
    entries, rows = fit["ranking"][metric], []
    for i, entry in enumerate(entries):
        tied = entry["tie_with_next"] or (i > 0 and entries[i - 1]["tie_with_next"])
        law = fit["structures"][entry["structure"]][metric]
        low_high = (
            "–" if entry["interval"] is None else "{:.2f} – {:.2f}".format(*entry["interval"])
        )
        rows.append(
            [
                f"{entry['rank']}{' tie' if tied else ''}",
                entry["structure"],
                f"{entry['error']:.2f}",
                low_high,
                _plus_minus(law),
                _two(law["r_squared"]),
                law["points"],
            ]
        )
    return rows


def _plus_minus(law: Mapping[str, Any]) -> str:
    """An exponent with its standard error."""
    error = "" if law["standard_error"] is None else f" ± {law['standard_error']:.3f}"
    return "–" if law["exponent"] is None else f"{law['exponent']:.3f}{error}"


def _two(value: float | None) -> str:
    """Two digits, or a dash."""
    return "–" if value is None else f"{value:.2f}"
