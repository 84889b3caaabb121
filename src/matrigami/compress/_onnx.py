"""ONNX files: a compressed model for runtimes without Python.

Structured layers stay structured, as the products of their factors. Quantised and sparse weights
are plain numbers: ONNX has types for both, but no exporter that makes them.
"""

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._folder import new_folder
from matrigami.compress._running import answer, at_rest, forwarded

FILE = "model.onnx"
"""The name of the file; large weights lie beside it."""


class Answers(nn.Module):
    """A model as a function of tensors to one tensor.

    Args:
        model: The model.
        names: Those of its arguments, or none where it takes them by their places.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        """Its output, or logits."""
        batch = dict(zip(self.names, given, strict=True)) if self.names else given
        return answer(forwarded(self.model, batch))


def save_onnx(
    model: nn.Module, example: Any, folder: str | Path, source: str | Path | None = None
) -> Path:
    """Write `model.onnx`, for any number of examples, and of tokens in each of them.

    Args:
        model: Any model that `torch.export` follows; structured layers stay as they are.
        example: One batch: a tensor, a tuple of arguments, or a mapping of keywords.
        folder: A new folder.
        source: The folder that the model came from, whose tokenizer is copied.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder exists, the extra is not installed, or the model is not followed.
    """
    try:
        import onnxscript  # noqa: F401, PLC0415  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"save_onnx: {error.name} is not installed.\nInstall it: pip install onnx onnxscript."
        ) from error
    names = tuple(example) if isinstance(example, Mapping) else ()
    given = _tensors(example)
    still = Answers(copy.deepcopy(model).requires_grad_(False), names).eval()
    any_size = torch.export.Dim.DYNAMIC
    axes = tuple(
        {0: any_size} if t.is_floating_point() else dict.fromkeys(range(t.ndim), any_size)
        for t in given
    )
    told = logging.getLogger("torch")
    level = told.level
    with new_folder(folder, source) as work, at_rest(still.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself, as is what it logs
        told.setLevel(logging.CRITICAL)
        try:
            program = torch.onnx.export(
                still,
                given,
                dynamo=True,
                input_names=names or [f"input_{i}" for i in range(len(given))],
                output_names=["output"],
                dynamic_shapes=(axes,),
                verbose=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            first = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(
                f"save_onnx: torch.export does not follow the {type(model).__name__}: {first}\n"
                "Write another format, or export a part of the model."
            ) from error
        finally:
            told.setLevel(level)
        program.save(str(work / FILE))  # pyright: ignore[reportOptionalMemberAccess]
    return Path(folder)


def _tensors(example: Any) -> tuple[Tensor, ...]:
    """The arguments of a batch, of at least two examples: one would be taken for a constant."""
    if isinstance(example, Mapping):
        found = tuple(example.values())
    else:
        found = tuple(example) if isinstance(example, tuple | list) else (example,)
    return tuple(torch.cat([t, t]) if len(t) == 1 else t for t in found)
