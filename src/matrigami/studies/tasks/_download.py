"""Fetch a data set: resume what was begun, take only the expected files, check every one."""

import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from io import BufferedIOBase
from pathlib import Path
from typing import IO

from matrigami.studies.tasks._datasets import data_folder, read_checked
from matrigami.studies.tasks._sources import SOURCES, Source

Tell = Callable[[str, int, int | None], None]
"""Told while bytes arrive: file name, bytes so far, bytes in all if known."""

Stream = IO[bytes] | BufferedIOBase | HTTPResponse

BLOCK = 1 << 18
TRIES = 5
TIMEOUT = 60.0

PAUSE = 0.2
"""Seconds before the second attempt; each further pause is about twice as long."""

LARGEST = 1 << 30
"""Bytes of a file in an archive above which it cannot be one of a data set."""


def get_dataset(
    name: str,
    to: str | Path | None = None,
    *,
    at_hand: Path | None = None,
    tell: Tell | None = None,
) -> list[Path]:
    """Put the files of a data set into the data folder.

    Args:
        name: `cifar10`, `cifar100` or `fashion_mnist`.
        to: Data folder; by default `$MATRIGAMI_DATA`, else `~/.cache/matrigami`.
        at_hand: The archive, or a folder with its files, instead of a download.
        tell: Told how far the download is.

    Returns:
        The files, all checked.

    Raises:
        ValueError: If the data set is unknown, its files are missing or damaged, or the folder
            cannot be written.
        OSError: If the network fails; what has arrived is kept for the next call.
    """
    if name not in SOURCES:
        raise ValueError(
            f"Data set {name!r}: those to download are {', '.join(SOURCES)}.\n"
            "`digits` and the teachers need no download."
        )
    source, folder = SOURCES[name], data_folder(to)
    paths = [folder / source.folder / file for file in source.files]
    if at_hand is None and _complete(source, folder):
        return paths
    try:
        (folder / source.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{name}: {folder} cannot be written: {error.strerror}.\n"
            "Choose another folder with --to."
        ) from error
    if at_hand is None:
        _download_all(source, folder, tell or _silent)
    else:
        _take(source, at_hand, folder)
    for file in source.files:
        read_checked(source, file, folder)
    return paths


def _take(source: Source, at_hand: Path, folder: Path) -> None:
    """The files of a data set from a folder, an archive, or the one file that it is."""
    if at_hand.is_dir():
        _copy(source, at_hand, folder)
    elif len(source.files) == 1:
        with at_hand.open("rb") as content:
            _store(content, folder / source.folder / next(iter(source.files)))
    else:
        _unpack(source, at_hand, folder)


def download(url: str, path: Path, tell: Tell) -> None:
    """Download one file; a part that is there already is continued.

    Args:
        url: Address, http or https.
        path: Where to put the whole file; the part is beside it with `.part` added.
        tell: Told how far it is.

    Raises:
        OSError: If it does not arrive in `TRIES` attempts; the part is kept.
    """
    part, failure = path.with_name(f"{path.name}.part"), ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * (2**attempt - 1))
        try:
            if _continue(url, part, tell):
                part.replace(path)
                return
            failure = "the connection ended early"
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            failure = str(error)
    size = part.stat().st_size if part.exists() else 0
    raise OSError(
        f"{url}: it did not arrive: {failure}; {size} bytes are kept in {part}.\n"
        "Run the same command again to continue, or give a file with --from."
    )


def _continue(url: str, part: Path, tell: Tell) -> bool:
    """One attempt at the rest of a file; whether it is whole now."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - see below
    if request.type not in ("http", "https"):
        raise ValueError(f"{url}: it is no web address.\nGive http:// or https://.")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310 - checked above
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return True  # the part is the whole file
        part.unlink()
        return False
    with response:
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        if length is not None and not length.isdecimal():
            raise HTTPException(f"the server says Content-Length {length!r}")
        total = None if length is None else have + int(length)
        with part.open("ab" if resumed else "wb") as file:
            have = _receive(response, file, have, lambda n: tell(part.stem, n, total))
    return total is None or have == total


def _receive(response: HTTPResponse, file: Stream, have: int, tell: Callable[[int], None]) -> int:
    """Write what arrives, as it arrives; the size of the file at the end."""
    while block := response.read1(BLOCK):
        file.write(block)
        have += len(block)
        tell(have)
    return have


def _download_all(source: Source, folder: Path, tell: Tell) -> None:
    """All addresses of a data set: one archive, or its files."""
    below = folder / source.folder
    for url in source.urls:
        path = below / url.rpartition("/")[2]
        if not path.exists():
            download(url, path, tell)
        if path.name not in source.files:
            _unpack(source, path, folder)
            path.unlink()


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    """Take the expected files, and no others, out of a tar archive."""
    wanted = {f"{source.folder}/{file}": folder / source.folder / file for file in source.files}
    try:
        with tarfile.open(archive) as tar:
            for content, path in _members(tar, wanted):
                _store(content, path)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"{archive}: it cannot be read as a tar archive: {cause}.\nDelete it and get it again."
        ) from error


def _members(tar: tarfile.TarFile, wanted: dict[str, Path]) -> Iterator[tuple[Stream, Path]]:
    """The files of an archive that are wanted, and where each goes."""
    for member in tar:
        path = wanted.get(member.name.removeprefix("./"))
        content = tar.extractfile(member) if path is not None and member.isfile() else None
        if content is not None and path is not None:
            yield _limited(content, member), path


def _limited(content: Stream, member: tarfile.TarInfo) -> Stream:
    """The content of a member that is not larger than any file of a data set."""
    if member.size > LARGEST:
        raise tarfile.TarError(f"{member.name} has {member.size} bytes")
    return content


def _copy(source: Source, at_hand: Path, folder: Path) -> None:
    """Take the expected files from a folder, or from the folder of that name in it."""
    inner = at_hand / source.folder
    origin = inner if inner.is_dir() else at_hand
    for file in source.files:
        if not (origin / file).is_file():
            raise ValueError(
                f"{source.name} from {at_hand}: {origin / file} is missing.\n"
                f"The folder should hold {', '.join(source.files)}."
            )
        with (origin / file).open("rb") as content:
            _store(content, folder / source.folder / file)


def _store(content: Stream, path: Path) -> None:
    """Write aside and rename."""
    aside = path.with_name(f"{path.name}.part")
    with aside.open("wb") as file:
        shutil.copyfileobj(content, file, BLOCK)
    aside.replace(path)


def _complete(source: Source, folder: Path) -> bool:
    """Whether all files are there and whole."""
    try:
        for file in source.files:
            read_checked(source, file, folder)
    except ValueError:
        return False
    return True


def _silent(name: str, have: int, total: int | None) -> None:
    """Tell nobody."""
