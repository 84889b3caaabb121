"""Entropy-coded integers: a `LatticeMatrix` in as many bytes as its codes are surprising.

The stream is that of asymmetric numeral systems (Duda 2009, arXiv:1311.2540) by the library
`constriction` (Bamler 2022, arXiv:2201.01741), the extra `entropy`. Codes are coded by classes of
their expected size, each with a table of its own:

    row_sizes     2 log2(mean |code| of a row / mean of all), rounded      int8, (m)
    column_sizes  the same of columns                                     int8, (n)
    class         row + column size, cut off at LARGEST on both sides
    tables        counts of the codes of a class from its lowest to its highest, class by class
    words         the stream: classes from the lowest, codes of a class row by row
    rows, columns the scales

The description holds the size of the matrix, `[class, lowest, length of the table]` for each class,
and the hash of the codes, which a decoder compares.

Shapes: m = rows, n = columns.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matrigami.compress._waterfill import LatticeMatrix

LARGEST = 24
"""Half octaves from the mean; beyond them all codes are of one class."""

WIDEST = 2**16
"""Most entries of a table."""


def coded(value: LatticeMatrix) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a matrix.

    Raises:
        ValueError: If the extra is not installed, or the codes spread too far for tables.
    """
    ans, categorical = _library("coded")
    codes = value.codes.cpu().numpy()
    sizes = [_sizes(np.abs(codes).mean(axis), np.abs(codes).mean()) for axis in (1, 0)]
    coder, classes, tables, parts = ans(), [], [], []
    for kind, mine in _classes(sizes[0], sizes[1]):
        some = codes[mine]
        low, high = int(some.min()), int(some.max())
        if high - low >= WIDEST:
            raise ValueError(
                f"coded: codes reach from {low} to {high}; a table has at most {WIDEST} entries.\n"
                "Round to fewer bits."
            )
        classes.append([kind, low, high - low + 1])
        tables.append(np.bincount(some - low, minlength=high - low + 1))
        parts.append((some - low).astype(np.int32))
    for part, counts in reversed(list(zip(parts, tables, strict=True))):
        if len(counts) > 1:  # a stack: what is read first is pushed last
            coder.encode_reverse(part, categorical(counts))
    told = {"kind": "lattice", "matrix": list(codes.shape), "classes": classes}
    told["sha256"] = _hash(codes)
    tensors = {
        "rows": value.rows.contiguous(),
        "columns": value.columns.contiguous(),
        "row_sizes": torch.from_numpy(sizes[0]),
        "column_sizes": torch.from_numpy(sizes[1]),
        "tables": torch.from_numpy(np.concatenate(tables).astype(np.int32)),
        "words": torch.from_numpy(coder.get_compressed().view(np.int32).copy()),
    }
    return told, tensors


def restored(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LatticeMatrix:
    """The inverse of `coded`.

    Raises:
        ValueError: If the extra is not installed, or lengths or the hash differ.
    """
    ans, categorical = _library("restored")
    _check_lengths(told, tensors)
    (m, n), rows = told["matrix"], tensors["row_sizes"]
    found = list(_classes(rows.numpy(), tensors["column_sizes"].numpy()))
    if [kind for kind, _ in found] != [kind for kind, _, _ in told["classes"]]:
        raise ValueError("the classes are not those of the sizes of rows and columns.")
    coder = ans(tensors["words"].numpy().view(np.uint32))
    tables = tensors["tables"].numpy().astype(np.int64)
    codes, start = np.zeros((m, n), np.int32), 0
    for (_, mine), (_, low, width) in zip(found, told["classes"], strict=True):
        counts, start = tables[start : start + width], start + width
        if counts.sum() != mine.sum() or (counts < 0).any():
            raise ValueError(f"a table counts {counts.sum()} codes of {mine.sum()}.")
        read = coder.decode(categorical(counts), int(mine.sum())) if width > 1 else 0
        codes[mine] = low + read
    if not coder.is_empty() or _hash(codes) != told["sha256"]:
        raise ValueError("the codes are not those that were written: their hash differs.")
    return LatticeMatrix(torch.from_numpy(codes), tensors["rows"], tensors["columns"])


def _check_lengths(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose lengths are not those of the description."""
    m, n = told["matrix"]
    lengths = {"rows": m, "columns": n, "row_sizes": m, "column_sizes": n}
    lengths["tables"] = sum(width for _, _, width in told["classes"])
    for key, length in lengths.items():
        if tensors[key].shape != (length,):
            raise ValueError(f"{key} has the shape {tuple(tensors[key].shape)}, not ({length},).")


def _library(name: str) -> tuple[Any, Any]:
    """The coder, and the model of a table of counts."""
    try:
        import constriction  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: constriction is not installed.\nInstall it: pip install constriction."
        ) from error
    model = constriction.stream.model.Categorical

    def categorical(counts: np.ndarray) -> Any:
        """Its probabilities."""
        return model(counts / counts.sum(), perfect=False)

    return constriction.stream.stack.AnsCoder, categorical


def _sizes(means: np.ndarray, mean: float) -> np.ndarray:
    """Half octaves above the mean of all."""
    share = np.maximum(means / max(float(mean), 1e-30), 2.0 ** (-LARGEST))
    return np.clip(np.rint(2 * np.log2(share)), -LARGEST, LARGEST).astype(np.int8)


def _classes(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class that there is, and its places."""
    kinds = rows[:, None].astype(int) + columns[None].astype(int)
    kinds = np.clip(kinds, -LARGEST, LARGEST)
    for kind in np.unique(kinds):
        yield int(kind), kinds == kind


def _hash(codes: np.ndarray) -> str:
    """Of the codes as 32-bit integers, row by row, least byte first."""
    return hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()
