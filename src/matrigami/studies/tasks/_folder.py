"""A folder of images of your own: `train/<class>/*.png` and `test/<class>/*.png`.

Classes are the names of the folders below `train`, in alphabetical order. Images are read by
Pillow, cut to their middle square and resized to one side.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matrigami.studies.tasks._datasets import Images, Split

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What files are images."""


def read_folder(name: str, folder: Path, side: int | None = None) -> Split:
    """The images of a folder.

    Args:
        name: What the study calls it.
        folder: The folder, with `train` and `test`.
        side: Pixels of a side; by default that of the images, which must then be equal squares.

    Raises:
        ValueError: If a part or a class is missing, an image cannot be read, or sizes differ.
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
    for part, found in files.items():
        if not found:
            raise _refusal(
                name, f"{folder / part} has no images", f"Known are {', '.join(ENDINGS)}."
            )
    side = side or _common_side(name, files["train"][0][0])
    train, test = (_read(name, found, side) for found in files.values())
    return Split(train, test, len(classes))


def _folders(name: str, folder: Path) -> list[str]:
    """The classes below a folder."""
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
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
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)


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


def _common_side(name: str, path: Path) -> int:
    """The side of an image, if it is a square."""
    with _opened(name, path) as image:
        width, height = image.size
    if width != height:
        raise _refusal(
            name,
            f"{path} is {width} x {height}, no square",
            "Say by `side` to which square images are cut and resized, e.g. side = 32.",
        )
    return width


def _opened(name: str, path: Path) -> Any:
    """An image."""
    try:
        return _pillow().open(path)
    except OSError as error:
        raise _refusal(name, f"{path} cannot be read as an image", "Remove it.") from error


def _read(name: str, files: list[tuple[Path, int]], side: int) -> Images:
    """Pixels and labels."""
    pixels = [_square(name, path, side) for path, _ in files]
    labels = torch.tensor([label for _, label in files])
    return Images(torch.stack(pixels), labels)


def _square(name: str, path: Path, side: int) -> Tensor:
    """One image by row, channel, column."""
    try:
        with _opened(name, path) as image:
            short, (width, height) = min(image.size), image.size
            left, top = (width - short) // 2, (height - short) // 2
            square = image.convert("RGB").crop((left, top, left + short, top + short))
            small = square if short == side else square.resize((side, side))
            return torch.from_numpy(np.asarray(small).transpose(0, 2, 1).copy())
    except OSError as error:
        raise _refusal(name, f"{path} is damaged: {error}", "Remove it.") from error


def _refusal(name: str, what: str, advice: str) -> ValueError:
    """What to raise for a folder that makes no task."""
    return ValueError(f"{name}: the folder makes no task: {what}.\n{advice}")
