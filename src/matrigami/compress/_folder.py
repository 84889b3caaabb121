"""A folder that is written at once or not at all, and the files that a loader wants in it."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",  # of sentencepiece
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
"""Files beside the weights that a loader of the model wants."""

WEIGHTS = "model.safetensors"
"""The file of the tensors."""

OURS = "matrigami.safetensors"
"""That of our own format: not the other name, under which it would be read without its meaning."""


@contextmanager
def new_folder(folder: str | Path, source: str | Path | None = None) -> Iterator[Path]:
    """A folder to write into, which has its name only when all is written.

    Args:
        folder: A new folder.
        source: The folder that the model came from, whose tokenizer is copied.

    Raises:
        ValueError: If the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists.\nGive the name of a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        for pattern in COPIED if source is not None else ():
            for path in Path(source).glob(pattern):  # pyright: ignore[reportArgumentType]
                shutil.copy2(path, work / path.name)
        work.chmod(0o777 & ~_umask())
        for path in work.iterdir():  # safetensors lets nobody else read its files
            path.chmod(0o666 & ~_umask())
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A file of safetensors.

    Raises:
        OSError: If it cannot be written, of a full disk for example.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:  # which has the number of the system in its text alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a model, and the names whose tensor is that of another name.

    Raises:
        ValueError: If a tensor has no numbers.
    """
    seen: dict[tuple[Any, ...], str] = {}
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, t in model.state_dict().items():
        if t.is_meta:
            raise ValueError(
                f"save({type(model).__name__}): {name} is on the meta device and has no numbers.\n"
                "Load its weights first."
            )
        key = (t.data_ptr(), tuple(t.shape), t.stride())
        if t.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        found[name] = t.detach().contiguous()
    return found, tied


def configuration(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model of transformers, or an empty one."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    found = config.to_dict()  # pyright: ignore[reportOptionalMemberAccess]
    found.pop("quantization_config", None)  # of the file that it came from
    return found | {"architectures": found.get("architectures") or [type(model).__name__]}


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """The mask of new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
