"""What a search tells about the taxonomy: sharing omega, rank psi, intensity nu.

Each candidate has a law through its sizes, a straight line in log-log coordinates. Log error at one
compute, and the exponents, are regressed on `omega`, `1 - psi` and `nu`; intervals are 95 %
percentiles of a bootstrap over the candidates. Claim and definitions: Potapczynski et al. (2024),
arXiv:2410.02117.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matrigami.structures import parse
from matrigami.studies._record import Record
from matrigami.studies.search._rungs import METRIC, predicted
from matrigami.studies.search._spec import Search

Fit = Mapping[str, Any]
"""A regression: value and interval of the terms, `r_squared`, and `n` candidates."""

RESAMPLES = 2000
"""Bootstrap samples of the candidates."""

TERMS = ("omega", "1 - psi", "nu")

NEAR = 0.02
"""How near to omega = 0 and psi = 1 a member is there: exponents such as 0.333 are rounded."""


def taxonomy(search: Search, records: Sequence[Record], *, seed: int = 0) -> dict[str, Any]:
    """The candidates with their laws, best first, and the regressions.

    Args:
        search: What was searched.
        records: Of all its sizes.
        seed: Of the bootstrap.

    Returns:
        `macs` (at which errors are compared: the last size that all have), `candidates`, `terms`
        (coefficients of the regressions with intervals), `full` (of the members without sharing and
        of full rank: how many, and the ratio of errors over their range of nu) and `claims`. What
        the candidates do not tell is NaN.

    Raises:
        ValueError: If no run has an error to compare.
    """
    halved = [i for i, share in enumerate(search.keep) if share < 1]
    macs = search.macs[halved[0] if halved else -1]
    rows = _rows(search, records, macs)
    X = np.array([[1.0, r["omega"], 1 - r["psi"], r["nu"]] for r in rows])
    logs = np.log([r["error"] for r in rows])
    exponents = np.array([r["exponent"] for r in rows])
    found = {
        "log_error": _regression(X, logs, seed),
        "exponent": _regression(X, exponents, seed),
    }
    full = [r for r in rows if r["omega"] < NEAR and r["psi"] > 1 - NEAR]
    result = {"macs": macs, "metric": METRIC, "candidates": rows, "terms": found}
    result["full"] = _over_nu(full, seed)
    return result | {"claims": _claims(result)}


def _row(name: str, records: Sequence[Record], macs: float) -> dict[str, Any]:
    """One candidate: where it is in the taxonomy, and its law."""
    recipe: Any = parse(name)
    own = [r for r in records if r["structure"] == name and r["status"] == "done" and r[METRIC] > 0]
    x, y = (np.log([float(r[key]) for r in own]) for key in ("macs", METRIC))
    slope = float(np.polyfit(x, y, 1)[0]) if len(own) > 1 and np.ptp(x) > 0 else math.nan
    places = {key: round(getattr(recipe, key), 4) for key in ("omega", "psi", "nu")}
    sizes = sorted({int(r["macs"]) for r in own})
    error = predicted(name, own, macs)
    return {"structure": name, **places, "sizes": sizes, "exponent": -slope, "error": error}


def _rows(search: Search, records: Sequence[Record], macs: float) -> list[dict[str, Any]]:
    """The candidates that have a law, best first."""
    rows = [_row(name, records, macs) for name in search.structures]
    found = sorted((r for r in rows if math.isfinite(r["error"])), key=lambda r: r["error"])
    if not found:
        raise ValueError(
            f"search {search.name!r}: none of its {len(records)} runs has an error to compare.\n"
            "See the causes in results.csv; a smaller lr is the usual remedy."
        )
    return found


def _regression(X: np.ndarray, y: np.ndarray, seed: int) -> dict[str, Any]:
    """Least squares, with intervals; NaN for terms that the candidates do not tell apart."""
    known = np.isfinite(y)
    X, y = X[known], y[known]
    fit = np.linalg.lstsq(X, y, rcond=None)[0]
    draws = np.random.default_rng(seed).integers(0, max(len(y), 1), (RESAMPLES, len(y)))
    each = np.array([np.linalg.lstsq(X[d], y[d], rcond=None)[0] for d in draws])
    rest, spread = y - X @ fit, y - y.sum() / max(len(y), 1)
    fit, each = (np.where(_is_told(X), found, math.nan) for found in (fit, each))
    low, high = np.percentile(each, [2.5, 97.5], axis=0)
    terms = {
        name: {"value": float(fit[i]), "interval": [float(low[i]), float(high[i])]}
        for i, name in enumerate(("constant", *TERMS))
    }
    total = float(spread @ spread)
    return terms | {"r_squared": 1 - float(rest @ rest) / total if total else 0.0, "n": len(y)}


def _is_told(X: np.ndarray) -> np.ndarray:
    """Which coefficients the rows determine: those without a part in the null space."""
    rank = np.linalg.matrix_rank(X) if len(X) else 0
    return np.abs(np.linalg.svd(X)[2][rank:]).max(0, initial=0.0) < 1e-9


def _over_nu(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Of members of full rank without sharing: the error at the largest nu over the smallest."""
    nu, y = (np.array([r[key] for r in rows]) for key in ("nu", "error"))
    if len(set(nu.tolist())) < 3:
        return {"n": len(rows), "nu": sorted(set(nu.tolist())), "ratio": None, "interval": None}
    width = float(np.ptp(nu))
    draws = np.random.default_rng(seed).integers(0, len(nu), (RESAMPLES, len(nu)))
    slopes = [np.polyfit(nu[d], np.log(y[d]), 1)[0] for d in draws if np.ptp(nu[d]) > 0]
    low, high = np.percentile(slopes, [2.5, 97.5])
    slope = float(np.polyfit(nu, np.log(y), 1)[0])
    ratio, interval = math.exp(slope * width), [math.exp(s * width) for s in (low, high)]
    return {
        "n": len(rows),
        "nu": [float(nu.min()), float(nu.max())],
        "ratio": ratio,
        "interval": interval,
    }


def _claim(terms: Fit, term: str, claim: str) -> str:
    """Whether more of a term makes a larger error."""
    (low, high), value = terms[term]["interval"], terms[term]["value"]
    if math.isnan(value):
        return (
            f"'{claim}' cannot be judged: the {terms['n']} candidates do not differ in {term} "
            "independently of the rest."
        )
    verdict = "holds" if low > 0 else "is contradicted" if high < 0 else "is not told apart"
    return (
        f"At equal compute '{claim}' {verdict}: one unit of {term} multiplies the error by "
        f"{math.exp(value):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]."
    )


def _claims(result: Mapping[str, Any]) -> list[str]:
    """In words, what holds."""
    terms = result["terms"]["log_error"]
    claims = {"omega": "small omega wins", "1 - psi": "large psi wins"}
    said = [_claim(terms, term, claim) for term, claim in claims.items()]
    full = result["full"]
    if full["ratio"] is None:
        said.append(f"Too few members ({full['n']}) without sharing and of full rank to judge nu.")
        return said
    low, high = full["interval"]
    said.append(
        f"Among the {full['n']} members with omega = 0 and psi = 1, from nu = "
        f"{full['nu'][0]:.2f} to {full['nu'][1]:.2f} the error changes by a factor of "
        f"{full['ratio']:.2f} [{low:.2f}, {high:.2f}]: 'nu hardly matters' "
        + ("is not contradicted." if low <= 1 <= high else "does not hold here.")
    )
    return said


def search_page(search: Search, result: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """A page in Markdown: claims, figure, regressions and all candidates.

    Args:
        search: What was searched.
        result: From `taxonomy`.
        texts: `command`, and perhaps `expected` and `notes`, to be put in.
    """
    about = search.tables.get("study", {}).get("description", "")
    lines = [f"# {search.name}", "", about, "", f"Made by `{texts['command']}`.", ""]
    for part in ("expected", "notes"):
        lines += [texts[part].strip(), ""] if texts.get(part) else []
    lines += ["## What was found", "", *[f"* {claim}" for claim in result["claims"]], ""]
    lines += ["![taxonomy](fig/taxonomy.png)", "", *_regression_lines(result), ""]
    lines += [
        f"## Candidates, by the law's error at {result['macs']:.2e} multiply-adds",
        "",
        "| structure | omega | psi | nu | error % | exponent | sizes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{r['structure']}` | {r['omega']:.2f} | {r['psi']:.2f} | {r['nu']:.2f} | "
        f"{r['error']:.2f} | {_shown(r['exponent'], '.3f')} | "
        f"{', '.join(f'{m:.1e}' for m in r['sizes'])} |"
        for r in result["candidates"]
    ]
    return "\n".join(lines) + "\n"


def _regression_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of both regressions."""
    head = ["| of | " + " | ".join(TERMS) + " | R² | candidates |", "|" + " --- |" * 6]
    for key, what in (("log_error", "log error at equal compute"), ("exponent", "exponent")):
        fit = result["terms"][key]
        cells = [_cell(fit[term]) for term in TERMS]
        head.append(f"| {what} | {' | '.join(cells)} | {fit['r_squared']:.2f} | {fit['n']} |")
    return ["## Regressions on the taxonomy", "", *head]


def _cell(term: Fit) -> str:
    """A coefficient with its interval."""
    low, high = (_shown(end, "+.3f") for end in term["interval"])
    return f"{_shown(term['value'], '+.3f')} [{low}, {high}]"


def _shown(value: float, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if math.isnan(value) else format(value, form)
