"""Analyses of many matrices in a folder: one file for each, written when it is finished.

A second call goes on where the first ended: a file whose matrix and options are the same is read.
"""

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matrigami._words import duration
from matrigami.studies._environment import environment
from matrigami.studies._record import read_json, write_atomic, write_json
from matrigami.studies.analysis._analyze import analyze
from matrigami.studies.analysis._input import check_memory
from matrigami.studies.analysis._result import Analysis
from matrigami.studies.analysis._sources import Source

POWER = 2.5
"""Work grows with this power of the size: between filling matrices and taking them apart."""


@dataclass(frozen=True)
class Settings:
    """How every matrix of a folder is analysed.

    Args:
        budget: Storage at which structures are compared.
        draws: Of each null model that counts.
        seed: Of random orders and null models.
        largest: Rows and columns beyond which the leading corner is taken; 0 for no limit.
    """

    budget: float = 0.1
    draws: int = 5
    seed: int = 0
    largest: int = 1024


def analyze_all(
    sources: Sequence[Source],
    out: Path,
    settings: Settings | None = None,
    *,
    report: Callable[[str], None] | None = None,
) -> tuple[list[Analysis], dict[str, str]]:
    """Analyse matrices, those first that were given first.

    Args:
        sources: The matrices.
        out: Folder of the results: `matrices/*.json` and `env.json`.
        settings: How.
        report: Told how far it is, in words, after each part of the work.

    Returns:
        The results, and by the name of each matrix that was refused why.
    """
    settings = settings or Settings()
    (out / "matrices").mkdir(parents=True, exist_ok=True)
    write_json(out / "env.json", environment("cpu", 1, 1))
    cut = [source.corner(settings.largest) for source in sources]
    clock = _Remaining([(s.shape[0] * s.shape[1]) ** (POWER / 2) for s in cut], report)
    found: list[Analysis] = []
    refused: dict[str, str] = {}
    for source in cut:
        try:
            found.append(_one(source, out, settings, clock))
        except ValueError as error:
            refused[source.name] = str(error)
        clock.next()
    return found, refused


def write_gains(path: Path, found: Sequence[Analysis]) -> Path:
    """Write a table with a row for each matrix, structure and storage.

    Args:
        path: The CSV file.
        found: The results.

    Returns:
        The file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["matrix", "rows", "columns", "structure", "order", "storage", "error", "gain", "present"]
    )
    for a in found:
        for f in a.findings:
            for storage, error, gain, present in zip(
                a.storages, f.best, f.gains, f.present, strict=True
            ):
                numbers = [f"{x:.4g}" for x in (storage, error, gain)]
                row = [a.name, *a.shape, f.structure, f.ordering, *numbers, int(present)]
                writer.writerow(row)
    write_atomic(path, text.getvalue())
    return path


def _one(source: Source, out: Path, settings: Settings, clock: "_Remaining") -> Analysis:
    """One matrix, from its file if that is there."""
    path = out / "matrices" / f"{_slug(source.name)}.json"
    key = {"identity": source.identity, "shape": list(source.shape), **asdict(settings)}
    known = _known(path)
    if known is not None and known.get("key") == key:
        clock.skip()
        return Analysis.from_json(known["analysis"])
    check_memory(*source.shape)
    A, points = source.read()
    found = analyze(
        A,
        points=points,
        budget=settings.budget,
        draws=settings.draws,
        seed=settings.seed,
        name=source.name,
        progress=lambda done, total: clock.tell(source.name, done / total),
    )
    more = () if source.measure is None else (source.measure(),)
    found = replace(found, notes=(*source.notes, *more))
    write_json(path, {"key": key, "analysis": found.to_json()})
    return found


def _known(path: Path) -> Mapping[str, Any] | None:
    """The contents of a result; None if it is absent or cut short."""
    try:
        return read_json(path)
    except json.JSONDecodeError:
        return None


def _slug(name: str) -> str:
    """A name for a file, unique like the name."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)[:60]}-{digest}"


class _Remaining:
    """How far the work is, and how long the rest takes at the speed so far."""

    def __init__(self, work: Sequence[float], report: Callable[[str], None] | None) -> None:
        self.work, self.report = list(work), report
        self.current, self.skipped, self.started = 0, 0.0, time.monotonic()

    def skip(self) -> None:
        """The current matrix was read, not analysed."""
        self.skipped += self.work[self.current]

    def next(self) -> None:
        """The current matrix is finished."""
        self.current += 1

    def tell(self, name: str, fraction: float) -> None:
        """Say so."""
        if self.report is None:
            return
        now = sum(self.work[: self.current]) + fraction * self.work[self.current]
        done, left = now - self.skipped, sum(self.work) - now
        eta = left * (time.monotonic() - self.started) / done if done > 0 else None
        parts = [f"{self.current + 1}/{len(self.work)} {name}", f"{fraction:.0%}"]
        self.report(" · ".join([*parts, *([] if eta is None else [f"eta {duration(eta)}"])]))
