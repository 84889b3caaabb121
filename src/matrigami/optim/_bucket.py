"""All blocks of one shape, whichever parameters they come from: one batched call for all of them.

The state of a bucket is stacked; what the optimiser holds for each parameter are views of it, so
`state_dict` is the standard one and batching costs no copies. A gradient that is not finite must
not enter: its parameter keeps its state, and the others cannot tell.

Shapes: b = blocks of the bucket, p = its parameters, m = rows, n = columns.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matrigami.operators import BlockView
from matrigami.optim._exchange import Update, local
from matrigami.optim._method import Method, Options, State

COUNTERS = ("step", "skipped", "seeded")
"""Entries with one number for a parameter, whatever its number of blocks."""

ON_HOST = ("seeded", "offset")
"""Entries that the schedule reads; on the host, so that nothing waits for a device."""


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


def working_dtype(t: Tensor) -> torch.dtype:
    """Double precision stays, everything else is computed in single precision."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


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

    def advance(self, gradients: Mapping[Tensor, Tensor]) -> list[Update]:
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
            G, {**self.state, "step": self.state["step"][self.owner]}, self.options
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

    def _commit(self, state: State, keep: Bool[Tensor, " p"] | None) -> None:
        """Take over the next state, except where a gradient was missing or not finite.

        It is contiguous, as what is loaded from a file: products depend on strides in the last bit.
        """
        state = {name: S.contiguous() for name, S in state.items()}
        if keep is None:
            self.state |= {name: S.contiguous() for name, S in state.items()}  # as it is loaded
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
        G = gradients.get(p)
        dtype = working_dtype(p)
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
