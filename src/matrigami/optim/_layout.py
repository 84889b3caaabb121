"""Which blocks share a stack: all of one shape, dtype, device and set of options."""

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from matrigami.optim._adam import Adam
from matrigami.optim._bucket import Bucket, Slot, initial_state, working_dtype
from matrigami.optim._exchange import Groups
from matrigami.optim._method import MatrixMethod, Method, State
from matrigami.optim._schedule import spread

OUTSIDE = frozenset(
    {"params", "param_names", "views", "clock", "lr", "weight_decay", "initial_lr", "maximize"}
)
"""Keys of a group that the mathematics does not see: groups that differ only there share stacks."""


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
        signature = tuple(options_key(group) for group in groups)
        fresh = {p for p in gradients if not state.get(p)}
        new = {p for g in groups for p in g["params"] if p.grad is not None and p not in state}
        same = signature == self.signature and all(b.is_current(state) for b in self.buckets)
        if fresh or new or not same:
            places = _places(groups, signature, state, gradients)
            for options, slots in places.values():
                self._adopt([s for s in slots if s.parameter in fresh], state, gradients, options)
            stagger(groups, state, fresh | new, self.method)
            state.update({p: {} for p in new - fresh})
            self.buckets = [
                Bucket(self._method(slots), slots, [state[s.parameter] for s in slots], options)
                for options, slots in places.values()
            ]
            self.signature = signature
        return self.buckets

    def _method(self, slots: list[Slot]) -> type[Method]:
        """The method of one stack."""
        return Adam if slots[0].view is None else self.method

    def _adopt(
        self,
        slots: list[Slot],
        state: dict[Tensor, State],
        gradients: Mapping[Tensor, Tensor],
        options: dict[str, Any],
    ) -> None:
        """Give new parameters their first state."""
        if slots:
            first = initial_state(self._method(slots), slots, gradients, options)
            state.update({s.parameter: entry for s, entry in zip(slots, first, strict=True)})


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
    for group in groups:
        for p, view in zip(group["params"], group["views"], strict=True):
            if p not in fresh or view is None:
                continue
            b, m, n = view.stack
            costs = method.refresh_costs(m, n, group)
            offset = torch.zeros(b, len(costs), dtype=torch.int64)
            if p in state:
                state[p]["offset"] = offset
            if costs and group["stagger"]:
                turns = offset.view(-1)
                cycles[group["frequency"]] += [
                    (turns[i], costs[i % len(costs)]) for i in range(len(turns))
                ]
    for frequency, refreshes in cycles.items():
        turns, work = zip(*refreshes, strict=True)
        for turn, when in zip(turns, spread(work, frequency), strict=True):
            turn.fill_(when)


def _places(
    groups: Groups,
    signature: tuple[Hashable, ...],
    state: Mapping[Tensor, State],
    gradients: Mapping[Tensor, Tensor],
) -> dict[Hashable, tuple[dict[str, Any], list[Slot]]]:
    """The parameters that share a stack, with one of their groups."""
    places: dict[Hashable, tuple[dict[str, Any], list[Slot]]] = {}
    for group, key in zip(groups, signature, strict=True):
        for p, view in zip(group["params"], group["views"], strict=True):
            if p in gradients or state.get(p):
                slot = Slot(p, view)
                place = (view is None, slot.item, working_dtype(p), p.device, key)
                places.setdefault(place, (group, []))[1].append(slot)
    return places
