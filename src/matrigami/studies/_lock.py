"""One process at a time on one run folder.

The lock is the kernel's: it goes away with the process that holds it, also after `kill -9`, so that
there are no stale locks to take over and no clocks or process ids to compare.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Try to be the one process that works in `folder`; yields whether it is.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with hold(folder) as first, hold(folder) as second:
        ...     (first, second)
        (True, False)
    """
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    with lock:
        yield True


def is_held(folder: Path) -> bool:
    """Whether some process works in `folder`.

    A look takes the lock for a moment, so that of two at one instant the second sees the first.
    """
    if not (folder / "lock").exists():
        return False
    try:
        with hold(folder) as free:
            return not free
    except PermissionError:  # the folder of somebody else, whose status has to be believed
        return True
