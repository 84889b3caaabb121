"""Checkpoints of a run in one safetensors file: tensors, and JSON in its header; no pickle."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies._optimizers import parameter_names
from matrigami.studies._record import write_atomic

_GENERATOR = "generator"

OF_THE_DEVICE = frozenset({"capturable"})
"""Options of an optimiser that follow from where it runs."""


def save_checkpoint(
    path: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    position: Mapping[str, Any],
    generator_state: Tensor,
) -> None:
    """Write a checkpoint aside and rename it.

    Args:
        path: The file.
        config: The run it belongs to.
        model: Its model.
        optimizer: Its optimiser; None to keep the weights only.
        position: What else it needs, as JSON knows it.
        generator_state: State of its generator at the start of the epoch.
    """
    tensors = {
        f"model.{name}": t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in model.state_dict().items()  # cloned: tied weights are one tensor
    }
    header = {
        "id": config.id,
        "position": json.dumps(dict(position)),
        "trained": str(optimizer is None).lower(),
    }
    if optimizer is not None:
        moments, groups = _optimizer_state(model, optimizer)
        tensors |= moments
        header["groups"] = json.dumps(groups)
    tensors[_GENERATOR] = generator_state
    header["sha256"] = _digest(tensors, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, header))


def load_checkpoint(
    path: Path, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Any], Tensor] | None:
    """Put a checkpoint into a model and an optimiser.

    Args:
        path: The file.
        config: The run it should belong to.
        model: A model of that run.
        optimizer: Its optimiser; None for the weights only.

    Returns:
        The position and the state of the generator; None if there is no checkpoint.

    Raises:
        ValueError: If the file is damaged, or belongs to another run.
    """
    if not path.exists():
        return None
    header, tensors = _read(path)
    if header["id"] != config.id:
        raise ValueError(
            f"Checkpoint {path} of run {config.id}: "
            f"it belongs to run {header['id']}.\n"
            "Give each run its own folder."
        )
    try:
        position = _position(header, config)
        model.load_state_dict(_below("model", tensors))
        if optimizer is not None and header["trained"] == "false":
            _restore(model, optimizer, _below("optimizer", tensors), json.loads(header["groups"]))
        return position, tensors[_GENERATOR]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"it does not fit the run: {error}") from error


def _position(header: Mapping[str, str], config: RunConfig) -> dict[str, Any]:
    """How far the run had come."""
    position = json.loads(header["position"])
    epoch = position.get("epoch", 0)
    if not 0 <= epoch <= config.epochs:
        raise ValueError(f"it is of epoch {epoch} of {config.epochs}")
    return position


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, whole: the hash of what was written is in the header.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    missing = {"id", "position", "trained", "sha256"} - set(header)
    if missing:
        raise _damaged(path, f"its header lacks {', '.join(sorted(missing))}")
    if header["sha256"] != _digest(tensors, header):
        raise _damaged(path, "its content is not what was written")
    return header, tensors


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of everything but itself."""
    known = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, what: str) -> ValueError:
    """What to raise."""
    return ValueError(
        f"Checkpoint {path}: it is damaged: {' '.join(what.split())[:300]}.\n"
        "Delete it to start the run anew."
    )


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Each tensor of the state by the name of its parameter; the numbers of each group."""
    state, names = optimizer.state_dict(), parameter_names(model, optimizer)
    tensors = {
        f"optimizer.{names[i]}.{key}": t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for i, entry in state["state"].items()  # cloned: they may be views of one stack
        for key, t in entry.items()
        if t is not None
    }
    groups = [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, bool | int | float) and key not in OF_THE_DEVICE
        }
        for group in state["param_groups"]
    ]
    return tensors, groups


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """The inverse of `_optimizer_state`."""
    state = optimizer.state_dict()
    index = {name: i for i, name in enumerate(parameter_names(model, optimizer))}
    for name, t in tensors.items():
        parameter, key = name.rsplit(".", 1)
        state["state"].setdefault(index[parameter], {})[key] = t
    state["param_groups"] = [
        group | numbers for group, numbers in zip(state["param_groups"], groups, strict=True)
    ]
    optimizer.load_state_dict(state)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part."""
    return {
        name.removeprefix(f"{prefix}."): t
        for name, t in tensors.items()
        if name.startswith(f"{prefix}.")
    }
