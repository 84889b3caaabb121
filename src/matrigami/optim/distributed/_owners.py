"""Matrices have owners: one process updates a matrix for all that hold a part of it.

Everything is read from the parameters. A sharded one (`DTensor`: FSDP2, HSDP, tensor parallelism)
is gathered by its owner from the processes along the first axis of its mesh that cuts it; along
other axes, such as the replicas of HSDP, each line of processes does the same. Plain parameters of
a `DistributedDataParallel` model are equal on all processes: the owner computes, then broadcasts.
What is not a matrix is updated where it is, shard by shard.

A step costs two messages for each pair of processes: a matrix's gradient to its owner, the update
back; both are sent for all matrices at once. Owners are given by cost, the most expensive matrix
first, to the process with the least so far (Graham 1969: at most 4/3 of the optimum).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from matrigami.optim._method import MatrixMethod, State
from matrigami.optim.distributed._exchange import Groups, Update, local, present, working_dtype
from matrigami.optim.distributed._messages import (
    Cut,
    Group,
    Team,
    aligned,
    all_known,
    anywhere,
    assembled,
    by_owner,
    copies,
    from_owners,
    sharded_axes,
    summed,
    to_owners,
)


class Owners:
    """The exchange of parameters that are sharded, or replicated.

    Args:
        replicas: The process group of a `DistributedDataParallel` model, or None: plain parameters
            are then updated by each process for itself.
        method: The method of matrices; its `flops` are what is balanced.
    """

    def __init__(self, replicas: Group | None, method: type[MatrixMethod]) -> None:
        self.replicas, self.method = replicas, method
        self._teams: dict[Any, Team] = {}
        self._loads: dict[Team, list[float]] = {}
        self._owners: dict[Tensor, int] = {}
        self._shared: dict[Team, list[Tensor]] = {}

    def collect(self, groups: Groups) -> dict[Tensor, Inexact[Tensor, "..."]]:
        """Whole gradients of the matrices that this process owns; shards of the rest."""
        self.owners(groups)
        gradients = {p: aligned(p, G) for p, _, G in present(groups)}
        self._shared = self._by_team(groups, gradients)
        found: dict[Tensor, Tensor] = {}
        for team, matrices in self._shared.items():
            parts = [gradients.pop(p) for p in matrices]
            found |= self._gathered(team, matrices, parts)
        return found | agreed(gradients)

    def deliver(self, updates: list[Update]) -> list[Update]:
        """Those of owned matrices go to all that hold a part."""
        mine = {u.parameter: u for u in updates}
        received = []
        for team, matrices in self._shared.items():
            owned = {i: mine.pop(p) for i, p in enumerate(matrices) if p in mine}
            received += self._delivered(team, matrices, owned)
        return [*mine.values(), *received]

    def owners(self, groups: Groups) -> dict[Tensor, int]:
        """Longest processing time first; whoever has an owner keeps it."""
        work: dict[Team, list[tuple[float, Tensor]]] = defaultdict(list)
        for group in groups:
            for p, view in zip(group["params"], group["views"], strict=True):
                team = None if p in self._owners else self._team(p)
                if view is not None and team is not None:
                    b, m, n = view.stack
                    work[team].append((b * self.method.flops(m, n, group), p))
        for team, costs in work.items():
            loads = self._loads.setdefault(team, [0.0] * team.group.size())
            for cost, p in sorted(costs, key=lambda pair: -pair[0]):
                owner = loads.index(min(loads))
                loads[owner] += cost
                self._owners[p] = owner
        return self._owners

    def anywhere(self, flag: bool) -> bool:
        """On some process of some team."""
        for team in self._teams.values():
            flag = anywhere(flag, [team.group], team.device)
        return flag

    def summed(self, value: float) -> float:
        """Over the processes of each team; teams of the same processes count once."""
        for team in {id(team.group): team for team in self._teams.values()}.values():
            total = torch.tensor([value], dtype=torch.float64, device=team.device)
            value = float(summed(total, [team.group]))
        return value

    def whole(self, p: Tensor, part: Tensor) -> Tensor:
        """Gathered from all processes of its mesh, each of which asks."""
        if not isinstance(p, DTensor):
            return part
        return assembled(part, p.device_mesh, p.placements, tuple(p.shape)).full_tensor()

    def saved(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """Owned state is cut along its longest axis; what is small is copied.

        So each process holds an equal part, and whoever loads it, on any number of processes, finds
        tensors whose shapes do not depend on that number.
        """
        self.owners(groups)
        found = dict(state)
        for team, matrices in self._by_team(groups, state).items():
            found |= self._spread(team, matrices, state)
        for places, parameters in by_places(elementwise(groups, state)).items():
            found |= spread_shards(places, parameters, state)
        return found

    def loaded(self, groups: Groups, state: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """Owned state, put together; and this process's shards of the rest."""
        self.owners(groups)
        found = dict(state)
        for team, matrices in self._by_team(groups, state).items():
            found |= self._collected(team, matrices, state)
        found |= {p: taken_shards(p, state[p]) for p in elementwise(groups, state)}
        return found

    def _team(self, p: Tensor) -> Team | None:
        """Who shares the work of a parameter; None: each process does it for itself."""
        if not isinstance(p, DTensor):
            if self.replicas is None:
                return None
            return self._teams.setdefault(None, Team(self.replicas, p.device))
        axes = sharded_axes(p)
        if not axes:
            return None
        mesh, axis = p.device_mesh, axes[0]
        return self._teams.setdefault(
            (mesh, axis), Team(mesh.get_group(axis), p.device, mesh, axis)
        )

    def _by_team(self, groups: Groups, those: Mapping[Tensor, Any]) -> dict[Team, list[Tensor]]:
        """Which of some parameters have owners, in one order on all processes."""
        found: dict[Team, list[Tensor]] = defaultdict(list)
        for p in (p for group in groups for p in group["params"]):
            team = self._team(p) if p in those and p in self._owners else None
            if team is not None:
                found[team].append(p)
        return found

    def _cuts(self, team: Team, matrices: Sequence[Tensor], exact: bool) -> list[Cut]:
        """How they, or their updates (in the working precision), are spread."""
        dtypes = [p.dtype if exact else working_dtype(p) for p in matrices]
        return [
            team.cut(p, self._owners[p], dtype) for p, dtype in zip(matrices, dtypes, strict=True)
        ]

    def _gathered(
        self, team: Team, matrices: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> dict[Tensor, Tensor]:
        """The whole gradients of the matrices that this process owns."""
        cuts = self._cuts(team, matrices, exact=True)
        if team.mesh is None:
            rank = team.group.rank()
            whole = {i: gradients[i] for i, cut in enumerate(cuts) if cut.owner == rank}
        else:
            parts = [
                team.part(cast("DTensor", G), cut.axis or 0)
                for G, cut in zip(gradients, cuts, strict=True)
            ]
            whole = to_owners(parts, cuts, team.group, team.device)
        return {matrices[i]: G for i, G in whole.items()}

    def _delivered(
        self, team: Team, matrices: Sequence[Tensor], owned: Mapping[int, Update]
    ) -> list[Update]:
        """Updates from their owners, and whether they are applied, which each owner knows."""
        cuts = self._cuts(team, matrices, exact=False)
        owned_by = by_owner(cuts, range(len(cuts)), team.group.size())
        places = {rank: some for rank, some in enumerate(owned_by) if some}
        ranks = list(places)
        flags = [Cut(r, (len(places[r]),), None, torch.float32) for r in ranks]
        wholes = {i: update.direction for i, update in owned.items()}
        if owned:
            own = [torch.as_tensor(owned[i].applied) for i in places[team.group.rank()]]
            mine = torch.stack(own).to(team.device, torch.float32)
            wholes[len(cuts) + ranks.index(team.group.rank())] = mine
        send = copies if team.mesh is None else from_owners
        parts = send(wholes, [*cuts, *flags], team.group, team.device)
        applied = _applied(places.values(), parts[len(cuts) :])
        return [
            Update(p, team.restored(p, part, cut), applied[i])
            for i, (p, part, cut) in enumerate(zip(matrices, parts, cuts, strict=False))
        ]

    def _spread(
        self, team: Team, matrices: Sequence[Tensor], state: Mapping[Tensor, State]
    ) -> dict[Tensor, State]:
        """The state of owned matrices, as each process of the team saves it."""
        entries = _all_described(matrices, state, [team.group])
        found: dict[Tensor, State] = {}
        large: list[tuple[Tensor, str]] = []
        cuts: list[Cut] = []
        for i, entry in sorted(entries, key=lambda pair: pair[0]):
            p = matrices[i]
            found[p] = {name: S.to(team.device) for name, S in small(entry).items()}
            for name, (shape, dtype) in sizes(entry).items():
                large.append((p, name))
                cuts.append(Cut(self._owners[p], shape, _longest(shape), dtype))
        wholes = {k: state[p][name] for k, (p, name) in enumerate(large) if state[p]}
        send = copies if team.mesh is None else from_owners
        parts = send(wholes, cuts, team.group, team.device)
        for (p, name), cut, part in zip(large, cuts, parts, strict=True):
            found[p][name] = team.spread(part, cut.shape, cut.axis or 0)
        return found

    def _collected(
        self, team: Team, matrices: Sequence[Tensor], state: Mapping[Tensor, State]
    ) -> dict[Tensor, State]:
        """The state of owned matrices, from what `_spread` made of it or from whole tensors."""
        rank = team.group.rank()
        found = {p: _unsharded(state[p]) if self._owners[p] == rank else {} for p in matrices}
        shards = {
            (p, name): S for p in matrices for name, S in state[p].items() if isinstance(S, DTensor)
        }
        cuts = [
            Cut(self._owners[p], tuple(S.shape), _longest(tuple(S.shape)), S.dtype)
            for (p, _), S in shards.items()
        ]
        parts = [team.part(S, cut.axis or 0) for S, cut in zip(shards.values(), cuts, strict=True)]
        keys = list(shards)
        for i, S in to_owners(parts, cuts, team.group, team.device).items():
            p, name = keys[i]
            found[p][name] = S
        return found


def _applied(places: Iterable[list[int]], flags: Sequence[Tensor]) -> dict[int, Any]:
    """Whether the update at each place is applied, from what each owner sent."""
    found: dict[int, Any] = {}
    for some, values in zip(places, flags, strict=True):
        found |= zip(some, values.tolist() if values.is_cpu else values.double(), strict=True)
    return found


def _unsharded(entry: State) -> State:
    """What of a state this process has alone."""
    return {name: S for name, S in entry.items() if not isinstance(S, DTensor)}


def _longest(shape: tuple[int, ...]) -> int:
    """The axis along which a state is cut."""
    return shape.index(max(shape))


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
    entries: dict[int, dict[str, Any]] = {}
    for i, entry in _all_described(parameters, state, places):
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


def _all_described(
    parameters: Sequence[Tensor], state: Mapping[Tensor, State], groups: Iterable[Group]
) -> list[tuple[int, dict[str, Any]]]:
    """What the processes of some groups have of the state of each parameter."""
    mine = [(i, described(state[p])) for i, p in enumerate(parameters) if state[p]]
    return all_known(mine, groups)


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
