"""Words for readers: the columns of a table, the nearest of some names, a time."""

import difflib
from collections.abc import Iterable, Sequence


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


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant.

    Examples:
        >>> nearest("moanrch", ["dense", "monarch"])
        'monarch'
    """
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def duration(seconds: float) -> str:
    """A time for a person.

    Examples:
        >>> duration(42.0), duration(840.0), duration(9000.0)
        ('42 s', '14 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
