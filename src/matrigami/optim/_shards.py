"""Sharded parameters that are not matrices: each process updates what it has of them.

They need no messages, but for one: whether all shards of a gradient are finite.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from matrigami.optim._bucket import working_dtype
from matrigami.optim._collectives import Group, all_known, summed
from matrigami.optim._exchange import Groups, local
from matrigami.optim._method import State
from matrigami.optim._team import assembled, sharded_axes


def elementwise(groups: Groups, those: Mapping[Tensor, Any]) -> list[Tensor]:
    """Sharded parameters that are not matrices."""
    return [
        p
        for group in groups
        for p, view in zip(group["params"], group["views"], strict=True)
        if view is None and p in those and isinstance(p, DTensor) and sharded_axes(p)
    ]


def by_places(parameters: Iterable[Tensor]) -> dict[tuple[Group, ...], list[Tensor]]:
    """Sharded parameters by the groups over which they are cut."""
    found: dict[tuple[Group, ...], list[Tensor]] = defaultdict(list)
    for p in parameters:
        axes = sharded_axes(p) if isinstance(p, DTensor) else []
        if isinstance(p, DTensor) and axes:
            found[tuple(p.device_mesh.get_group(i) for i in axes)].append(p)
    return found


def agreed(gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Local shards; where one is not finite, all processes see NaN, and skip the parameter."""
    found = {p: local(G) for p, G in gradients.items()}
    for places, parameters in by_places(found).items():
        squares = [
            torch.linalg.vector_norm(found[p].to(working_dtype(p))).square().double()
            for p in parameters
        ]
        finite = summed(torch.stack(squares), places).isfinite()
        if finite.is_cpu and bool(finite.all()):
            continue
        for p, ok in zip(parameters, finite, strict=True):
            found[p] = found[p].where(ok, torch.nan)
    return {p: G for p, G in found.items() if G.numel() or not p.numel()}


def spread_shards(
    places: tuple[Group, ...], parameters: Sequence[Tensor], state: Mapping[Tensor, State]
) -> dict[Tensor, State]:
    """The state of shards, as tensors placed like the parameter.

    A process whose shard is empty has no state: it learns from the others which there is.
    """
    told = [(i, described(state[p])) for i, p in enumerate(parameters) if state[p]]
    entries: dict[int, dict[str, Any]] = {}
    for i, entry in all_known(told, places):
        known = entries.setdefault(i, entry)
        known |= {name: torch.maximum(known[name], S) for name, S in small(entry).items()}
    found: dict[Tensor, State] = {}
    for i, entry in sorted(entries.items()):
        p = cast("DTensor", parameters[i])
        found[p] = {name: S.to(p.device) for name, S in small(entry).items()}
        for name, (_, dtype) in sizes(entry).items():
            part = state[p].get(name, torch.zeros_like(local(p), dtype=dtype))
            found[p][name] = assembled(part, p.device_mesh, p.placements, tuple(p.shape))
    return found


def taken_shards(p: Tensor, entry: State) -> State:
    """This process's part of the state of a parameter that is not a matrix."""
    sharded = cast("DTensor", p)
    if not local(p).numel() and p.numel():
        return {}
    mesh, copied = sharded.device_mesh, [Replicate()] * sharded.device_mesh.ndim
    found: State = {}
    for name, S in entry.items():
        whole = S
        if S.ndim and not isinstance(S, DTensor):
            whole = assembled(S, mesh, copied, tuple(S.shape))
        if isinstance(whole, DTensor):
            whole = whole.redistribute(mesh, sharded.placements).to_local().clone()
        found[name] = whole
    return found


def described(entry: State) -> dict[str, Any]:
    """Small tensors themselves, shape and type of the others."""
    return {
        name: (tuple(S.shape), S.dtype) if S.ndim and S.is_floating_point() else S.cpu()
        for name, S in entry.items()
    }


def small(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a description, the tensors themselves."""
    return {name: S for name, S in entry.items() if isinstance(S, Tensor)}


def sizes(entry: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of a description, shape and type of the large tensors."""
    return {name: S for name, S in entry.items() if not isinstance(S, Tensor)}
