"""A folder of images of your own: `train/<class>/*.png` and `test/<class>/*.png`.

Classes are the names of the folders below `train`, in alphabetical order. Images are read by
Pillow, cut to their middle square and resized to one side. Names that begin with a point are not
read: systems and editors put such files and folders beside others.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matrigami._words import cause
from matrigami.studies.tasks._datasets import Images, Split

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What files are images."""

Files = list[tuple[Path, int]]
"""Images with their labels."""


def read_folder(name: str, folder: Path, side: int | None = None) -> Split:
    """The images of a folder.

    Args:
        name: What the study calls it.
        folder: The folder, with `train` and `test`.
        side: Pixels of a side; by default that of the images, which must then be equal squares.

    Raises:
        ValueError: If a part or a class is missing, there is but one, a class has no image to
            learn from, an image cannot be read, or sizes differ.
    """
    classes = _folders(name, folder / "train")
    unknown = sorted(set(_folders(name, folder / "test")) - set(classes))
    if unknown:
        raise _refusal(
            name,
            f"test has the classes {', '.join(unknown)}, which train lacks",
            "Give both the same folders.",
        )
    files = {
        part: [(path, k) for k, c in enumerate(classes) for path in _images(folder / part / c)]
        for part in ("train", "test")
    }
    if bare := _bare(folder, classes, files):
        raise _refusal(name, f"{bare[0]} has no images", f"Known are {', '.join(ENDINGS)}.")
    if len(classes) < 2:
        raise _refusal(name, f"{folder / 'train'} has only the class {classes[0]}", "Give two.")
    read = partial(_square, name, side=side or _width(name, files["train"][0][0]), cut=bool(side))
    train, test = (_stacked(found, read) for found in files.values())
    return Split(train, test, len(classes))


def _bare(folder: Path, classes: list[str], files: Mapping[str, Files]) -> list[Path]:
    """Classes without an image to learn from, and a test without any."""
    taught = {k for _, k in files["train"]}
    bare = [folder / "train" / c for k, c in enumerate(classes) if k not in taught]
    return bare if files["test"] else [*bare, folder / "test"]


def _folders(name: str, folder: Path) -> list[str]:
    """The classes below a folder."""
    found = sorted(p.name for p in _seen(folder) if p.is_dir()) if folder.is_dir() else []
    if not found:
        raise _refusal(
            name,
            f"{folder} has no folders of classes",
            "Lay it out as train/<class>/*.png and test/<class>/*.png.",
        )
    return found


def _images(folder: Path) -> list[Path]:
    """The images of a class, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in _seen(folder) if p.suffix.lower() in ENDINGS)


def _seen(folder: Path) -> Iterator[Path]:
    """What is in a folder and not hidden."""
    return (p for p in folder.iterdir() if not p.name.startswith("."))


def _pillow() -> Any:
    """The package, which is an extra."""
    try:
        from PIL import Image  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ValueError(
            "A folder of images: pillow, which reads them, is not installed.\n"
            "Install it: pip install pillow."
        ) from error
    return Image


def _width(name: str, path: Path) -> int:
    """Pixels of a row of an image."""
    with _opened(name, path) as image:
        return image.width


def _opened(name: str, path: Path) -> Any:
    """An image."""
    read = _pillow().open
    try:
        return read(path)
    except Exception as error:  # what Pillow raises depends on the format and on the damage
        raise _refusal(name, f"{path} cannot be read as an image", "Remove it.") from error


def _stacked(files: Files, read: Callable[[Path], Tensor]) -> Images:
    """Pixels and labels."""
    pixels = [read(path) for path, _ in files]
    labels = torch.tensor([label for _, label in files])
    return Images(torch.stack(pixels), labels)


def _square(name: str, path: Path, side: int, *, cut: bool) -> Tensor:
    """One image by row, channel, column; unless it may be cut, of that side already."""
    whole = _of_bytes(name, path)
    short, (width, height) = min(whole.size), whole.size
    if not cut and whole.size != (side, side):
        raise _refusal(
            name,
            f"{path} is {width} x {height}, no square of side {side}",
            "Say by `side` to which square images are cut and resized, e.g. side = 32.",
        )
    left, top = (width - short) // 2, (height - short) // 2
    square = whole.crop((left, top, left + short, top + short))
    small = square if short == side else square.resize((side, side))
    return torch.from_numpy(np.asarray(small).transpose(0, 2, 1).copy())


def _of_bytes(name: str, path: Path) -> Any:
    """An image of three channels; more than 8 bits of one would be cut off."""
    with _opened(name, path) as image:
        if image.mode.startswith(("I", "F")):
            raise _refusal(
                name,
                f"{path} has pixels of more than 8 bits ({image.mode})",
                "Save it with 8 bits, or give arrays of floats.",
            )
        try:
            return image.convert("RGB")
        except Exception as error:
            raise _refusal(name, f"{path} is damaged: {cause(error)}", "Remove it.") from error


def _refusal(name: str, what: str, advice: str) -> ValueError:
    """What to raise for a folder that makes no task."""
    return ValueError(f"{name}: the folder makes no task: {what}.\n{advice}")
