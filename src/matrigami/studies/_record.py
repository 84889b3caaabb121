"""Results on disk: files that are whole or absent, and one table with a row for each run."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrigami._words import finite

Record = Mapping[str, Any]
"""What a run reports: the columns below, and what its task adds."""

COLUMNS = (
    "dataset",
    "model",
    "structure",
    "width",
    "seed",
    "lr",
    "params",
    "macs",
    "train_loss",
    "test_loss",
    "train_error",
    "test_error",
    "seconds",
    "status",
    "cause",
    "examples",
)
"""First columns of `results.csv`. Errors in percent; MACs of one forward pass of one example."""

_NUMBERS = {"width": int, "seed": int, "params": int, "macs": int, "examples": int}
_MEASURED = (
    "macs",
    "train_error",
    "test_error",
    "lr",
    "train_loss",
    "test_loss",
    "seconds",
    "cpu_seconds",
    "epochs",
)
_TEXT = {"dataset", "model", "structure", "status", "cause", "id", "device", "machine", "optimizer"}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary name beside it, then rename: a reader never sees half a file."""
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """One JSON document, whole or absent; what is not finite is null."""
    write_atomic(
        path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def read_json(path: Path) -> Any:
    """One JSON object; None if the file is absent.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def damaged(path: Path, what: str) -> ValueError:
    """What to raise for a file that was written by a study and cannot be read back."""
    return ValueError(
        f"{path}: it is damaged: {what}.\n"
        "Restore it from a copy, or delete it: what can be made anew will be."
    )


def write_results(path: Path, records: Sequence[Record]) -> None:
    """Write `results.csv`: `COLUMNS`, then what else the records hold, one row for each run."""
    extra = sorted({key for record in records for key in record} - set(COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *extra], restval="", lineterminator="\n")
    writer.writeheader()
    for record in sorted(records, key=_order):
        writer.writerow({key: _cell(value) for key, value in record.items()})
    write_atomic(path, text.getvalue())


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `results.csv`, numbers as numbers; an empty cell is None.

    Raises:
        ValueError: If the file is absent, lacks a column, or has a run twice.
    """
    path = Path(path)
    try:
        table = csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))
        rows = list(table)
    except OSError as error:
        raise ValueError(
            f"results {path}: they cannot be read: {error.strerror}.\n"
            "Run `matrigami study run` with --out on this folder first."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, str(error)) from error
    missing = set(COLUMNS[:14]) - set(table.fieldnames or ())
    if missing:
        raise ValueError(
            f"results {path}: columns are missing: {sorted(missing)}.\n"
            "Write them anew with `matrigami study run`."
        )
    found = [_row(path, number, row) for number, row in enumerate(rows, 2)]
    _refuse_twice(path, found)
    return found


def _refuse_twice(path: Path, rows: Sequence[Record]) -> None:
    """Refuse a run that is there twice: it would count as two seeds."""
    for name, times in Counter(row["id"] for row in rows if row.get("id")).items():
        if times > 1:
            raise damaged(path, f"the run {name} is there twice")


def _row(path: Path, number: int, row: Mapping[Any, Any]) -> dict[str, Any]:
    """One row; a line with other cells than the head has, or a word for a number, is refused."""
    if None in row or None in row.values():
        raise damaged(path, f"line {number} has more or fewer cells than the first")
    try:
        values = {key: _value(key, cell) for key, cell in row.items()}
    except (ValueError, OverflowError) as error:
        raise damaged(path, f"line {number}: {error}") from error
    words = [key for key in _MEASURED if isinstance(values.get(key), str)]
    words += [] if isinstance(values.get("macs"), int) else ["macs"]
    if words:
        raise damaged(path, f"line {number} has {words[0]} = {row.get(words[0])!r}")
    return values


def labelled(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records whose structure names the optimiser, too, unless that is AdamW: each pair is a curve.

    Examples:
        >>> labelled([{"structure": "dense"}, {"structure": "dense", "optimizer": "soap"}])[1]
        {'structure': 'dense, soap', 'optimizer': None}
    """
    return [
        {**r, "structure": f"{r['structure']}, {r['optimizer']}", "optimizer": None}
        if r.get("optimizer")
        else {**r}
        for r in records
    ]


def timed(records: Sequence[Record]) -> list[Record]:
    """Runs with seconds of their own, on one machine: that of most; those of two do not compare.

    Examples:
        >>> runs = [{"seconds": s, "machine": m} for s, m in ((1.0, "a"), (2.0, "b"), (3.0, "b"))]
        >>> [run["seconds"] for run in timed([*runs, {"seconds": None, "machine": "a"}])]
        [2.0, 3.0]
    """
    own = [r for r in records if r.get("seconds") is not None]
    most = Counter(r.get("machine") for r in own).most_common(1)
    return [r for r in own if r.get("machine") == most[0][0]]


def file_hash(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _order(record: Record) -> tuple[Any, ...]:
    """Rows by dataset, structure, size and seed."""
    return (
        str(record.get("dataset")),
        str(record.get("structure")),
        record.get("width") or 0,
        record.get("seed") or 0,
    )


def _cell(value: Any) -> Any:
    """None is empty; a float has the digits that tell it apart."""
    return "" if value is None else repr(value) if isinstance(value, float) else value


def _value(key: str, cell: str | None) -> Any:
    """The inverse of `_cell`."""
    if cell is None or cell == "":
        return None
    if key in _TEXT:
        return cell
    if key in _NUMBERS:
        return int(float(cell))
    try:
        return float(cell)
    except ValueError:
        return cell
