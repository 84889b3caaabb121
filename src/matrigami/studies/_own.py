"""What a user brings along: a file of arrays, a folder of images, a text, a function.

A name in a study file is relative to the folder of that file. Its content belongs to the identity
of a run: a hash is noted when the file is read, and a source that has changed since is refused, so
that no result is silently of other data.
"""

import hashlib
import runpy
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from matrigami._words import cause, nearest, nearest_few


def is_function(name: str) -> bool:
    """Whether a name means a function in a Python file.

    Examples:
        >>> is_function("nets.py:small"), is_function("mlp")
        (True, False)
    """
    return ".py:" in name


def source_path(name: str, folder: str) -> Path:
    """The file or folder that a name means."""
    return Path(folder, name.partition(".py:")[0] + ".py" if is_function(name) else name)


def function_of(name: str, folder: str) -> Callable[..., Any]:
    """A function of a Python file.

    Args:
        name: `file.py:function`.
        folder: What the file is relative to.

    Raises:
        ValueError: If the file or the function is missing, or the file cannot be run.
    """
    path, function = source_path(name, folder), name.rpartition(":")[2]
    try:
        names = runpy.run_path(str(path))
    except OSError as error:
        raise ValueError(
            f"{name}: {path} cannot be read: {error.strerror}.\n"
            "Give a path relative to the study file."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name}: {path} cannot be run: {type(error).__name__}: {cause(error)}.\n"
            f"{_advice(error, path)}"
        ) from error
    found = names.get(function)
    if not callable(found):
        functions = [n for n, f in names.items() if callable(f) and not n.startswith("_")]
        raise ValueError(
            f"{name}: {path} has no function {function!r}.\n"
            f"Nearest: {nearest_few(function, functions)}."
        )
    return found


def _advice(error: BaseException, path: Path) -> str:
    """What to do about a file that does not run."""
    beside = isinstance(error, ModuleNotFoundError) and (path.parent / f"{error.name}.py").exists()
    if beside:
        return f"Put its folder on the path of Python: PYTHONPATH={path.parent}."
    return "Mend the file."


def call(name: str, folder: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function of a Python file gives.

    Raises:
        ValueError: If it fails: with its error, and the last line of the file that was reached.
    """
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        path, frames = str(source_path(name, folder)), traceback.extract_tb(error.__traceback__)
        line = next((f" in line {f.lineno}" for f in reversed(frames) if f.filename == path), "")
        raise ValueError(
            f"{name}: the function failed{line}: {type(error).__name__}: "
            f"{cause(error)}.\nMend it, or call it in Python to see more."
        ) from error


def source_hash(name: str, folder: str, known: Iterable[str]) -> str:
    """A hash of what a name stands for: 16 hexadecimal digits; empty for a known name.

    Of a file its content; of a folder the names and sizes of its files.

    Raises:
        ValueError: If it is neither known nor there.
    """
    if name in known:
        return ""
    if not name.strip():
        raise ValueError(
            f"A name is empty where one of {', '.join(known)} is needed.\n"
            "Give one of them, a file, a folder, or file.py:function."
        )
    path = source_path(name, folder)
    digest = hashlib.sha256()
    try:
        for block in _hashed(path):
            digest.update(block)
    except OSError as error:
        raise missing(name, path, error, known) from error
    return digest.hexdigest()[:16]


def _hashed(path: Path) -> Iterator[bytes]:
    """The content of a file in pieces; of a folder, a line for each of its files."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            inside = file.relative_to(path)
            if not f"/{inside.as_posix()}".count("/."):  # those that are hidden are not read
                yield f"{inside} {file.stat().st_size}\n".encode()
        return
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def missing(name: str, path: Path, error: OSError, known: Iterable[str]) -> ValueError:
    """What to raise for a name that is neither known nor a file."""
    unread = f"{path} cannot be read: {error.strerror}"
    names = list(known)
    if not names:
        return ValueError(f"{name!r}: {unread}.\nPut it back where it was.")
    if is_function(name):
        return ValueError(f"{name!r}: {unread}.\nGive a path relative to the study file.")
    return ValueError(
        f"{name!r}: it is none of {', '.join(names)}, and {unread}.\n"
        f"Did you mean {nearest(name, names)!r}?"
    )


def refuse_changed(folder: str, name: str, noted: str) -> None:
    """Refuse a source whose content is not what was noted.

    Raises:
        ValueError: If it is not.
    """
    if noted and source_hash(name, folder, ()) != noted:
        raise ValueError(
            f"{name}: {source_path(name, folder)} has changed since the run was "
            "planned.\nStart the study anew from its file, or restore what was there."
        )
