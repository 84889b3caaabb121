"""Models and data that a command line names.

package.module:function    returns the model
path/to/file.py:function   the same
FOLDER                     of matrigami, or of transformers
FILE.safetensors           the tensors of a model that --into names
"""

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    except (ImportError, AttributeError, KeyError, OSError) as error:
        raise ValueError(
            f"The function {source}:{function} was asked for.\nIt was not found: {error}.\n"
            "Give package.module:function, or path/to/file.py:function."
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

    path = Path(name)
    if path.suffix in PICKLES:
        raise ValueError(
            f"The model {name} was asked for.\nIt is a file of pickles, which can run code.\n"
            "Convert it to safetensors where you trust it."
        )
    if path.is_dir() or path.suffix == ".safetensors":
        return _from_files(path, None if into is None else model_of(into)).eval()
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(
            f"The model {name!r} was asked for.\nThere is no such folder or safetensors file.\n"
            "Give one, or package.module:function, or path/to/file.py:function."
        )
    made = function_of(source, function)()
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"The model {name!r} was asked for.\nIt returned a {type(made).__name__}.\n"
            "It should return a torch.nn.Module."
        )
    return made.eval()


def _from_files(path: Path, into: "nn.Module | None") -> "nn.Module":
    """A model from a folder, or from a file of tensors."""
    import matrigami as mg

    if (path / "matrigami.json").exists():
        return mg.load(path, into=into)
    if into is not None:
        return _filled(into, path if path.is_file() else path / "model.safetensors")
    if not (path / "config.json").exists():
        raise ValueError(
            f"The model {path} was asked for.\nIt does not say which model its tensors belong to.\n"
            "Name it: --into package.module:function."
        )
    return transformers().AutoModelForCausalLM.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )


def _filled(model: "nn.Module", path: Path) -> "nn.Module":
    """A model with the tensors of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The tensors of {path} were asked for.\nThey do not fit the model, or are damaged: "
            f"{str(error).splitlines()[0]}\nName the model that they belong to by --into."
        ) from error
    return model


def transformers() -> Any:
    """The package, which is an extra."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ValueError(
            "A model or tokenizer of transformers was asked for.\nThe package is not installed.\n"
            "Install it: pip install transformers."
        ) from error


def batches_of(path: Path, model: str, length: int, sequences: int, batch: int) -> list[Any]:
    """Batches from a file of tensors, or from a text and the tokenizer beside the model.

    Args:
        path: Tensors `input_ids` of token numbers, or `inputs` of anything else, in safetensors; or
            a text.
        model: The folder of the model, for its tokenizer.
        length: Tokens of a sequence of a text.
        sequences: The first so many are taken.
        batch: So many at once.
    """
    if path.suffix == ".safetensors":
        name, t = _tensor(path)
    else:
        name, t = "input_ids", _tokens(path, model, length, sequences)
    parts = t[:sequences].split(batch)
    return [{"input_ids": part} for part in parts] if name == "input_ids" else list(parts)


def _tensor(path: Path) -> "tuple[str, Tensor]":
    """The examples of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} was asked for.\nIt is damaged: {error}.") from error
    for name in ("input_ids", "inputs"):
        if name in tensors:
            return name, tensors[name]
    raise ValueError(
        f"The examples of {path} were asked for.\nIt has {', '.join(tensors) or 'nothing'}.\n"
        "Give a tensor input_ids of token numbers, or inputs."
    )


def _tokens(path: Path, model: str, length: int, sequences: int) -> "Tensor":
    """The sequences of a text, each after the token that begins a text, if there is one."""
    import torch

    if not (Path(model) / "tokenizer.json").exists():
        raise ValueError(
            f"The text {path} was asked for.\n{model} has no tokenizer.json to read it.\n"
            "Give token numbers: a safetensors file with a tensor input_ids."
        )
    tokenizer = transformers().AutoTokenizer.from_pretrained(model, local_files_only=True)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    words = length - len(first)
    text = path.read_text()[: 40 * length * sequences]  # more than enough, and no whole library
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [first + ids[i : i + words] for i in range(0, len(ids) - words + 1, words)]
    if not rows:
        raise ValueError(
            f"The text {path} was asked for.\nIt has {len(ids)} tokens, less than one sequence of "
            f"{length}.\nGive a longer one, or --length."
        )
    return torch.tensor(rows[:sequences])
