"""One process at a time on one run folder.

The lock is the kernel's (`flock`): it goes away with the process that holds it, also after `kill
-9`, so that there are
no stale locks to take over and no clocks or process ids to compare.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")  # for people who look; the lock does not depend on it
        file.flush()
        yield True


def is_held(folder: Path) -> bool:
    """Whether some process works in `folder`."""
    if not (folder / "lock").exists():
        return False
    with (folder / "lock").open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
