"""Who is better at equal compute: sizes, noise, simultaneous intervals, letters.

Sources: intervals of all differences at once by the largest studentised one, Westfall and Young
(1993), *Resampling-Based Multiple Testing*, chapter 2; letters by insertion and absorption, Piepho
(2004), J. Comput. Graph. Stat. 13(2), 456-466.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from string import ascii_letters
from typing import Any, NamedTuple

import numpy as np

from matrigami.studies._fit_law import PowerLaw, widening
from matrigami.studies._record import Record

SETTINGS = ("model", "width", "params", "macs", "lr", "examples", "epochs")
"""Columns that make a size what it is: runs that agree in all are seeds of one size."""


Point = tuple[float, float, str, int]
"""Log MACs, log error, structure and width."""


class Curve(NamedTuple):
    """The sizes of one structure by ascending log MACs (which may repeat)."""

    x: np.ndarray
    logs: tuple[np.ndarray, ...]
    """Log error of each seed of each size."""
    widths: list[int]

    @property
    def y(self) -> np.ndarray:
        """Mean over seeds at each size."""
        return np.array([seeds.mean() for seeds in self.logs])

    @property
    def seeds(self) -> np.ndarray:
        """Number of seeds at each size."""
        return np.array([len(seeds) for seeds in self.logs])


class Noise(NamedTuple):
    """What the bootstrap draws from, and the spreads that it could have been."""

    pool: np.ndarray
    source: str
    degrees: int
    between_seeds: float | None
    around_laws: float | None


def curve(runs: Sequence[Record], metric: str) -> Curve:
    """The sizes of runs with a positive error; runs that differ in the seed only are one size."""
    seen: dict[tuple[Any, ...], int] = {}
    sizes: dict[tuple[Any, ...], list[Record]] = {}
    for r in sorted(runs, key=lambda r: (float(r["macs"]), r["width"] or 0, r["seed"] or 0)):
        setting = tuple(r.get(name) for name in SETTINGS)
        # a seed that comes twice differs in what the table does not show: a size of its own
        copy = seen[*setting, r["seed"]] = seen.get((*setting, r["seed"]), -1) + 1
        sizes.setdefault((*setting, copy), []).append(r)
    groups = list(sizes.values())
    return Curve(
        np.log([float(g[0]["macs"]) for g in groups]),
        tuple(np.log([float(r[metric]) for r in g]) for g in groups),
        [int(g[0]["width"]) for g in groups],
    )


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
    hull = _lower_hull(points)
    lowest = min((y for _, y, _, _ in hull), default=0.0)
    end = next((i for i, p in enumerate(hull) if p[1] == lowest), -1)
    return [
        {"structure": n, "width": w, "macs": round(np.exp(x)), "error": float(np.exp(y))}
        for x, y, n, w in hull[: end + 1]
    ]


def _lower_hull(points: Iterable[Point]) -> list[Point]:
    """The lower convex hull of points that ascend in x (Andrew's monotone chain)."""
    hull: list[Point] = []
    for p in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], p) <= 0:
            hull.pop()
        hull.append(p)
    return hull


def _turn(a: tuple[Any, ...], b: tuple[Any, ...], c: tuple[Any, ...]) -> float:
    """Positive if the way a, b, c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def noise(curves: Mapping[str, Curve], laws: Mapping[str, PowerLaw]) -> Noise:
    """Differences between seeds of one size, pooled; without seeds the distances from the laws.

    Either is inflated for the mean or the law that was fitted, and widened from the normal to
    Student's quantile.
    """
    between, around, degrees, freedom = [], [], 0, 0
    for name, c in curves.items():
        for y in c.logs:
            n = len(y)
            between += [(y - y.mean()) * np.sqrt(n / (n - 1))] if n > 1 else []
            degrees += n - 1
        if name in laws:
            law, y = laws[name], np.concatenate(c.logs)
            at = np.log([law(float(m)) for m in np.exp(np.repeat(c.x, c.seeds))])
            left = len(y) - law.parameters + 1
            around += [(y - at) * np.sqrt(len(y) / left)] if left > 0 else []
            freedom += left
    pools = [np.concatenate(p) if p else np.zeros(0) for p in (between, around)]
    spreads = [float(np.sqrt(np.mean(p**2))) if len(p) else None for p in pools]
    if degrees:
        return Noise(pools[0] * widening(degrees), "seeds", degrees, *spreads)
    wide = widening(freedom) if freedom else 1.0
    return Noise(pools[1] * wide, "laws", freedom, *spreads)


def rank(
    curves: Mapping[str, Curve], pool: np.ndarray, x: float, resamples: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Structures by ascending error at log MACs `x`, and all their pairs."""
    generator = np.random.default_rng(seed)
    values = {name: float(_weights(c, x) @ c.y) for name, c in curves.items()}
    order = sorted(values, key=lambda name: values[name])
    known = len(pool) > 0
    shifts = {
        name: np.stack([generator.choice(pool, (resamples, n)).mean(1) for n in c.seeds], 1)
        @ _weights(c, x)
        if known
        else np.zeros(resamples)
        for name, c in curves.items()
    }
    pairs = compare(order, values, shifts) if known else []
    marks = letters(order, [(p["better"], p["worse"]) for p in pairs if p["differ"]])
    entries = [
        {
            "rank": i + 1,
            "structure": name,
            "error": float(np.exp(values[name])),
            "interval": np.exp(values[name] + np.percentile(shifts[name], [2.5, 97.5])).tolist()
            if known
            else None,
            "letters": marks[name] if known else None,
        }
        for i, name in enumerate(order)
    ]
    return entries, pairs


def _weights(c: Curve, x: float) -> np.ndarray:
    """The error at `x`, linear between neighbours, as weights of the sizes; equal MACs share."""
    nodes, which = np.unique(c.x, return_inverse=True)
    hats = np.array([np.interp(x, nodes, hat) for hat in np.eye(len(nodes))])
    return (hats / np.bincount(which))[which]


def compare(
    order: Sequence[str], values: Mapping[str, float], shifts: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """All pairs, with intervals of the ratio of errors that hold together at 95 %.

    The half-length is `q * s`, `s` the bootstrap's deviation of the pair and `q` the 95 % quantile
    of the largest `|shift| / s` over all pairs.
    """
    pairs = list(combinations(order, 2))
    if not pairs:
        return []
    moved = np.stack([shifts[b] - shifts[a] for a, b in pairs])
    spread = np.sqrt(np.mean(moved**2, 1))
    share = np.abs(moved) / np.where(spread > 0, spread, np.inf)[:, None]
    half = np.percentile(share.max(0), 95) * spread + 1e-12  # below is rounding
    found = []
    for (a, b), h in zip(pairs, half.tolist(), strict=True):
        gap = values[b] - values[a]
        interval = np.exp([gap - h, gap + h]).tolist()
        entry = {"better": a, "worse": b, "ratio": float(np.exp(gap)), "interval": interval}
        found.append(entry | {"differ": gap > h})
    return found


def letters(order: Sequence[str], differ: Collection[tuple[str, str]]) -> dict[str, str]:
    """Compact letter display: two names share a letter unless they differ, with few letters.

    Args:
        order: Names, best first.
        differ: Pairs that are told apart.

    Returns:
        The letters of each name; `a` is the group of the best.

    Examples:
        >>> letters(["x", "y", "z"], [("x", "z")])
        {'x': 'a', 'y': 'ab', 'z': 'b'}
    """
    groups = [frozenset(order)]
    for pair in differ:
        groups = _split(groups, pair)
    place = {name: i for i, name in enumerate(order)}
    groups.sort(key=lambda group: sorted(place[name] for name in group))
    return {
        name: "".join(_letter(i) for i, group in enumerate(groups) if name in group)
        for name in order
    }


def _split(groups: list[frozenset[str]], pair: tuple[str, str]) -> list[frozenset[str]]:
    """Groups in which two names are not together, without those inside of others."""
    found: list[frozenset[str]] = []
    for group in groups:
        found += [group - {name} for name in pair] if group >= set(pair) else [group]
    unique = list(dict.fromkeys(found))
    return [g for g in unique if not any(g < other for other in unique)]


def _letter(i: int) -> str:
    """a, ..., z, A, ..., Z, (53), ..."""
    return ascii_letters[i] if i < len(ascii_letters) else f"({i + 1})"
