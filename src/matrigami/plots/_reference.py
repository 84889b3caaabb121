"""Published points, to be drawn beside those of a study."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrigami._words import cause

SAME = {
    "btt": "btt(rank=1)",
    "monarch": "monarch(blocks=4)",
    "kron": "kronecker",
    "tt": "tt(rank=16)",
    "dense": "dense",
    "lowrank": "lowrank",
}
"""Names in published tables, in lower case, and what they are here."""

REFERENCE_COLUMNS = {
    "macs": ("macs", "macs_per_example_fwd"),
    "train_error": ("train_error", "train_error_pct"),
    "test_error": ("test_error", "test_error_pct"),
}
"""Numbers of a reference, and how their columns may be spelled."""


def read_reference(path: Path) -> list[dict[str, Any]]:
    """Published points: `dataset, structure, macs, train_error, test_error`, names as here.

    Of a `results.csv` the runs that ended well.

    Raises:
        ValueError: If it is no such table, or has no point.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))))
        return _points(rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"The reference {path}: {cause(error)}.\n"
            "Give a CSV with the columns dataset, structure, macs, train_error, test_error."
        ) from error


def _points(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The rows that are no failed runs.

    Raises:
        ValueError: If there is none, or one is no point.
    """
    points = [_point(row) for row in rows if row.get("status") in (None, "done")]
    if not points:
        raise ValueError("it has no row")
    return points


def _point(row: Mapping[str, str]) -> dict[str, Any]:
    """One row.

    Raises:
        ValueError: If a cell is missing or no number above zero.
    """
    point: dict[str, Any] = {"dataset": row.get("dataset"), "structure": row.get("structure")}
    for name, spellings in REFERENCE_COLUMNS.items():
        point[name] = next((float(row[key]) for key in spellings if row.get(key)), None)
    for name, value in point.items():
        if value is None or (name in REFERENCE_COLUMNS and not 0 <= value < math.inf):
            raise ValueError(f"a row has {name} = {value}")
    point["structure"] = SAME.get(str(point["structure"]).lower(), point["structure"])
    return point
