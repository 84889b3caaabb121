"""Where matrices come from: files of arrays, weights of a model, kernels of points.

Shapes are known before anything is read, and nothing is unpickled.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matrigami._words import cause, nearest
from matrigami.geometry.particles import KERNELS, error_estimate, kernel_matrix
from matrigami.geometry.particles._kernels import interactions, is_singular
from matrigami.geometry.particles._points import check_coincidence, check_scale, checked_points
from matrigami.operators import cost

LEAST = 16
"""Matrices with fewer rows or columns are left out of a model: they have no structure to find."""

KINDS = (".npy", ".safetensors", ".mtx", ".mtx.gz")
"""Endings of files that hold matrices."""

Loaded = tuple[Any, Tensor | None]
"""A matrix, or an array of NumPy or SciPy, and the points of its rows and columns, if any."""


@dataclass(frozen=True)
class Source:
    """A matrix that can be read when its turn comes.

    Args:
        name: What it is called; unique in a list.
        shape: Rows and columns, of the leading corner that is wanted.
        load: Makes it, or what its corner is cut from.
        identity: Of the contents: a finished analysis of it is not repeated.
        notes: What was done to it.
        measure: Finds out what else there is to say of it, when it is read.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], Loaded]
    identity: str = ""
    notes: tuple[str, ...] = ()
    measure: Callable[[], str] | None = None

    def corner(self, largest: int) -> "Source":
        """The source of the leading corner, where one side is larger; 0 for no limit."""
        m, n = self.shape
        if not largest or max(m, n) <= largest:
            return self
        rows, columns = min(m, largest), min(n, largest)
        note = f"leading {rows}x{columns} corner of {m}x{n}"
        return replace(self, shape=(rows, columns), notes=(*self.notes, note))

    def read(self) -> tuple[Tensor, Tensor | None]:
        """The entries, and points; of a large sparse matrix no more than the corner is filled."""
        A, points = self.load()
        m, n = self.shape
        A = A[:m, :n]
        A = A.toarray() if hasattr(A, "toarray") else A
        A = A if isinstance(A, Tensor) else torch.from_numpy(np.array(A))
        return A, None if points is None else points[:m]


def file_sources(path: Path) -> list[Source]:
    """The matrices of a file or of a model folder.

    Raises:
        ValueError: If there are none, or it cannot be read.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
        if not files:
            raise ValueError(
                f"model folder {path}: it holds no .safetensors file.\n"
                "Save the weights with safetensors.torch.save_file; pickles are not read."
            )
        several = len(files) > 1
        found = [(f.stem + "/" if several else "", s) for f in files for s in _tensors(f)]
        return _some(path, [replace(s, name=prefix + s.name) for prefix, s in found])
    if not path.exists():
        raise ValueError(
            f"matrix {path}: there is no such file or folder.\n"
            f"Give a file ({', '.join(KINDS)}), a model folder, or --kernel and --points."
        )
    readers = {".npy": _array, ".safetensors": _tensors, ".mtx": _market, ".gz": _market}
    if path.suffix not in readers:
        raise ValueError(
            f"matrix {path}: files that end in {path.suffix!r} are not read.\n"
            f"Give one of {', '.join(KINDS)}; numpy.save and safetensors write the first two."
        )
    return _some(path, readers[path.suffix](path))


def kernel_source(kernel: str, path: Path, scale: float = 1.0) -> Source:
    """The matrix of a kernel on the points of a file (`.npy`, or text with a point in each line).

    Raises:
        ValueError: If the kernel is unknown, or the points cannot be read.
    """
    if kernel not in KERNELS:
        near = nearest(kernel, KERNELS)
        raise ValueError(
            f"--kernel {kernel}: known kernels: {', '.join(KERNELS)}.\nDid you mean {near!r}?"
        )
    check_scale(scale)
    read = _read("points", path, lambda: np.asarray(_points(path), dtype=np.float64))
    points = checked_points(f"--points {path}", read)
    if is_singular(KERNELS[kernel]):
        check_coincidence(points)
    name = f"{kernel} of {len(points)} points"

    def measure() -> str:
        A = kernel_matrix(points, kernel, scale=scale)
        error = error_estimate(A, points, kernel, scale=scale)
        kind, numbers = type(A).__name__, cost(A).params
        return f"kernel_matrix: {kind} of {numbers} numbers, a product has the error {error:.0e}"

    identity = f"{kernel} {scale} {_hash(path)}"
    pairs = _Pairs(points, kernel, scale)
    shape = (len(points), len(points))
    return Source(name, shape, lambda: (pairs, points), identity, measure=measure)


@dataclass(frozen=True)
class _Pairs:
    """A kernel matrix of which corners are computed."""

    points: Tensor
    kernel: str
    scale: float

    def __getitem__(self, corner: tuple[slice, slice]) -> Tensor:
        """The entries of a corner."""
        X, Y = (self.points[side] for side in corner)
        return interactions(KERNELS[self.kernel], X, Y, self.scale)


def _points(path: Path) -> np.ndarray:
    """Coordinates, a row for each point."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    delimiter = "," if "," in path.read_text("utf-8") else None
    return np.loadtxt(path, delimiter=delimiter, ndmin=2)


def _array(path: Path) -> list[Source]:
    """The matrix of a `.npy` file."""
    array = _read("matrix", path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    if array.dtype.kind not in "biufc":
        raise ValueError(
            f"matrix {path}: it holds no numbers but {array.dtype}.\nSave it as float32 or float64."
        )

    return [_source(path.stem, tuple(array.shape), lambda: (array, None), _hash(path))]


def _market(path: Path) -> list[Source]:
    """The matrix of a Matrix-Market file."""
    from scipy.io import mminfo, mmread  # noqa: PLC0415 - not needed to import the package
    from scipy.sparse import issparse  # noqa: PLC0415

    m, n, *_ = _read("matrix", path, lambda: mminfo(path))

    def load() -> Loaded:
        A: Any = _read("matrix", path, lambda: mmread(path))
        return A.tocsr() if issparse(A) else np.asarray(A), None

    return [_source(path.name.split(".mtx")[0], (m, n), load, _hash(path))]


def _tensors(path: Path) -> list[Source]:
    """The matrices of a `.safetensors` file, kernels of convolutions as (output, inputs)."""
    from safetensors import safe_open  # noqa: PLC0415 - not needed to import the package

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def shapes() -> dict[str, tuple[int, ...]]:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    found = []
    stamp = _hash(path)
    for name, shape in _read("matrix", path, shapes).items():
        flat = (shape[0], int(np.prod(shape[1:]))) if shape else (0, 0)
        if len(shape) >= 2 and min(flat) >= LEAST:

            def load(name: str = name, flat: tuple[int, int] = flat) -> Loaded:
                return read(name).reshape(flat), None

            notes = (f"reshaped from {shape}",) if len(shape) > 2 else ()
            found.append(Source(name, flat, load, f"{stamp} {name}", notes))
    return found


def _source(name: str, shape: tuple[int, ...], load: Callable[[], Loaded], identity: str) -> Source:
    """A source of one matrix.

    Raises:
        ValueError: If it is none.
    """
    if len(shape) != 2:
        raise ValueError(
            f"matrix {name}: it is an array of shape {shape}.\n"
            "Save it with two axes: rows and columns."
        )
    return Source(name, (shape[0], shape[1]), load, identity)


def _some(path: Path, found: Sequence[Source]) -> list[Source]:
    """The sources, if there are any."""
    if not found:
        raise ValueError(
            f"matrices of {path}: "
            f"it holds none of at least {LEAST} rows and columns.\n"
            "Vectors and small matrices have no structure to find."
        )
    return list(found)


def _read(what: str, path: Path, reader: Callable[[], Any]) -> Any:
    """What a reader returns.

    Raises:
        ValueError: If the file is missing or is not of its kind.
    """
    try:
        return reader()
    except Exception as error:
        raise ValueError(
            f"The {what} {path}: it cannot be read: {cause(error)}.\n"
            f"Give one of {', '.join(KINDS)} with numbers in it; points may be text, too."
        ) from error


def _hash(path: Path) -> str:
    """Of the contents, in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()[:16]
