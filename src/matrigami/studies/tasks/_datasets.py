"""Labelled images in memory, read from the files that their authors publish; nothing is unpickled.

The data folder is the argument, else `$MATRIGAMI_DATA`, else `~/.cache/matrigami`. Fill it with
`matrigami data get NAME`.

Shapes: n = images, s = side in pixels, c = channels.
"""

import gzip
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from matrigami.studies.tasks._sources import SOURCES, Source


class Images(NamedTuple):
    """Pixels by row, channel, column (the fastest to resample), and the class of each image."""

    pixels: UInt8[Tensor, "n s c s"]
    labels: Int64[Tensor, " n"]


class Split(NamedTuple):
    """Training and test images, and the number of classes."""

    train: Images
    test: Images
    classes: int


def data_folder(folder: str | Path | None = None) -> Path:
    """Where data sets are: the argument, else `$MATRIGAMI_DATA`, else `~/.cache/matrigami`."""
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("MATRIGAMI_DATA") or Path.home() / ".cache" / "matrigami")


def load_images(name: str, folder: str | Path | None = None) -> Split:
    """A data set in memory.

    Args:
        name: `digits`, `cifar10`, `cifar100` or `fashion_mnist`.
        folder: The data folder; see `data_folder`.

    Raises:
        ValueError: If there is no such data set, or its files are missing or damaged.
    """
    if name not in IMAGE_SETS:
        raise ValueError(
            f"Image data set {name!r}: known are {', '.join(IMAGE_SETS)}.\nCheck the spelling."
        )
    return IMAGE_SETS[name](data_folder(folder))


def read_checked(source: Source, name: str, folder: Path) -> bytes:
    """The content of one file of a data set, checked against the hash that is known for it.

    Raises:
        ValueError: If it is missing or damaged.
    """
    path = folder / source.folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: it cannot be read: {error.strerror}.\n"
            f"Get it with `matrigami data get {source.name} --to {folder}`, "
            "or point MATRIGAMI_DATA to where it is."
        ) from error
    found, wanted = hashlib.sha1(content, usedforsecurity=False).hexdigest(), source.files[name]
    if found != wanted:
        raise ValueError(
            f"{path}: "
            f"it is damaged: its SHA-1 is {found}, not {wanted} ({len(content)} bytes).\n"
            f"Delete it and run `matrigami data get {source.name} --to {folder}`."
        )
    return content


def _digits(_: Path) -> Split:
    """8x8 digits that ship with scikit-learn; of each class, every fifth image is for the test."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional, and heavy
    except ImportError as error:
        raise ValueError(
            "task `digits`: "
            "its data ship with scikit-learn, which is not installed.\n"
            "Install it: pip install scikit-learn."
        ) from error
    raw, labels = load_digits(return_X_y=True)
    rank = np.zeros(len(labels), dtype=int)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    images = raw.astype(np.uint8).reshape(-1, 8, 1, 8)
    parts = [_images(images[chosen], labels[chosen]) for chosen in (rank % 5 != 4, rank % 5 == 4)]
    return Split(parts[0], parts[1], classes=10)


def _cifar(source: Source, folder: Path, label_bytes: int, classes: int) -> Split:
    """Records of label bytes (the last one is the fine label) and 3x32x32 pixels."""
    records: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name in source.files:
        raw = np.frombuffer(read_checked(source, name, folder), np.uint8)
        records[name.startswith("test")].append(raw.reshape(-1, label_bytes + 3072))
    parts = []
    for is_test in (False, True):
        rows = np.concatenate(records[is_test])
        pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 1, 3)
        parts.append(_images(pixels, rows[:, label_bytes - 1]))
    return Split(parts[0], parts[1], classes)


def _cifar10(folder: Path) -> Split:
    return _cifar(SOURCES["cifar10"], folder, label_bytes=1, classes=10)


def _cifar100(folder: Path) -> Split:
    return _cifar(SOURCES["cifar100"], folder, label_bytes=2, classes=100)


def _fashion_mnist(folder: Path) -> Split:
    """28x28 grey images in gzipped idx files."""
    source, parts = SOURCES["fashion_mnist"], []
    for part in ("train", "t10k"):
        pixels = read_idx(read_checked(source, f"{part}-images-idx3-ubyte.gz", folder))
        labels = read_idx(read_checked(source, f"{part}-labels-idx1-ubyte.gz", folder))
        parts.append(_images(pixels[:, :, None, :], labels))
    return Split(parts[0], parts[1], classes=10)


def read_idx(content: bytes) -> np.ndarray:
    """The array of bytes in a gzipped idx file.

    Raises:
        ValueError: If it is not such a file, or shorter than it says.
    """
    try:
        raw = gzip.decompress(content)
        axes = raw[3]
        sizes = np.frombuffer(raw, ">i4", axes, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ValueError(
            f"An idx file of {len(content)} bytes: it is damaged: {error}.\nGet it again."
        ) from error


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """Copies as tensors."""
    return Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))


IMAGE_SETS: dict[str, Callable[[Path], Split]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion_mnist": _fashion_mnist,
}
"""Reader of each data set; it takes the data folder."""
