"""A study goes on from its table: runs that `results.csv` holds are not trained again.

A folder that was handed on has its table and `env.json`, and often not the folders of its runs.
Once it has a `study.json`, those folders are the truth, and the table is made from them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matrigami.studies._record import Record, read_json, read_results


def earlier(out: Path, known: Iterable[str]) -> dict[str, Record]:
    """Records of runs that ended, from the table of a folder that has no runs, by their ids.

    Args:
        out: Folder of a study.
        known: The ids of its runs.

    Raises:
        ValueError: If the table has runs of another study, or is damaged.
    """
    table = out / "results.csv"
    if (out / "study.json").exists() or not table.exists():
        return {}
    rows, ids = read_results(table), set(known)
    others = [row for row in rows if row.get("id") not in ids]
    if others:
        raise ValueError(
            f"--out {out}: its results.csv has {len(others)} of {len(rows)} runs that are no part "
            "of this study, and would be written over.\n"
            "Give --out a folder of its own."
        )
    env = read_json(out / "env.json") or {}
    return {
        row["id"]: {**row, "machine": row.get("machine") or _machine(env, row)}
        for row in rows
        if row["status"] in ("done", "failed")
    }


def _machine(env: dict[str, Any], row: Record) -> Any:
    """Where a run was, of a table that does not say it."""
    return env.get("cpu" if row.get("device") in (None, "cpu") else "device")
