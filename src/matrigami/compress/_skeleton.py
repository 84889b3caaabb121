"""The model that tensors of a file go into: all of them, or it stays as it was."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._grid import QuantizedMatrix
from matrigami.compress._layers import view_of, weight
from matrigami.compress._shrink import can_be_smaller, resize, smaller
from matrigami.compress._waterfill import LatticeMatrix
from matrigami.nn import (
    StructuredConv,
    StructuredLinear,
    dense_of,
    separate_,
    separated,
    stand_in,
    swap,
)
from matrigami.operators import Structure

KINDS = {
    str(t).removeprefix("torch."): t
    for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""Types of weights, by the names that the description has."""

Values = Mapping[str, QuantizedMatrix | LatticeMatrix | Tensor]
"""Tensors that were encoded, by name."""


@torch.no_grad()
def filled(
    model: nn.Module,
    exchanged: Mapping[nn.Module, nn.Module],
    tensors: Mapping[str, Tensor],
    values: Values,
    dtypes: Mapping[str, str],
    tied: Mapping[str, str],
    where: str,
) -> nn.Module:
    """Exchange layers, and overwrite all tensors.

    Raises:
        ValueError: If the model has other layers, names or shapes; it is as it was then.
    """
    resize(model, dict(exchanged))
    try:
        state = _state(model, tensors, values, dtypes, where)
        _check_names(model, state, tied, where)
    except BaseException:
        resize(model, {new: old for old, new in exchanged.items()})
        raise
    for name, t in state.items():
        _put(model, name, t)
    for name, first in tied.items():
        _tie(model, name, first)
    return model


def from_config(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """A model of transformers as its configuration tells it.

    Raises:
        ValueError: If there is none, or transformers is not installed.
    """
    if not (folder / "config.json").exists():
        made = f"It was made by {manifest['factory']}: " if manifest.get("factory") else ""
        raise ValueError(
            f"load({folder}): the folder does not tell which model its weights belong to.\n"
            f"{made}make the model and load into it: load(folder, into=model), "
            "on the command line --into."
        )
    try:
        import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"load({folder}): it is a model of transformers, which is not installed.\n"
            "Install it (pip install transformers), or give into=."
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = getattr(transformers, (config.architectures or ["none"])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"load({folder}): transformers has no model {config.architectures}.\nGive into=."
        )
    return kind(config).eval()


@contextmanager
def apart(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The fused modules of these names separated; as they were if something fails."""
    wanted = set(names) - set(separated(model))
    old = {n: module for n, module in model.named_modules() if n in wanted}
    try:
        if wanted:
            separate_(model, sorted(wanted))
        yield
    except BaseException:
        swap(model, {model.get_submodule(name): module for name, module in old.items()})
        raise


def exchanges(
    model: nn.Module,
    structures: Mapping[str, Structure],
    sizes: Mapping[str, list[int]],
    where: str,
) -> dict[nn.Module, nn.Module]:
    """The structured and the smaller layers in the place of those of the model.

    Raises:
        ValueError: If the model has no such layers.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, nn.Module] = {}
    for name, structure in structures.items():
        old = named.get(name)
        if old is None:
            raise ValueError(_other(where, f"it has no layer {name}"))
        linear = old.taps if isinstance(old, StructuredConv) else old
        same = isinstance(linear, StructuredLinear) and linear.structure == structure
        if not same and old not in found:
            found[old] = stand_in(dense_of(old), structure)
    for name, (m, n) in sizes.items():
        old = named.get(name)
        W = weight(old) if old is not None and can_be_smaller(old) else torch.empty(0, 0)
        if old is None or m > W.shape[0] or n > W.shape[1]:
            raise ValueError(_other(where, f"it has no layer {name} that could be {m}x{n}"))
        bias: Any = old.bias
        found[old] = smaller(old, W[:m, :n], None if bias is None else bias[:m])
    return found


def _state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    values: Values,
    dtypes: Mapping[str, str],
    where: str,
) -> dict[str, Tensor]:
    """All tensors as the model holds them; matrices in the orientation of their layer."""
    state = dict(tensors)
    for name, value in values.items():
        if isinstance(value, Tensor):
            state[name] = value
            continue
        place, _, tensor = name.rpartition(".")
        layer = dict(model.named_modules()).get(place)
        view = None if layer is None else view_of(layer, tensor)
        if view is None or (view.blocks * view.rows, view.columns) != value.shape:
            raise ValueError(_other(where, f"it has no matrix {name} of {value.shape}"))
        W = view.merge(value.dense().reshape(view.stack))
        state[name] = W.to(KINDS[dtypes[name]]).contiguous()
    return state


def _check_names(
    model: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, str], where: str
) -> None:
    """Whether names and shapes are those of the model."""
    own = model.state_dict()
    missing, more = set(own) - set(state) - set(tied), (set(state) | set(tied)) - set(own)
    if missing or more:
        raise ValueError(_other(where, f"names differ: {', '.join(sorted(missing | more)[:5])}"))
    for name, t in state.items():
        if t.shape != own[name].shape:
            sizes = f"{tuple(t.shape)}, and here {tuple(own[name].shape)}"
            raise ValueError(_other(where, f"{name} is {sizes}"))
    if any(t.is_meta for t in own.values()):
        raise ValueError(_other(where, "it is on the meta device, where nothing can be stored"))
    _check_tied(model, state, tied, where)


def _check_tied(
    model: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, str], where: str
) -> None:
    """Whether tensors that are one in the file are alike in the model, and others are not one."""
    own = model.state_dict()
    strange = [name for name, first in tied.items() if first not in state]
    if strange or any(own[a].shape != own[b].shape for a, b in tied.items() if b in own):
        raise ValueError(_other(where, f"{', '.join(strange) or 'a tied tensor'} does not fit"))
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in state and first.setdefault(id(p), name) != name:
            raise ValueError(_other(where, f"{first[id(p)]} and {name} are one tensor here"))


def _put(model: nn.Module, name: str, t: Tensor) -> None:
    """Numbers, and their type, into a parameter or buffer, which stays the same object."""
    old = _owner(model, name)[0][_owner(model, name)[1]]
    old.data = t.to(old.device, copy=True)  # aligned, so that products round as before


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Make a parameter that of another name."""
    (table, key), (other, known) = _owner(model, name), _owner(model, first)
    table[key] = other[known]


def _owner(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The table of a module that holds a tensor, and its key."""
    prefix, _, key = name.rpartition(".")
    module = model.get_submodule(prefix)
    return (module._parameters if key in module._parameters else module._buffers), key


def _other(where: str, what: str) -> str:
    """What is said of a model that is not that of the file."""
    return (
        f"load({where}): the model is not the one that was saved: {what}.\n"
        "Give into=, on the command line --into, a model of the same sizes; it was not changed."
    )
