"""What a study found, in sentences: at equal multiply-adds, and at equal measured time.

Every sentence is read off the ranking; what the ranking does not tell apart is not told apart here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from matrigami.studies._fit import METRICS, fit_results
from matrigami.studies._fit_rank import SETTINGS, Curve, curve
from matrigami.studies._record import Record, labelled, timed

FAR = "does not get there with any size of the study"
"""Where the dense network ends above the error."""

RESAMPLES = 500
"""Of the ranking by time."""


def conclusions(records: Sequence[Record], fit: Mapping[str, Any]) -> list[str]:
    """Sentences for each dataset and error.

    Args:
        records: Rows of `results.csv`.
        fit: `fit_results` of them.

    Returns:
        For each dataset what is best at equal multiply-adds, how many more the dense network needs
        for the same error, and what is best in equal time.

    Examples:
        >>> from matrigami.studies import fit_results
        >>> runs = [
        ...     {"dataset": "d", "structure": s, "width": m, "macs": m, "seed": 0, "status": "done",
        ...      "train_error": c * m**-0.5, "test_error": c * m**-0.5, "seconds": None}
        ...     for s, c in (("dense", 20.0), ("btt", 10.0)) for m in (10, 100, 1000)
        ... ]
        >>> print(conclusions(runs, fit_results(runs))[0])
        d, train error: at 1.0e+02 MACs btt is the best with 1 % against 2 % of dense, which needs \
4.0 times the multiply-adds for that.
    """
    good = [r for r in labelled(records) if r.get("status") == "done"]
    timed = _by_time(good)
    by_time = fit_results(timed, resamples=RESAMPLES)["datasets"] if timed else {}
    found = []
    for dataset, result in fit["datasets"].items():
        own = [r for r in good if r["dataset"] == dataset]
        for metric in METRICS:
            sentences = [" ".join(_at_equal_macs(result, own, metric))]
            sentences += _in_equal_time(by_time[dataset], metric) if dataset in by_time else []
            found += [f"{dataset}, {metric.replace('_', ' ')}: {s}" for s in sentences]
    return found


def _at_equal_macs(
    result: Mapping[str, Any], records: Sequence[Record], metric: str
) -> Iterator[str]:
    """Who is best, and what that is worth."""
    ranking, macs = result["ranking"][metric], result["compute"][metric]["macs"]
    if not ranking:
        reasons = dict.fromkeys(result["unranked"][metric].values())
        yield f"nothing is ranked at equal multiply-adds: {'; '.join(reasons) or 'no runs'}."
        return
    best, ties = ranking[0], _ties(result, metric)
    start = f"at {macs:.1e} MACs {best['structure']}"
    dense = next((e for e in ranking if e["structure"] == "dense"), None)
    if ties:
        yield f"{start} has the lowest error, but is not told apart from {_listed(ties)}."
    if dense is None or dense is best:
        if not ties:
            rest = f", ahead of {ranking[1]['structure']}" if len(ranking) > 1 else ""
            yield f"{start} is the best with {best['error']:.3g} %{rest}."
        return
    if "dense" not in ties:
        more = _needed(records, metric, best["error"])
        lead = "It has" if ties else f"{start} is the best with"
        ratio = f"needs {more / macs:.1f} times the multiply-adds for that" if more else FAR
        errors = f"{best['error']:.3g} % against {dense['error']:.3g} % of dense"
        yield f"{lead} {errors}, which {ratio}."


def _in_equal_time(result: Mapping[str, Any], metric: str) -> Iterator[str]:
    """Who is best at equal processor time, if anything can be said."""
    ranking, time = result["ranking"][metric], result["compute"][metric]["macs"]
    if len(ranking) < 2:
        return
    best, ties = ranking[0]["structure"], _ties(result, metric)
    words = f"is not told apart from {_listed(ties)}" if ties else "is the best"
    yield (
        f"in equal processor time of this machine, {time:.3g} microseconds of training an example, "
        f"{best} {words}."
    )


def _ties(result: Mapping[str, Any], metric: str) -> list[str]:
    """What the best is not told apart from."""
    best = result["ranking"][metric][0]
    letters = set(best["letters"] or "")
    return [
        e["structure"]
        for e in result["ranking"][metric][1:]
        if not letters or letters & set(e["letters"] or "")
    ]


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _needed(records: Sequence[Record], metric: str, error: float) -> float | None:
    """MACs at which the dense network has an error, between its sizes; None beyond the last."""
    dense = [r for r in records if r["structure"] == "dense" and (r.get(metric) or 0) > 0]
    c: Curve = curve(dense, metric)
    x, y = c.x, np.minimum.accumulate(c.y)
    if not len(x) or np.log(error) < y[-1]:
        return None
    return float(np.exp(np.interp(-np.log(error), -y, x)))


def _by_time(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Runs with the mean processor time of their size, in microseconds an example, as cost."""
    times: dict[tuple[Any, ...], list[float]] = {}
    known = [(r, r.get("cpu_seconds") or r["seconds"]) for r in timed(records)]
    taken = [(r, s) for r, s in known if s and r.get("examples") and r["seconds"]]
    for r, seconds in taken:
        times.setdefault(_size(r), []).append(1e6 * seconds / r["examples"])
    return [{**r, "macs": float(np.mean(times[_size(r)]))} for r, _ in taken]


def _size(r: Record) -> tuple[Any, ...]:
    """What runs that differ in the seed only have in common."""
    return (r["dataset"], r["structure"], *(r.get(name) for name in SETTINGS))
