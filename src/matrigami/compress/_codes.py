"""Matrices as named tensors and a description in JSON, and back; what comes back is checked.

    quantised    codes as a bit stream, scales, zeros; bits and group in the description; of many
                 zeros a bit for each entry, and the codes of the rest
    sparse       a bit for each entry that says whether it is stored, and the stored entries
    lattice      integers of any size, entropy-coded (see `_entropy`)

Recipes of structures are a name and the literals of their fields.

Shapes: m = outputs, n = inputs, w = words of a row, g = groups of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from matrigami.compress._entropy import restored
from matrigami.compress._grid import QuantizedMatrix, spread
from matrigami.compress._packing import packed, unpacked
from matrigami.compress._waterfill import LatticeMatrix
from matrigami.operators import Structure
from matrigami.structures import EXAMPLES

Description = dict[str, Any]
"""What JSON holds of a tensor."""


def encoded(value: QuantizedMatrix) -> tuple[Description, dict[str, Tensor]]:
    """A quantised matrix as tensors.

    Examples:
        >>> codes = torch.tensor([[1, -2]], dtype=torch.int8)
        >>> told, tensors = encoded(QuantizedMatrix(codes, torch.tensor([[0.5]]), None, 2, 2))
        >>> told["kind"], {name: t.shape for name, t in tensors.items()}
        ('quantized', {'codes': torch.Size([1, 1]), 'scale': torch.Size([1, 1])})
    """
    m, n = value.codes.shape
    told = {"kind": "quantized", "bits": value.bits, "group": value.group, "matrix": [m, n]}
    tensors, codes = {}, value.codes
    if value.stored_bits < value.bits * codes.numel():
        stored = value.support
        tensors["mask"], codes = _bytes(stored.flatten()), codes[stored][None]
    tensors |= {"codes": packed(codes, value.bits), "scale": value.scale.contiguous()}
    if value.zero is not None:
        tensors["zero"] = value.zero.contiguous()
    return told, tensors


def decoded(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    """The inverse of `encoded`.

    Raises:
        ValueError: If the tensors are not those of the description.
    """
    bits, group, (m, n) = told["bits"], told["group"], told["matrix"]
    if bits not in range(2, 9) or not 1 <= group <= max(n, 1):
        raise ValueError(f"{bits} bits in groups of {group} are no grid of a {m}x{n} matrix.")
    levels = (m, -(-n // group))
    zero = tensors.get("zero")
    for name, t in (("scale", tensors["scale"]), ("zero", zero)):
        if t is not None and (tuple(t.shape) != levels or not t.is_floating_point()):
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}, where {levels} belong.")
    words, mask = tensors["codes"], tensors.get("mask")
    if words.dtype != torch.int32 or words.shape[0] != (m if mask is None else 1):
        raise ValueError(f"codes are {words.dtype} {tuple(words.shape)}.")
    if mask is None:
        codes = unpacked(words, bits, n)
    else:
        stored = _marked(mask, m * n).view(m, n)
        codes = torch.zeros(m, n) if zero is None else spread(zero, group, n)
        codes = codes.to(torch.int8).clone()
        codes[stored] = unpacked(words, bits, int(stored.sum()))[0]
    return QuantizedMatrix(codes, tensors["scale"], zero, bits, group)


def below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors right below a name, without it."""
    split = {key: key.rpartition(".") for key in tensors}
    return {last: tensors[key] for key, (first, _, last) in split.items() if first == name}


def sparsely(t: Tensor) -> tuple[Description, dict[str, Tensor]] | None:
    """A tensor without its zeros, if that is smaller; -0 becomes 0.

    Examples:
        >>> told, tensors = sparsely(torch.eye(8))
        >>> told, tensors["mask"].tolist(), tensors["values"].tolist()[:2]
        ({'kind': 'sparse', 'shape': [8, 8]}, [1, 2, 4, 8, 16, 32, 64, 128], [1.0, 1.0])
    """
    if not t.is_floating_point():
        return None
    stored = t != 0
    size = -(-t.numel() // 8) + int(stored.sum()) * t.element_size()
    if size >= t.nbytes:
        return None
    told = {"kind": "sparse", "shape": list(t.shape)}
    return told, {"mask": _bytes(stored.flatten()), "values": t[stored]}


def densely(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `sparsely`.

    Raises:
        ValueError: If the tensors are not those of the description.
    """
    shape, mask, values = told["shape"], tensors["mask"], tensors["values"]
    size = math.prod(shape)
    stored = _marked(mask, size)
    if int(stored.sum()) != len(values):
        raise ValueError(f"{int(stored.sum())} entries are marked, and {len(values)} stored.")
    t = torch.zeros(size, dtype=values.dtype)
    t[stored] = values
    return t.reshape(shape)


def decoded_value(
    name: str, told: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> QuantizedMatrix | LatticeMatrix | Tensor:
    """An encoded tensor.

    Raises:
        ValueError: If its parts are not those of its description.
    """
    try:
        decode = {"quantized": decoded, "sparse": densely, "lattice": restored}[told["kind"]]
        return decode(told, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: the tensors of {name} do not fit their description: {error}.\n"
            "The folder is damaged; save the model again."
        ) from error


def recipe_as_json(recipe: Structure) -> Description:
    """The name of a structure, and its fields.

    Examples:
        >>> from matrigami import LowRank
        >>> recipe_as_json(LowRank(rank=0.25))
        {'name': 'lowrank', 'fields': {'rank': 0.25}}
    """
    kind = type(recipe)
    own = f"{kind.__module__}:{kind.__qualname__}"
    name = next((key for key, example in EXAMPLES.items() if type(example) is kind), own)
    return {"name": name, "fields": {f.name: getattr(recipe, f.name) for f in fields(recipe)}}  # pyright: ignore[reportArgumentType]


def recipe_from_json(told: Mapping[str, Any]) -> Structure:
    """The inverse. A structure of the user's must be imported already: nothing is, for a file.

    Raises:
        ValueError: If it is unknown, or the fields do not fit.

    Examples:
        >>> recipe_from_json({"name": "monarch", "fields": {"blocks": 4}})
        Monarch(blocks=4, rank=None, interleaved=True, pad=False)
    """
    known = {name: type(example) for name, example in EXAMPLES.items()}
    known |= {f"{kind.__module__}:{kind.__qualname__}": kind for kind in _all_kinds(Structure)}
    if told["name"] not in known:
        raise ValueError(
            f"the structure {told['name']!r} is not known.\n"
            "If it is one of your own, import the module that defines it first."
        )
    try:
        return known[told["name"]](**{key: _tuples(v) for key, v in told["fields"].items()})
    except TypeError as error:
        raise ValueError(
            f"the structure {told['name']} does not have these fields: {error}."
        ) from error


def _all_kinds(kind: type[Structure]) -> list[type[Structure]]:
    """All structures that are imported."""
    below = kind.__subclasses__()
    return below + [k for child in below for k in _all_kinds(child)]


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _marked(mask: UInt8[Tensor, " w"], size: int) -> Bool[Tensor, " n"]:
    """Which of so many entries are stored."""
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (-(-size // 8),):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, for {size} entries.")
    return _bits(mask)[:size]


def _bytes(flags: Bool[Tensor, " n"]) -> UInt8[Tensor, " w"]:
    """Eight flags in a byte, the first lowest."""
    padded = torch.nn.functional.pad(flags.to(torch.int16), (0, -len(flags) % 8))
    powers = 2 ** torch.arange(8, dtype=torch.int16, device=flags.device)
    return (padded.unflatten(0, (-1, 8)) * powers).sum(-1).to(torch.uint8)


def _bits(words: UInt8[Tensor, " w"]) -> Bool[Tensor, " n"]:
    """The inverse."""
    powers = 2 ** torch.arange(8, dtype=torch.int16)
    return ((words.to(torch.int16)[:, None] & powers) != 0).flatten()
