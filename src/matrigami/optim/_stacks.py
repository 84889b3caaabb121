"""All blocks of one shape, whichever parameters they come from: one batched call for all of them.

The state of a bucket is stacked; what the optimiser holds for each parameter are views of it, so
`state_dict` is the standard one and batching costs no copies. A gradient that is not finite must
not enter: its parameter keeps its state, and the others cannot tell.

Shapes: b = blocks of the bucket, p = its parameters, m = rows, n = columns.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matrigami.operators import BlockView
from matrigami.optim._adam import Adam
from matrigami.optim._method import MatrixMethod, Method, Options, State
from matrigami.optim._options import check_options
from matrigami.optim._schedule import spread
from matrigami.optim.distributed import Groups, Update, local, working_dtype

COUNTERS = ("step", "skipped", "seeded")
"""Entries with one number for a parameter, whatever its number of blocks."""

ON_HOST = ("seeded", "offset")
"""Entries that the schedule reads; on the host, so that nothing waits for a device."""


OUTSIDE = frozenset(
    {"params", "param_names", "views", "wholes", "clock"}
    | {"lr", "weight_decay", "initial_lr", "maximize"}
)
"""Keys of a group that the mathematics does not see: groups that differ only there share stacks."""


class Slot(NamedTuple):
    """A parameter in a bucket."""

    parameter: Tensor
    view: BlockView | None

    @property
    def blocks(self) -> int:
        """Number of items in the stack."""
        return 1 if self.view is None else self.view.stack[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of what is updated: a whole matrix, or what this process has of the rest."""
        return local(self.parameter).shape if self.view is None else self.parameter.shape

    @property
    def item(self) -> tuple[int, ...]:
        """Shape of an item: a matrix, or all entries of the parameter."""
        return (self.shape.numel(),) if self.view is None else self.view.stack[1:]

    def split(self, W: Float[Tensor, "..."]) -> Float[Tensor, "b *item"]:
        """The parameter's part of the stack."""
        return W.reshape(1, -1) if self.view is None else self.view.split(W)

    def merge(self, M: Float[Tensor, "b *item"]) -> Float[Tensor, "..."]:
        """Back to the shape of the parameter."""
        return M.reshape(self.shape) if self.view is None else self.view.merge(M)

    def entry(self, S: Tensor) -> Tensor:
        """State of the parameter, in its own shape where there is one number for each entry."""
        plain = self.view is None and tuple(S.shape) == (1, *self.item)
        return S.view(self.shape) if plain else S


Place = tuple[dict[str, Any], list[Slot]]
"""Parameters that share a stack, with one of their groups."""


def initial_state(
    method: type[Method], slots: list[Slot], gradients: Mapping[Tensor, Tensor], options: Options
) -> list[State]:
    """For each parameter its state before the first update."""
    bucket = Bucket(method, slots, [], options)
    G, keep = bucket.stacked(gradients)
    seeded = bucket.usable(G, keep)
    state = method.init(torch.where(_mask(seeded, bucket.owner, G), G, 0.0), options)
    zeros = torch.zeros(len(slots), dtype=torch.float32, device=G.device)
    stacks = {"step": zeros, "skipped": zeros.clone(), "seeded": seeded.cpu(), **state}
    return [{k: bucket.part(k, S, i).clone() for k, S in stacks.items()} for i in range(len(slots))]


class Bucket:
    """Parameters whose blocks have one shape, dtype, device and set of options.

    Args:
        method: Its `init` and `direction` are applied to the stack.
        slots: The parameters.
        entries: Their states, to be stacked; afterwards their tensors are views of the stacks.
        options: A parameter group.
    """

    def __init__(
        self, method: type[Method], slots: list[Slot], entries: list[State], options: Options
    ) -> None:
        self.method, self.slots, self.options = method, slots, options
        self.entries = entries
        self.kinds = {s.parameter: (working_dtype(s.parameter), *s.parameter.shape) for s in slots}
        counts = torch.tensor([slot.blocks for slot in slots])
        device = slots[0].parameter.device
        self.owner = torch.arange(len(slots)).repeat_interleave(counts).to(device)
        stops = counts.cumsum(0).tolist()
        self.ranges = [slice(b - slot.blocks, b) for slot, b in zip(slots, stops, strict=True)]
        self.state = {name: self._stack(name, entries) for name in (entries[0] if entries else ())}
        self.shared: list[State] = [{} for _ in entries]
        self._share(self.state)

    def is_current(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the state of all its parameters is what the stacks hold: views of them."""
        return all(
            state.get(slot.parameter) is entry
            and all(entry.get(name) is S for name, S in shared.items())
            for slot, entry, shared in zip(self.slots, self.entries, self.shared, strict=True)
        )

    def part(self, name: str, S: Tensor, i: int) -> Tensor:
        """What a stack holds for the i-th parameter."""
        return S[i] if name in COUNTERS else self.slots[i].entry(S[self.ranges[i]])

    def stacked(
        self, gradients: Mapping[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b *item"], Bool[Tensor, " p"]]:
        """The gradients, and which parameters have one whose squares are finite."""
        parts = [slot.split(self._gradient(slot, gradients)) for slot in self.slots]
        G = parts[0] if len(parts) == 1 else torch.cat(parts)
        finite = torch.linalg.vector_norm(G.flatten(1), dim=1).isfinite()
        misses = torch.zeros(len(self.slots), dtype=torch.int32, device=G.device)
        misses = misses.index_add(0, self.owner, (~finite).int())
        return G, misses == 0

    def usable(self, G: Float[Tensor, "b *item"], keep: Bool[Tensor, " p"]) -> Bool[Tensor, " p"]:
        """Which parameters have a gradient that is neither zero nor infinite."""
        size = torch.zeros(len(self.slots), dtype=G.dtype, device=G.device)
        size = size.index_add(0, self.owner, torch.linalg.vector_norm(G.flatten(1), dim=1))
        return keep & (size > 0)

    def advance(
        self, gradients: Mapping[Tensor, Tensor], observed: Mapping[Tensor, State]
    ) -> list[Update]:
        """One step of the method; the state changes, the parameters do not."""
        present = [slot.parameter in gradients for slot in self.slots]
        if not any(present):
            return []
        G, finite = self.stacked(gradients)
        keep = finite & torch.tensor(present, device=G.device)
        every = G.device.type == "cpu" and bool(keep.all())  # elsewhere asking would wait for it
        if not every:
            G = torch.where(_mask(keep, self.owner, G), G, 0.0)
        self._seed(G, keep)
        U, state = self.method.direction(
            G,
            {**self.state, "step": self.state["step"][self.owner], **self._observed(observed)},
            self.options,
        )
        self._commit(state, None if every else keep)
        self.state["step"] += keep
        self.state["skipped"] += ~finite
        return self._updates(U, None if every else keep, present)

    def _seed(self, G: Float[Tensor, "b *item"], keep: Bool[Tensor, " p"]) -> None:
        """Start again the parameters that see their first gradient which is not zero."""
        if self.state["seeded"].all():
            return
        first = self.usable(G, keep) & ~self.state["seeded"].to(G.device)
        items = first[self.owner].nonzero().flatten()
        if len(items):
            for name, S in self.method.init(G[items], self.options).items():
                self.state[name][items.to(S.device)] = S
        self.state["seeded"] |= first.to(self.state["seeded"].device)

    def _observed(self, observed: Mapping[Tensor, State]) -> State:
        """What was observed of the parameters, and of which items (`seen`); empty if of none."""
        found = [observed.get(slot.parameter) for slot in self.slots]
        known = next((entry for entry in found if entry is not None), None)
        if known is None:
            return {}
        dtype, stacks = working_dtype(self.slots[0].parameter), {}
        for name, S in known.items():
            parts = [
                S.new_zeros(slot.blocks, *S.shape[1:]) if entry is None else entry[name]
                for slot, entry in zip(self.slots, found, strict=True)
            ]
            stacks[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
        return stacks | {"seen": torch.tensor([e is not None for e in found])[self.owner.cpu()]}

    def _commit(self, state: State, keep: Bool[Tensor, " p"] | None) -> None:
        """Take over the next state, except where a gradient was missing or not finite.

        It is contiguous, as what is loaded from a file: products depend on strides in the last bit.
        """
        state = {name: S.contiguous() for name, S in state.items()}
        if keep is None:
            self.state |= state
            self._share(state)
            return
        for name, S in state.items():
            old = self.state[name]
            torch.where(_mask(keep, self.owner, S), S, old, out=old)

    def _share(self, names: Iterable[str]) -> None:
        """Let the parameters' states be views of the stacks."""
        for i, entry in enumerate(self.entries):
            for name in names:
                entry[name] = self.shared[i][name] = self.part(name, self.state[name], i)

    def _updates(
        self, U: Float[Tensor, "b *item"], keep: Bool[Tensor, " p"] | None, present: list[bool]
    ) -> list[Update]:
        """The part of the stack for each parameter that has a gradient."""
        applied: list[Any] = [1.0] * len(self.slots)
        if keep is not None:
            U, applied = torch.where(_mask(keep, self.owner, U), U, 0.0), list(keep.double())
            if U.device.type == "cpu":
                applied = [float(a) for a in applied]
        return [
            Update(slot.parameter, slot.merge(U[where]), applied[i])
            for i, (slot, where) in enumerate(zip(self.slots, self.ranges, strict=True))
            if present[i]
        ]

    def _gradient(self, slot: Slot, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """A gradient in the working precision; zero where there is none."""
        p = slot.parameter
        dtype = working_dtype(p)
        if (dtype, *p.shape) != self.kinds[p]:
            raise ValueError(
                f"step(): a parameter is {tuple(p.shape)} in {dtype} now; its state is of "
                f"{self.kinds[p][1:]} in {self.kinds[p][0]}.\n"
                "The moments of the one mean nothing for the other.\n"
                "Make a new optimiser after model.double() or a change of sizes."
            )
        G = gradients.get(p)
        if G is None:
            return torch.zeros(slot.shape, dtype=dtype, device=p.device)
        return G.to(dtype)

    def _stack(self, name: str, entries: list[State]) -> Tensor:
        """One tensor of all parameters."""
        parts = [entry[name] for entry in entries]
        if not all(isinstance(S, Tensor) and S.device == parts[0].device for S in parts):
            device = "cpu" if name in ON_HOST else self.owner.device
            parts = [torch.as_tensor(S, device=device) for S in parts]
        if name in COUNTERS:
            return torch.stack(parts)
        flat = self.slots[0].view is None
        return torch.cat([S.reshape(1, -1) if flat else S for S in parts])


def _mask(keep: Bool[Tensor, " p"], owner: Tensor, S: Tensor) -> Bool[Tensor, "..."]:
    """Which entries of a stack belong to the parameters that are kept."""
    items = keep[owner].to(S.device)
    return items.reshape(-1, *[1] * (S.ndim - 1))


class Layout:
    """The buckets of an optimiser, kept until its options or its parameters change.

    Args:
        method: The method of matrices; Adam has the rest.
    """

    def __init__(self, method: type[MatrixMethod]) -> None:
        self.method = method
        self.buckets: list[Bucket] = []
        self.signature: Hashable = None

    def arrange(
        self, groups: Groups, state: dict[Tensor, State], gradients: Mapping[Tensor, Tensor]
    ) -> list[Bucket]:
        """The buckets of all parameters that have a state or a gradient.

        They are made anew where an entry of the state is no longer what it was: whoever moves or
        replaces a tensor there is obeyed, as in torch. Every parameter with a gradient is given an
        entry, if an empty one where another process updates it: refreshes are spread over those of
        all processes.
        """
        signature = tuple(map(options_key, groups))
        fresh = {p for p in gradients if not state.get(p)}
        elsewhere = _without_entry(groups, state) - fresh
        same = signature == self.signature and all(b.is_current(state) for b in self.buckets)
        if fresh or elsewhere or not same:
            for group in groups:
                check_options(self.method.__name__, group)
            places = _places(groups, signature, state, gradients)
            self._adopt(fresh, places.values(), state, gradients)
            stagger(groups, state, fresh | elsewhere, self.method)
            state.update((p, {}) for p in elsewhere)
            self.buckets = [self._bucket(*place, state) for place in places.values()]
            self.signature = signature
        return self.buckets

    def _bucket(
        self, options: dict[str, Any], slots: list[Slot], state: dict[Tensor, State]
    ) -> Bucket:
        """Some parameters with their states."""
        entries = [state[slot.parameter] for slot in slots]
        return Bucket(self._method(slots), slots, entries, options)

    def _method(self, slots: list[Slot]) -> type[Method]:
        """The method of one stack."""
        return Adam if slots[0].view is None else self.method

    def _adopt(
        self,
        fresh: Collection[Tensor],
        places: Iterable[Place],
        state: dict[Tensor, State],
        gradients: Mapping[Tensor, Tensor],
    ) -> None:
        """Give new parameters their first state."""
        for options, slots in places:
            new = [slot for slot in slots if slot.parameter in fresh]
            if new:
                first = initial_state(self._method(new), new, gradients, options)
                state.update({s.parameter: entry for s, entry in zip(new, first, strict=True)})


def options_key(group: dict[str, Any]) -> Hashable:
    """The options that the mathematics sees, comparable."""
    inside = {k: v for k, v in group.items() if k not in OUTSIDE}
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(inside.items()))


def stagger(
    groups: Groups,
    state: dict[Tensor, State],
    fresh: Collection[Tensor],
    method: type[MatrixMethod],
) -> None:
    """Spread the refreshes of new parameters over the cycle of their groups."""
    cycles: dict[int, list[tuple[Tensor, float]]] = defaultdict(list)
    for group, p, view in _matrices(groups, fresh):
        b, m, n = view.stack
        costs = method.refresh_costs(m, n, group)
        offset = torch.zeros(b, len(costs), dtype=torch.int64)
        if p in state:
            state[p]["offset"] = offset
        if costs and group["stagger"]:
            cycles[group["frequency"]] += zip(offset.view(-1), costs * b, strict=True)
    for frequency, refreshes in cycles.items():
        turns, work = zip(*refreshes, strict=True)
        for turn, when in zip(turns, spread(work, frequency), strict=True):
            turn.fill_(when)


def _matrices(
    groups: Groups, among: Collection[Tensor]
) -> Iterator[tuple[dict[str, Any], Tensor, BlockView]]:
    """Those of some parameters that are matrices, with their groups and views."""
    for group in groups:
        for p, view in zip(group["params"], group["views"], strict=True):
            if p in among and view is not None:
                yield group, p, view


def _without_entry(groups: Groups, state: Mapping[Tensor, State]) -> set[Tensor]:
    """Parameters with a gradient that are seen for the first time."""
    parameters = itertools.chain.from_iterable(group["params"] for group in groups)
    return {p for p in parameters if p.grad is not None and p not in state}


def _places(
    groups: Groups,
    signature: tuple[Hashable, ...],
    state: Mapping[Tensor, State],
    gradients: Mapping[Tensor, Tensor],
) -> dict[Hashable, Place]:
    """The parameters that share a stack, with one of their groups."""
    places: dict[Hashable, Place] = {}
    for group, key in zip(groups, signature, strict=True):
        for p, view in zip(group["params"], group["views"], strict=True):
            if p in gradients or state.get(p):
                slot = Slot(p, view)
                place = (view is None, slot.item, working_dtype(p), p.device, key)
                places.setdefault(place, (group, []))[1].append(slot)
    return places
