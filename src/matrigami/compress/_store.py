"""Models in files of our own: `matrigami.safetensors`, `matrigami.json`, and nothing to unpickle.

`matrigami.json` tells which layers are structured (and their recipes), which tensors are encoded
(quantised, sparse), which names share a tensor, and the hash of the weights. The model that the
tensors go into is made by the reader: the file holds no code and names none that is run.

Shapes: m = outputs, n = inputs.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from matrigami.compress._codes import (
    Description,
    below,
    decoded_value,
    encoded,
    recipe_as_json,
    recipe_from_json,
    sparsely,
)
from matrigami.compress._cores import QuantizedCores
from matrigami.compress._entropy import coded
from matrigami.compress._folder import (
    OURS,
    configuration,
    new_folder,
    own_tensors,
    sha256,
    write_tensors,
)
from matrigami.compress._grid import QuantizedMatrix
from matrigami.compress._layers import key_of, matrix_of, view_of
from matrigami.compress._shrink import Shrunk
from matrigami.compress._skeleton import apart, exchanges, filled, from_config
from matrigami.compress._transformers import config_of
from matrigami.compress._waterfill import LatticeMatrix
from matrigami.nn import StructuredConv, StructuredLinear, separated

MANIFEST = "matrigami.json"
"""The file that describes the tensors."""

VERSION = 1
"""Of the description."""


def save(
    model: nn.Module,
    folder: str | Path,
    values: Mapping[str, Any] | None = None,
    *,
    source: str | Path | None = None,
    factory: str = "",
) -> Path:
    """Write a model with its structured, quantised and pruned layers as they are.

    Structured layers are stored by their factors, quantised ones by codes and scales, tensors with
    enough zeros without them. `load` gives the same numbers to the bit.

    Args:
        model: The model; of transformers its configuration is written, too.
        folder: A new folder, which appears when all is written.
        values: The quantised matrices and new sizes by the name of their layer, `report.values` of
            `quantize_` or `shrink_`, or values of `round_waterfill`, which are entropy-coded (extra
            `entropy`); what else is among them is read from the model.
        source: The folder that the model came from, whose tokenizer is copied.
        factory: What made the model, `package.module:function`: told to who loads it, never called.

    Raises:
        ValueError: If the folder exists, or a layer no longer has the numbers of its codes.

    Examples:
        >>> import tempfile
        >>> from matrigami import LowRank
        >>> from matrigami.nn import replace_
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = replace_(model, LowRank(rank=2))
        >>> folder = save(model, tempfile.mkdtemp() + "/small")
        >>> load(folder, into=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))[0]
        StructuredLinear(8, 8, LowRank(rank=2), bias=True)
    """
    tensors, told, tied = _packed(model, values or {})
    manifest = {
        "format": "matrigami",
        "version": VERSION,
        "separated": separated(model),
        "structures": _structures(model),
        "sizes": {n: list(v) for n, v in (values or {}).items() if isinstance(v, Shrunk)},
        "tensors": told,
        "tied": tied,
        "factory": factory,
    }
    with new_folder(folder, source) as work:
        write_tensors(tensors, work / OURS)
        manifest["sha256"] = sha256(work / OURS)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if config := configuration(model):
            config["quantization_config"] = config_of(manifest)
            (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    return Path(folder)


def load(folder: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Read a model that `save` has written.

    Args:
        folder: The folder.
        into: A model of the same kind, dense or already structured, which is changed in place: its
            layers are exchanged where the file has structured ones, and its tensors overwritten.
            None for a folder of transformers, whose model is made from its configuration.

    Returns:
        The model. If something does not fit, `into` is as it was.

    Raises:
        ValueError: If the files are damaged or of another format, or the model is another one.
    """
    manifest, tensors = read(folder)
    model = from_config(Path(folder), manifest) if into is None else into
    structures = {name: recipe_from_json(told) for name, told in manifest["structures"].items()}
    values = _values(manifest, tensors)
    kinds = {name: told.get("dtype", "") for name, told in manifest["tensors"].items()}
    with apart(model, manifest.get("separated", [])):
        exchanged = exchanges(model, structures, manifest.get("sizes", {}), str(folder))
        return filled(model, exchanged, tensors, values, kinds, manifest["tied"], str(folder))


def quantized_values(folder: str | Path) -> dict[str, QuantizedMatrix]:
    """The quantised matrices of a folder, by the names of their layers: for other formats.

    Tensors of structured layers are not among them: other formats do not know such.
    """
    found = _values(*read(folder))
    split = ((key.rpartition("."), v) for key, v in found.items() if isinstance(v, QuantizedMatrix))
    return {name: value for (name, _, tensor), value in split if tensor == "weight"}


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a folder, checked against the hash.

    Raises:
        ValueError: If they are not there, damaged, or of another format.
    """
    folder = Path(folder)
    try:
        manifest = _checked(json.loads((folder / MANIFEST).read_text()), folder)
        with safe_open(folder / OURS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"load({folder}): no model of matrigami is there, or it is damaged: {reason}.\n"
            "Save it again with matrigami.save; models of other programs are not read by it."
        ) from error
    return manifest, tensors


def _checked(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The description, if its parts are what they should be, and the weights those of it."""
    if manifest["format"] != "matrigami" or manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']} is not {VERSION}")
    if sha256(folder / OURS) != manifest["sha256"]:
        raise ValueError(f"{OURS} is not the file that was written: its hash differs")
    for key in ("structures", "tensors", "tied"):
        if not isinstance(manifest[key], dict):
            raise TypeError(f"{key} is a {type(manifest[key]).__name__}")
    return manifest


def _values(
    manifest: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, QuantizedMatrix | LatticeMatrix | Tensor]:
    """What is encoded, decoded; its parts are taken out of the tensors."""
    found: dict[str, QuantizedMatrix | LatticeMatrix | Tensor] = {}
    for name, told in manifest["tensors"].items():
        parts = below(tensors, name)
        for key in parts:
            del tensors[f"{name}.{key}"]
        found[name] = decoded_value(name, told, parts)
    return found


def _packed(
    model: nn.Module, values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Description], dict[str, str]]:
    """The tensors of a file, what is encoded among them, and which names share one."""
    tensors, tied = own_tensors(model)
    told: dict[str, Description] = {}
    for name, tensor, value in _matrices(values):
        _check_codes(model, name, tensor, value, tied)
        key = key_of(name, tensor)
        kind = {"dtype": str(tensors.pop(key).dtype).removeprefix("torch.")}
        codes, parts = coded(value) if isinstance(value, LatticeMatrix) else encoded(value)
        _add(tensors, told, key, (codes | kind, parts))
    for name in [name for name in tensors if name.rpartition(".")[0] not in told]:
        matrix = (
            name.rpartition(".")[2] == "weight" and tensors[name].ndim > 1
        )  # zeros of a bias are chance
        if matrix and (sparse := sparsely(tensors[name])) is not None:
            del tensors[name]
            _add(tensors, told, name, sparse)
    return tensors, told, tied


def _matrices(
    values: Mapping[str, Any],
) -> Iterator[tuple[str, str, QuantizedMatrix | LatticeMatrix]]:
    """What has codes: the layer, its tensor, and the matrix."""
    for name, value in values.items():
        if isinstance(value, QuantizedMatrix | LatticeMatrix):
            yield name, "weight", value
        elif isinstance(value, QuantizedCores):
            yield from ((name, tensor, core) for tensor, core in value.items())


def _add(
    tensors: dict[str, Tensor],
    told: dict[str, Description],
    name: str,
    made: tuple[Description, dict[str, Tensor]],
) -> None:
    """The parts of an encoded tensor below its name."""
    told[name], parts = made
    tensors |= {f"{name}.{key}": t for key, t in parts.items()}


def _check_codes(
    model: nn.Module,
    name: str,
    tensor: str,
    value: QuantizedMatrix | LatticeMatrix,
    tied: Mapping[str, str],
) -> None:
    """Whether a layer has a tensor of its own, with the numbers that the codes stand for."""
    if (key := key_of(name, tensor)) in tied:
        raise ValueError(
            f"save: {name} shares its {tensor} with {tied[key]}, which comes first.\n"
            "Its codes cannot be stored; leave it out of values=."
        )
    layer = model.get_submodule(name)
    W = None if view_of(layer, tensor) is None else matrix_of(layer, tensor)
    if W is None or not torch.equal(W, value.dense().to(W.dtype)):
        raise ValueError(
            f"save: {name} has changed since it was quantised.\n"
            "Quantise it again, or leave it out of values=."
        )


def _structures(model: nn.Module) -> dict[str, Description]:
    """The recipes of all structured layers."""
    taps = {m.taps for m in model.modules() if isinstance(m, StructuredConv)}
    found: dict[str, Description] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredConv | StructuredLinear) and module not in taps:
            linear = module.taps if isinstance(module, StructuredConv) else module
            _refuse_caps(name, linear)
            found[name] = recipe_as_json(linear.structure)
    return found


def _refuse_caps(name: str, layer: StructuredLinear) -> None:
    """Gains are no part of a layer that stands in."""
    if layer.rms_cap:
        raise ValueError(
            f"save: {name} has rms_cap, which is for training.\nReplace it by a layer without: "
            "StructuredLinear.in_place_of(layer.to_linear(), structure, layer.matrix())."
        )
