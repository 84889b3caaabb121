"""What a loaded state must be before anything of an optimiser changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from matrigami.operators import BlockView
from matrigami.optim._adam import Adam
from matrigami.optim._method import MatrixMethod
from matrigami.optim._stacks import COUNTERS, Slot
from matrigami.optim.distributed import working_dtype

Group = Mapping[str, Any]


def checked(
    method: type[MatrixMethod], groups: Sequence[Group], loaded: Mapping[str, Any], *, whole: bool
) -> dict[str, Any]:
    """A state that fits, with its named parameters in the order of the optimiser's.

    Args:
        method: Whose state it should be.
        groups: The optimiser's.
        loaded: The state.
        whole: Whether all of it is here, so that shapes can be compared.

    Raises:
        ValueError: If it is the state of another method, or of other parameters.
    """
    name = method.__name__
    _refuse_foreign(name, groups, loaded)
    pairs = zip(groups, loaded["param_groups"], strict=True)
    ordered = [_in_order(name, group, other) for group, other in pairs]
    state = {i: {k: _tensor(k, S) for k, S in e.items()} for i, e in loaded["state"].items()}
    for group, other in zip(groups, ordered, strict=True) if whole else ():
        for p, view, i in zip(group["params"], group["views"], other["params"], strict=True):
            if state.get(i):
                _refuse_shapes(method, Slot(p, view), state[i], {**group, **other}, f"{i}")
    return {**loaded, "state": state, "param_groups": ordered}


def _refuse_foreign(name: str, groups: Sequence[Group], loaded: Mapping[str, Any]) -> None:
    """Raise if a state is that of another kind of optimiser, or of another number of parameters."""
    sizes, others = ([len(g["params"]) for g in gs] for gs in (groups, loaded["param_groups"]))
    if sizes != others:
        raise ValueError(
            f"{name}.load_state_dict(state): its groups have {others} parameters.\n"
            f"This optimiser has groups of {sizes}.\nLoad the state of the same model and groups."
        )
    for group, other in zip(groups, loaded["param_groups"], strict=True):
        _refuse_options(name, group, other)
    for entry in loaded["state"].values():
        if entry and "seeded" not in entry:
            raise ValueError(
                f"{name}.load_state_dict(state): it is that of another optimiser.\n"
                f"Its entries are {', '.join(map(str, entry))}.\n"
                "Load the state that this class has saved."
            )


def _refuse_options(name: str, group: Group, other: Group) -> None:
    """Raise if a loaded group has options that ours has not, and lacks some that ours has."""
    missing = [k for k, v in group.items() if k not in other and isinstance(v, float | int)]
    known = {"initial_lr", "param_names", "params"}
    more = [k for k in other if k not in group and k not in known and "_" not in k]
    if missing and more:
        raise ValueError(
            f"{name}.load_state_dict(state): it is that of another optimiser.\n"
            f"It has the options {', '.join(more)}, and lacks {', '.join(missing)}.\n"
            "Load the state that this class has saved."
        )


def _in_order(name: str, group: Group, other: Group) -> dict[str, Any]:
    """A loaded group in the order of the names, if both have names."""
    mine, theirs = group.get("param_names"), other.get("param_names")
    if mine is None or theirs is None or mine == theirs:
        return dict(other)
    if sorted(mine) != sorted(theirs):
        odd = sorted(set(theirs) ^ set(mine))
        raise ValueError(
            f"{name}.load_state_dict(state): it is that of other parameters.\n"
            f"On one side only: {', '.join(odd[:8])}.\nLoad the state of the same model."
        )
    where = dict(zip(theirs, other["params"], strict=True))
    return {**other, "param_names": list(mine), "params": [where[key] for key in mine]}


def _tensor(key: str, S: Any) -> Any:
    """A number as a tensor, as other tools write it."""
    if key in COUNTERS and isinstance(S, int | float):
        return torch.tensor(S, dtype=torch.bool if key == "seeded" else torch.float32)
    return S


def _refuse_shapes(
    method: type[MatrixMethod], slot: Slot, entry: Mapping[str, Any], options: Group, i: str
) -> None:
    """Raise unless an entry has the tensors that the method keeps, in their shapes."""
    wanted = dict(_shapes(method, slot, options))
    found = {k: tuple(S.shape) for k, S in entry.items() if isinstance(S, Tensor) and k in wanted}
    missing = sorted(set(wanted) - set(found))
    wrong = [f"{k} {found[k]} for {wanted[k]}" for k in found if found[k] != wanted[k]]
    if missing or wrong:
        raise ValueError(
            f"{method.__name__}.load_state_dict(state): the entry of parameter {i} does not fit "
            f"its shape {tuple(slot.parameter.shape)}.\n"
            f"{'; '.join(wrong) or 'There is no ' + ', '.join(missing)}.\n"
            "Load the state of the same model and method; nothing has changed."
        )


def _shapes(
    method: type[MatrixMethod], slot: Slot, options: Group
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a parameter's state, by their names."""
    view: BlockView | None = slot.view
    G = torch.empty(slot.blocks, *slot.item, device="meta", dtype=working_dtype(slot.parameter))
    chosen = Adam if view is None else method
    for key, S in chosen.init(G, options).items():
        yield key, tuple(slot.entry(S).shape)
