"""Models and data that a command line names.

package.module:function    returns the model
path/to/file.py:function   the same
FOLDER                     of matrigami, or of transformers
owner/name                 the same, of the Hugging Face hub or its cache on this machine
FILE.safetensors           the tensors of a model that --into names
"""

import importlib
import json
import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor, nn

EXAMPLES = tuple(
    click.option(name, type=click.IntRange(min=1), default=size, show_default=True, help=words)
    for name, size, words in (
        ("--length", 256, "Tokens of a sequence of text."),
        ("--sequences", 128, "Examples that are read."),
        ("--batch", 8, "Examples at once."),
    )
)
"""How examples are read."""


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that gives a command some options, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


BESIDE = ("*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja")
"""Files beside the weights that are fetched from the hub."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that would be unpickled, and are not."""


def function_of(source: str, function: str) -> Callable[[], Any]:
    """A function of a module or of a file.

    Raises:
        ValueError: If it is not found.
    """
    try:
        if source.endswith(".py"):
            return runpy.run_path(source)[function]
        sys.path.insert(0, str(Path.cwd()))
        return getattr(importlib.import_module(source), function)
    except Exception as error:
        raise ValueError(
            f"function {source}:{function}: it was not found: "
            f"{_told(error)}.\nGive package.module:function, or path/to/file.py:function."
        ) from error


def _told(error: BaseException) -> str:
    """Kind and first line of an error of code that is not ours."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def made_by(name: str, make: Callable[[], Any]) -> Any:
    """What a function of the user returns."""
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"model {name!r}: its function failed with {_told(error)}.\n"
            "It is called without arguments: try it in Python first."
        ) from error


def model_of(name: str, into: str | None = None) -> "nn.Module":
    """The model that is named, in evaluation mode.

    Args:
        name: What the command line has.
        into: The model that the tensors of a folder or file belong to, where it does not say so.

    Raises:
        ValueError: If there is no such model, or its file is pickled.
    """
    from torch import nn

    path = located(name)
    if path.suffix in PICKLES:
        raise ValueError(
            f"model {name}: it is a file of pickles, which can run code.\n"
            "Convert it to safetensors where you trust it."
        )
    if path.is_dir() or path.suffix == ".safetensors":
        return _from_files(path, None if into is None else model_of(into)).eval()
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(
            f"model {name!r}: there is no such folder or safetensors file.\n"
            "Give one, or package.module:function, or path/to/file.py:function."
        )
    made = made_by(name, function_of(source, function))
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"model {name!r}: it returned a {type(made).__name__}.\n"
            "It should return a torch.nn.Module."
        )
    return made.eval()


def located(name: str) -> Path:
    """The path that a name means; a model of the hub is fetched without code and pickles.

    Raises:
        ValueError: If the hub has no such model, or cannot be reached.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.parent.exists():
        return path
    transformers()
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.safetensors", *BESIDE]))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"model {name}: there is no such folder, and the hub does not give "
            f"it: {_told(error)}.\nGive a folder, or the owner/name of a model of the hub."
        ) from error


def _from_files(path: Path, into: "nn.Module | None") -> "nn.Module":
    """A model from a folder, or from a file of tensors."""
    import matrigami as mg

    if (path / "matrigami.json").exists():
        return mg.load(path, into=into)
    if into is not None:
        return _filled(into, path if path.is_file() else path / "model.safetensors")
    if not (path / "config.json").exists():
        raise ValueError(
            f"model {path}: it does not say which model its tensors belong to.\n"
            "Name it: --into package.module:function."
        )
    return _of_transformers(path)


def _of_transformers(path: Path) -> "nn.Module":
    """A model of the kind that its folder names, all of whose tensors are there.

    Raises:
        ValueError: If the folder is damaged, lacks tensors, or needs code of its own.
    """
    library = transformers()
    _refuse_large(path)
    _refuse_paths(path)
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = library.AutoConfig.from_pretrained(path, **options)
        kind = getattr(library, (config.architectures or ["none"])[0], library.AutoModelForCausalLM)
        model, info = kind.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, _damaged()) as error:
        raise ValueError(
            f"model {path}: its folder cannot be loaded: {_told(error)}.\n"
            "It needs config.json and safetensors files, no pickles and no code of its own."
        ) from error
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {path}: its files lack {len(lacking)} tensors of a "
            f"{type(model).__name__}: {', '.join(lacking[:3])}.\n"
            "They would be random numbers; save the model again, or name its kind in config.json."
        )
    return model


def _refuse_large(path: Path) -> None:
    """Raise if the tensors of a folder do not fit into the free memory."""
    from matrigami.operators import free_memory

    size, free = sum(f.stat().st_size for f in path.glob("*.safetensors")), free_memory()
    if size > free:
        raise ValueError(
            f"model {path}: its tensors take {size / 2**30:.1f} GiB, and about "
            f"{free / 2**30:.1f} GiB are free.\nTake a smaller model, or a larger machine."
        )


def _refuse_paths(path: Path) -> None:
    """Raise if an index names files outside of its folder."""
    for index in path.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"model {path}: its {index.name} is damaged: {_told(error)}.\n"
                "Fetch or save the model again."
            ) from error
        strange = sorted(name for name in names if Path(str(name)).name != name)
        if strange:
            raise ValueError(
                f"model {path}: its {index.name} names {strange[0]}, outside of "
                "the folder.\nFiles of a model lie in its folder; this one is not to be trusted."
            )


def _damaged() -> type[Exception]:
    """What safetensors raises."""
    from safetensors import SafetensorError

    return SafetensorError


def _filled(model: "nn.Module", path: Path) -> "nn.Module":
    """A model with the tensors of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"tensors of {path}: they do not fit the model, or are damaged: "
            f"{str(error).splitlines()[0]}\nName the model that they belong to by --into."
        ) from error
    return model


def transformers() -> Any:
    """The package, which is an extra."""
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ValueError(
            "A model or tokenizer of transformers: the package is not installed.\n"
            "Install it: pip install transformers."
        ) from error
    library.utils.logging.disable_progress_bar()
    return library


def new_place(out: Path) -> None:
    """See before any work whether a folder can be made there.

    Raises:
        ValueError: If it exists, or cannot be made.
    """
    if out.exists():
        raise ValueError(f"-o {out}: it exists.\nGive the name of a new folder.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out.parent).cleanup()
    except OSError as error:
        raise ValueError(
            f"-o {out}: nothing can be written there: {error.strerror}.\n"
            "Give a new folder where files of yours may be."
        ) from error


def batches_of(
    path: Path,
    model: str,
    length: int,
    sequences: int,
    batch: int,
    net: "nn.Module | None" = None,
) -> list[Any]:
    """Batches from a file of tensors, or from a text and the tokenizer beside the model.

    Args:
        path: Tensors `input_ids` of token numbers, or `inputs` of anything else, in safetensors; or
            a text.
        model: The folder of the model, for its tokenizer.
        length: Tokens of a sequence of a text.
        sequences: The first so many are taken.
        batch: So many at once.
        net: The model, to whose type examples that are no integers are brought.
    """
    if path.suffix == ".safetensors":
        name, t = _tensor(path)
    else:
        name, t = "input_ids", _tokens(path, model, length, sequences)
    if not (t.ndim and len(t)):
        raise ValueError(
            f"examples of {path}: there are none: {name} is {tuple(t.shape)}.\n"
            "Give some, along the first axis: a few hundred vectors are enough."
        )
    kind = None if net is None else next((p.dtype for p in net.parameters()), None)
    t = t.to(kind) if kind is not None and kind.is_floating_point and t.is_floating_point() else t
    parts = t[:sequences].split(batch)
    return [{"input_ids": part} for part in parts] if name == "input_ids" else list(parts)


def _tensor(path: Path) -> "tuple[str, Tensor]":
    """The examples of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: it is damaged: {error}.") from error
    for name in ("input_ids", "inputs"):
        if name in tensors:
            return name, tensors[name]
    raise ValueError(
        f"examples of {path}: it has {', '.join(tensors) or 'nothing'}.\n"
        "Give a tensor input_ids of token numbers, or inputs."
    )


def _text(path: Path, most: int) -> str:
    """So many characters of a text in UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(most)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {path}: it is no text in UTF-8: {error.reason}.\n"
            "Give plain text, or token numbers: a safetensors file with a tensor input_ids."
        ) from error


def _tokens(path: Path, model: str, length: int, sequences: int) -> "Tensor":
    """The sequences of a text, each after the token that begins a text, if there is one."""
    import torch

    if not (Path(model) / "tokenizer.json").exists():
        raise ValueError(
            f"text {path}: {model} has no tokenizer.json to read it.\n"
            "Give token numbers: a safetensors file with a tensor input_ids."
        )
    tokenizer = transformers().AutoTokenizer.from_pretrained(model, local_files_only=True)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    words = length - len(first)
    enough = 40 * length * sequences  # and no whole library
    ids = tokenizer(_text(path, enough), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [first + ids[i : i + words] for i in range(0, len(ids) - words + 1, words)]
    if not rows:
        raise ValueError(
            f"text {path}: it has {len(ids)} tokens, less than one sequence of "
            f"{length}.\nGive a longer one, or --length."
        )
    return torch.tensor(rows[:sequences])
