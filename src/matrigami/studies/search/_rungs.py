"""Successive halving over sizes: every size is a study of those that are still in the race.

At each size every candidate gets the width at which its model costs nearest to the same number of
multiply-adds; where that is the width of an earlier size, it is not trained again. A size is a
study in a folder of its own, so that a search goes on where it was interrupted. Source: Jamieson
and Talwalkar (2016), arXiv:1502.07943.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from matrigami.studies._progress import Snapshot
from matrigami.studies._record import Record, write_results
from matrigami.studies._run import StudyPlan, load_plan, plan_study, run_study, strangers
from matrigami.studies._size import run_size, task_size
from matrigami.studies._spec import Study, study_of
from matrigami.studies.search._spec import Search

WIDTHS = (*range(16, 64, 4), *range(64, 160, 16), *(k * k for k in range(13, 65)))
"""Widths that are tried: small ones, and squares, which have balanced factors."""

STRIDE = 8
"""Widths that are passed over in looking for one that is large enough."""

METRIC = "test_error"


def run_search(
    search: Search,
    out: Path,
    *,
    workers: int | None = None,
    threads: int | None = None,
    together: int | None = None,
    device: str = "cpu",
    data_dir: Path | None = None,
    launcher: str = "processes",
    report: Callable[[int, Snapshot], None] = lambda _size, _now: None,
) -> list[Record] | None:
    """Train what a search lacks, size by size, and write `results.csv`.

    Args:
        search: From `load_search`.
        out: Folder; each size is a study in one below.
        workers: As in `run_study`.
        threads: As in `run_study`.
        together: As in `run_study`.
        device: As in `run_study`.
        data_dir: As in `run_study`.
        launcher: As in `run_study`.
        report: Called with the number of the size, from 1, and its state.

    Returns:
        The records of all runs, or None if the search was interrupted.

    Raises:
        ValueError: If the spec or a candidate does not fit, or the folder holds something else.
    """
    _check_folder(search, out)
    left, found = list(search.structures), []
    for i, macs in enumerate(search.macs):
        study = untrained(_study(search, left, macs, data_dir), found)
        plan, folder = plan_study(study, data_dir), out / f"size_{i + 1}"
        _check_size(search, plan, folder)
        outcome = run_study(
            plan,
            folder,
            workers=workers,
            threads=threads,
            together=together,
            device=device,
            data_dir=data_dir,
            launcher=launcher,
            report=lambda now, size=i + 1: report(size, now),
        )
        if outcome.interrupted or outcome.left:
            return None
        found += outcome.records
        if i < len(search.keep):
            left = survivors(left, found, macs, search.keep[i])
    write_results(out / "results.csv", found)
    return found


def _check_folder(search: Search, out: Path) -> None:
    """Refuse a folder whose table or page would be written over."""
    is_search = (out / "size_1").exists() or (out / "search.json").exists()
    own = ("study.json",) if is_search else ("study.json", "results.csv", "README.md")
    if found := [name for name in own if (out / name).exists()]:
        raise ValueError(
            f"--out {out}, for search {search.name!r}: it has a {found[0]} that is not of a "
            "search.\nGive --out a folder of its own."
        )


def _check_size(search: Search, plan: StudyPlan, folder: Path) -> None:
    """Refuse the runs of another search."""
    if not (folder / "study.json").exists():
        return
    there = load_plan(folder)
    if others := strangers(plan, there):
        raise ValueError(
            f"--out {folder.parent}, for search {search.name!r}: it holds another search.\n"
            f"{len(others)} of the {len(there.configs)} runs in {folder} are no part of this one.\n"
            "Give --out a folder of its own."
        )


def untrained(study: Study, records: Iterable[Record]) -> Study:
    """A study without the runs that have a record."""
    done = {record["id"] for record in records}
    return replace(study, configs=tuple(c for c in study.configs if c.id not in done))


def survivors(
    structures: Sequence[str], records: Iterable[Record], macs: float, share: float
) -> list[str]:
    """The best share, at least two, by the error that the law so far predicts at some size.

    Examples:
        >>> runs = [
        ...     {"structure": s, "macs": m, "status": "done", "test_error": e * m**-0.5}
        ...     for s, e in (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 4.0))
        ...     for m in (10, 20)
        ... ]
        >>> survivors(["a", "b", "c", "d"], runs, 20, 0.5)
        ['a', 'c']
    """
    records = list(records)
    scores = {name: predicted(name, records, macs) for name in structures}
    count = max(2, math.ceil(share * len(structures)))
    best = sorted(structures, key=lambda name: scores[name])[:count]
    return [name for name in structures if name in best]


def predicted(structure: str, records: Iterable[Record], macs: float) -> float:
    """The error at some compute, by a straight line in log-log coordinates; infinite if none ran.

    One size has no slope: its error is taken as it is.
    """
    points = [
        (math.log(r["macs"]), math.log(r[METRIC]))
        for r in records
        if r["structure"] == structure and r["status"] == "done" and r[METRIC] > 0
    ]
    if not points:
        return math.inf
    x, y = np.array(points).T
    if np.ptp(x) == 0:
        return float(np.exp(y.mean()))
    slope, start = np.polyfit(x, y, 1)
    return float(np.exp(start + slope * math.log(macs)))


def _study(search: Search, structures: Sequence[str], macs: float, data_dir: Path | None) -> Study:
    """The study of one size."""
    first = {"name": structures[0], "widths": [WIDTHS[0]]}
    probe = study_of({**search.tables, "structure": [first]}, search.name, search.folder)
    task = task_size(probe.configs[0], data_dir)

    @cache
    def cost(structure: str, width: int) -> int:
        """The multiply-adds of a candidate at one width."""
        own = {"name": structure, "widths": [width]}
        one = study_of({**search.tables, "structure": [own]}, search.name, search.folder)
        return run_size(one.configs[0], task=task).macs

    def width(structure: str) -> int:
        """The width whose multiply-adds are nearest to the size, from below."""
        steps = range(STRIDE, len(WIDTHS), STRIDE)
        last = next((i for i in steps if cost(structure, WIDTHS[i]) >= macs), len(WIDTHS))
        places = {"lo": last - STRIDE, "hi": last}
        first = bisect_left(WIDTHS, macs, **places, key=lambda w: cost(structure, w))
        near = WIDTHS[max(first - 2, 0) : first + 2]
        return min(near, key=lambda w: abs(math.log(cost(structure, w) / macs)))

    tables = [{"name": name, "widths": [width(name)]} for name in structures]
    return study_of({**search.tables, "structure": tables}, search.name, search.folder)
