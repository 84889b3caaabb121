"""A compression that goes on where it was killed: every finished block is a file in a folder.

A file appears when it is whole. The folder belongs to one model, calibration and choice of methods,
which its key tells apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from matrigami.compress._codes import below, decoded, encoded, recipe_as_json, recipe_from_json
from matrigami.compress._cores import QuantizedCores
from matrigami.compress._folder import write_tensors
from matrigami.compress._grid import QuantizedMatrix
from matrigami.compress._layers import set_matrices, set_weight, weight
from matrigami.compress._report import LayerReport
from matrigami.nn import StructuredConv, stand_in, swap


class Journal:
    """The finished blocks of one compression.

    Args:
        folder: Where they are; it is made with the first.
        key: What the compression is; a folder of another one is refused.

    Raises:
        ValueError: If the folder is that of another compression.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        for path in self._files():
            with _opened(path) as file:
                if (file.metadata() or {}).get("key") != key:
                    raise ValueError(
                        f"journal={folder}: it is that of another model, calibration or method.\n"
                        "Give a new folder, or delete this one to start again."
                    )

    def finished(self) -> dict[str, Path]:
        """The layers of finished blocks, and where they are."""
        found = {}
        for path in self._files():
            with _opened(path) as file:
                told = json.loads(file.metadata()["layers"])
            found |= {entry["report"]["name"]: path for entry in told}
        return found

    @torch.no_grad()
    def restore_(self, model: nn.Module, path: Path) -> list[tuple[LayerReport, Any]]:
        """Put a finished block into the model; reports and values of its layers."""
        found: list[tuple[LayerReport, Any]] = []
        with _opened(path) as file:
            for i, entry in enumerate(json.loads(file.metadata()["layers"])):
                keys = [k for k in file.keys() if k.startswith(f"{i}.")]  # noqa: SIM118
                parts = {k.partition(".")[2]: file.get_tensor(k) for k in keys}
                report = LayerReport(**entry["report"])
                found.append((report, _put_back(model, report.name, entry, parts)))
        return found

    def write(self, model: nn.Module, layers: Iterable[tuple[LayerReport, Any]]) -> None:
        """A finished block, which the model has already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told, tensors = [], {}
        for i, (report, value) in enumerate(layers):
            entry, parts = _taken(model.get_submodule(report.name), value)
            told.append(entry | {"report": asdict(report)})
            tensors |= {f"{i}.{key}": t.contiguous() for key, t in parts.items()}
        path = self.folder / f"{len(self._files()):05}.safetensors"
        work = path.with_suffix(".part")
        write_tensors(tensors, work, {"key": self.key, "layers": json.dumps(told)})
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(path)

    def _files(self) -> list[Path]:
        """Whole blocks, in their order."""
        return sorted(self.folder.glob("?????.safetensors"))


def fingerprint(model: nn.Module, data: Iterable[Any], *told: object) -> str:
    """What tells one compression from another: weights, batches, and words."""
    digest = hashlib.sha256(repr(told).encode())
    for name, t in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_raw(t))
    for batch in data:
        parts = batch.values() if isinstance(batch, Mapping) else batch
        digest.update(repr(list(batch) if isinstance(batch, Mapping) else type(batch)).encode())
        for part in [parts] if isinstance(parts, Tensor) else parts:
            digest.update(_raw(part) if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()


def _raw(t: Tensor) -> bytes:
    """The type, the sizes and the bytes of a tensor."""
    kind = repr((t.dtype, tuple(t.shape))).encode()
    return kind + t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _opened(path: Path) -> Any:
    """A file of the journal."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"journal: {path} is damaged ({error}).\nDelete it to redo it.") from error


def _taken(layer: nn.Module, value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A compressed layer as a description and tensors."""
    if isinstance(value, QuantizedMatrix):
        return encoded(value)
    if isinstance(value, QuantizedCores):
        return _cores_taken(value)
    if isinstance(value, Tensor):  # a mask
        return {"kind": "pruned"}, {"mask": value, "weight": weight(layer)}
    linear: Any = layer.taps if isinstance(layer, StructuredConv) else layer
    factors = {name: getattr(linear, name).detach() for name in linear.factor_names}
    return {"kind": "structured", "recipe": recipe_as_json(linear.structure)}, factors


def _cores_taken(value: QuantizedCores) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The codes of a structured layer."""
    every = {name: encoded(core) for name, core in value.items()}
    parts = {f"{name}.{k}": t for name, (_, found) in every.items() for k, t in found.items()}
    return {"kind": "cores", "cores": {name: told for name, (told, _) in every.items()}}, parts


def _put_back(
    model: nn.Module, name: str, told: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> Any:
    """The inverse of `_taken`: the layer as it was left; its value."""
    layer = model.get_submodule(name)
    if told["kind"] == "quantized":
        value = decoded(told, parts)
        set_weight(layer, value.dense())
        return value
    if told["kind"] == "cores":
        value = QuantizedCores({n: decoded(t, below(parts, n)) for n, t in told["cores"].items()})
        set_matrices(layer, value)
        return value
    if told["kind"] == "pruned":
        set_weight(layer, parts["weight"])
        return parts["mask"]
    new = stand_in(layer, recipe_from_json(told["recipe"]))
    linear: Any = new.taps if isinstance(new, StructuredConv) else new
    for key, t in parts.items():
        getattr(linear, key).copy_(t)
    swap(model, {layer: new})
    return linear.matrix()
