"""Words for readers: the columns of a table, the nearest of some names, a time, what is missing."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DISTRIBUTIONS = {"PIL": "pillow", "skfem": "scikit-fem", "sklearn": "scikit-learn"}
"""Packages that pip knows by another name."""


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    r"""The lines of a table.

    Args:
        rows: The cells.
        right: For each column whether it ends, rather than begins, in one place.

    Examples:
        >>> print(*columns([["name", "bytes"], ["a", "12"]], [False, True]), sep="\n")
        name  bytes
        a        12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = [f"{{:{'>' if end else '<'}{w}}}" for w, end in zip(widths, right, strict=False)]
    return ["  ".join(layout).format(*row).rstrip() for row in rows]


def cause(error: BaseException) -> str:
    """Another's error in one line without an end, and what it is where it says nothing.

    NumPy's advice to unpickle what is no array is not passed on.

    Examples:
        >>> cause(ValueError("no numbers.")), cause(AssertionError())
        ('no numbers', 'AssertionError')
    """
    said = " ".join(str(error).split()) or type(error).__name__
    if "allow_pickle" in said or "Python objects in dtype" in said:
        said = "it holds no plain array of numbers, and nothing is unpickled"
    return said[:200].rstrip(". ")


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant.

    Examples:
        >>> nearest("moanrch", ["dense", "monarch"])
        'monarch'
    """
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def nearest_few(name: str, known: Iterable[str]) -> str:
    """The three names that were most likely meant.

    Examples:
        >>> nearest_few("moanrch", ["dense", "monarch"])
        'monarch, dense'
        >>> nearest_few("moanrch", [])
        'none'
    """
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0)) or "none"


def duration(seconds: float) -> str:
    """A time for a person.

    Examples:
        >>> duration(42.0), duration(840.0), duration(9000.0)
        ('42 s', '14 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def what_is_missing(who: str, error: ModuleNotFoundError) -> str:
    """Which package somebody needs, and how to get it.

    Examples:
        >>> what_is_missing("demo", ModuleNotFoundError(name="skfem.mesh"))
        'demo needs scikit-fem, which is not installed: pip install scikit-fem'
    """
    package = (error.name or "").partition(".")[0]
    known = DISTRIBUTIONS.get(package, package)
    return f"{who} needs {known}, which is not installed: pip install {known}"


def finite(value: Any) -> Any:
    """A document without NaN and infinities, which JSON has not: they are None.

    Examples:
        >>> finite({"exponents": (0.5, float("nan"))})
        {'exponents': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
