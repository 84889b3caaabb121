"""Files of quantised models that other programs load: compressed-tensors, GPTQ, dense.

A folder of Hugging Face: `config.json` with `quantization_config`, and `model.safetensors`. Every
file is written under another name first and then put in its place.

Shapes: m = outputs, n = inputs, g = groups of a row, w = words of a row.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._cores import QuantizedCores
from matrigami.compress._folder import WEIGHTS, new_folder, own_tensors, write_tensors
from matrigami.compress._grid import QuantizedMatrix
from matrigami.compress._packing import packed
from matrigami.compress._sizes import resized


def save_dense(model: nn.Module, folder: str | Path, source: str | Path | None = None) -> Path:
    """The model with its weights as numbers, whatever they were rounded to.

    Args:
        model: The model.
        folder: A new folder.
        source: The folder that it came from, whose tokenizer is copied.

    Raises:
        ValueError: If the folder exists, or no configuration of a model of transformers has the
            sizes of its layers.
    """
    return _saved(folder, own_tensors(model)[0], resized(model), source)


Values = Mapping[str, QuantizedMatrix | QuantizedCores]
"""What `quantize_` reports."""


def save_compressed_tensors(
    model: nn.Module,
    values: Values,
    folder: str | Path,
    source: str | Path | None = None,
) -> Path:
    """The model as `pack-quantized` of compressed-tensors, which vLLM and transformers load.

    Symmetric grids load to the bit; on grids with zeros transformers 5.24 fails. The format has
    whole groups alone: rows with a shorter last group are written in smaller ones, of the greatest
    common divisor, with the same numbers (576 inputs in groups of 128 become groups of 64).

    Args:
        model: The model.
        values: The quantised matrices of its `nn.Linear`s, by name: `report.values`.
        folder: A new folder.
        source: The folder that it came from, whose tokenizer is copied.

    Raises:
        ValueError: If the folder exists, or a layer is not an `nn.Linear`.
    """
    modules = dict(model.named_modules())
    tensors = own_tensors(model)[0]
    matrices = _of_linears("save_compressed_tensors", modules, values)
    matrices = {name: _in_whole_groups(value) for name, value in matrices.items()}
    for name, value in matrices.items():
        kind = tensors.pop(f"{name}.weight").dtype
        tensors |= _packed(name, value, kind)
    known = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    config = resized(model)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": _groups(matrices),
        "ignore": sorted(known - set(matrices)),
    }
    return _saved(folder, tensors, config, source)


def save_gptq(
    model: nn.Module,
    values: Values,
    folder: str | Path,
    source: str | Path | None = None,
) -> Path:
    """The model in the format of GPTQ (version 1): one grid for all layers, groups of full length.

    Args:
        model: The model.
        values: The quantised matrices of its `nn.Linear`s, by name: `report.values`.
        folder: A new folder.
        source: The folder that it came from, whose tokenizer is copied.

    Raises:
        ValueError: If the folder exists, or the layers do not have one grid that the format knows.
    """
    matrices = _of_linears("save_gptq", dict(model.named_modules()), values)
    grids = {(v.bits, v.group, v.zero is None) for v in matrices.values()}
    ragged = [
        name for name, v in matrices.items() if v.shape[-1] % v.group or v.shape[-1] * v.bits % 32
    ]
    if len(grids) != 1 or ragged or 3 in {bits for bits, *_ in grids}:
        raise ValueError(
            f"save_gptq: the format has one grid of 2, 4 or 8 bits and whole groups; {len(grids)} "
            f"grids are given, and ragged are: {', '.join(ragged) or 'none'}.\n"
            "Use save_compressed_tensors."
        )
    ((bits, group, symmetric),) = grids
    tensors = own_tensors(model)[0]
    for name, value in matrices.items():
        del tensors[f"{name}.weight"]
        tensors |= _gptq(name, value)
    config = resized(model)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "modules_in_block_to_quantize": None,
    }
    return _saved(folder, tensors, config, source)


def _of_linears(
    who: str, modules: Mapping[str, nn.Module], values: Values
) -> dict[str, QuantizedMatrix]:
    """The values, if all are of an `nn.Linear` of the model, which is all that the formats know."""
    found: dict[str, QuantizedMatrix] = {}
    for name, value in values.items():
        layer = modules.get(name)
        cores = isinstance(value, QuantizedCores)
        if not name or not isinstance(layer, nn.Linear) or cores:
            kind = "layer with codes of its factors" if cores else type(layer).__name__
            what = "fused again" if layer is None else f"a {kind}"
            what = what if name else f"{what}, and the model itself"
            raise ValueError(
                f"{who}: {name} is {what}; the format knows nn.Linear alone.\n"
                "Quantise with ignore=, or save_dense, on the command line --format dense."
            )
        found[name] = value
    return found


def _in_whole_groups(value: QuantizedMatrix) -> QuantizedMatrix:
    """The same numbers in groups that divide the rows; one group for a row stays one."""
    n = value.shape[-1]
    group = math.gcd(n, value.group)
    if group == value.group or value.scale.shape[-1] == 1:
        return value

    def smaller(steps: Tensor) -> Tensor:
        """Those of the groups, for each of the smaller ones."""
        return steps.repeat_interleave(value.group // group, -1)[..., : n // group]

    zero = None if value.zero is None else smaller(value.zero)
    return replace(value, scale=smaller(value.scale), zero=zero, group=group)


def _packed(name: str, value: QuantizedMatrix, kind: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer in pack-quantized."""
    found = {
        f"{name}.weight_packed": packed(value.codes, value.bits),
        f"{name}.weight_scale": value.scale.to(kind),
        f"{name}.weight_shape": torch.tensor(value.shape),
    }
    if value.zero is not None:
        zeros = value.zero.to(torch.int8)
        found[f"{name}.weight_zero_point"] = packed(zeros.mT, value.bits).mT
    return {key: t.contiguous() for key, t in found.items()}


def _gptq(name: str, value: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of one layer in GPTQ: packed along the inputs, zeros one less than they are."""
    n = value.shape[-1]
    zero = torch.zeros_like(value.scale) if value.zero is None else value.zero
    low = (zero - 1).to(torch.int8)  # of the unsigned codes; -1 wraps around
    wrapped = torch.where(low < -(2 ** (value.bits - 1)), low + 2**value.bits, low)
    found = {
        f"{name}.qweight": packed(value.codes, value.bits).mT,
        f"{name}.qzeros": packed(wrapped.mT, value.bits),
        f"{name}.scales": value.scale.mT.to(torch.float16),
        f"{name}.g_idx": (torch.arange(n) // value.group).to(torch.int32),
    }
    return {key: t.contiguous() for key, t in found.items()}


def _groups(values: Mapping[str, QuantizedMatrix]) -> dict[str, Any]:
    """Layers of one grid as a group of the configuration."""
    kinds: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, v in values.items():
        whole = v.scale.shape[-1] == 1
        kinds.setdefault((v.bits, None if whole else v.group, v.zero is None), []).append(name)
    return {
        f"group_{i}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
            },
        }
        for i, ((bits, group, symmetric), names) in enumerate(kinds.items())
    }


def _saved(
    folder: str | Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    source: str | Path | None,
) -> Path:
    """Write tensors and their configuration."""
    with new_folder(folder, source) as work:
        write_tensors(tensors, work / WEIGHTS)
        if config:
            (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    return Path(folder)
