"""The one step loop: collect the gradients, compute the updates on stacks, apply them.

Everything around the mathematics is here and in `_stacks.py`: views, precision, gradients that are
not finite, weight decay, learning rates, the state of torch. A subclass is `init` and `direction`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from matrigami.operators import BlockView, stacked_view
from matrigami.optim._loading import checked
from matrigami.optim._method import MatrixMethod, State
from matrigami.optim._options import check_options
from matrigami.optim._plan import Plan, planned
from matrigami.optim._stacks import ON_HOST, Layout
from matrigami.optim.distributed import (
    Exchange,
    Local,
    Update,
    exchange_between,
    local,
    working_dtype,
)

Source = nn.Module | Plan | Iterable[Any]
"""A model, a plan of one, or whatever a torch optimiser takes."""


class MatrixOptimizer(Optimizer, MatrixMethod):
    """A `torch.optim.Optimizer` whose updates are functions of stacks of matrices.

    Parameters with a view are stacks of matrices and take this method; all others take Adam. A
    parameter whose gradient is not finite is skipped in that step, decay included, and counted in
    its state. The state is in single precision (double for double parameters).

    Args:
        source: A model, a `Plan`, or parameters, named parameters or groups. Without a model, two
            axes are a matrix, none or one are not, and more need a group with `views`.
        defaults: The options of a group, with `lr`, `weight_decay`, `adam_betas` and `adam_eps`.

    Raises:
        ValueError: If an option is out of range, or it is not known how a parameter is a stack of
            matrices.
    """

    def __init__(self, source: Source, defaults: dict[str, Any]) -> None:
        check_options(type(self).__name__, defaults)
        if isinstance(source, nn.Module):
            source = planned(source, type(self), defaults)
        replicas = source.replicas if isinstance(source, Plan) else None
        self.exchange: Exchange = exchange_between((), replicas, type(self))
        self._layout = Layout(type(self))
        super().__init__(source.groups() if isinstance(source, Plan) else source, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = next((p.device.type for p in self._parameters), "cpu")
        with torch.autocast(device, enabled=False):
            self._advance()
        return loss

    def _advance(self) -> None:
        """Update the parameters, in the precision of the state."""
        gradients = self._downhill(self.exchange.collect(self.param_groups))
        if self._is_rehearsal(gradients):
            self._layout.arrange(self.param_groups, self.state, gradients)
            return
        clock = self.param_groups[0]["clock"] + 1
        for group in self.param_groups:
            group["clock"] = clock
        self._apply(self.exchange.deliver(self._updates(gradients)))

    def _downhill(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients, turned around where a group maximizes."""
        up = [p for group in self.param_groups if group.get("maximize") for p in group["params"]]
        return gradients | {p: -gradients[p] for p in up if p in gradients}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does; `views` holds the view of each parameter, if the group has it."""
        super().add_param_group(self._named(param_group))
        group, name = self.param_groups[-1], type(self).__name__
        try:
            check_options(name, group)
            _refuse_complex(name, group["params"])
            views = group.get("views") or [_bare(name, p) for p in group["params"]]
        except ValueError:
            self.param_groups.pop()
            raise
        group["views"] = [v and self.viewed(v, group) for v in views]
        group.setdefault("clock", self.param_groups[0].get("clock", 0))
        if isinstance(self.exchange, Local):
            self.exchange = exchange_between(group["params"], None, type(self))

    def _named(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with names for its parameters, if all others have them, as torch wants it."""
        given = listed(group["params"])
        if not self.param_groups or "param_names" not in self.param_groups[0]:
            return group | {"params": given}
        i = len(self.param_groups)
        named = [p if isinstance(p, tuple) else (f"{i}.{k}", p) for k, p in enumerate(given)]
        return group | {"params": named} | ({} if named else {"param_names": []})

    @property
    def reads_gradients_only(self) -> bool:
        """Whether a step depends on nothing but gradients and state: so runs can be stacked."""
        return True

    @property
    def _parameters(self) -> list[Tensor]:
        """Of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """As torch does, with plain data only: views and functions belong to the constructor.

        Where matrices have owners, all processes must call it, as checkpoints do; see `_owners.py`.
        """
        state = super().state_dict()
        groups = [
            {k: v for k, v in g.items() if k != "wholes" and _plain(v)}
            for g in state["param_groups"]
        ]
        entries = self.exchange.saved(self.param_groups, self.state)
        ordered = {i: entries[p] for i, p in enumerate(self._parameters) if p in entries}
        return state | {"param_groups": groups, "state": ordered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but the state keeps its precision whatever that of the parameters is.

        Named parameters are matched by their names, whatever their order.

        Raises:
            ValueError: If it is that of another method or model; nothing has changed then.
        """
        whole = isinstance(self.exchange, Local)
        state_dict = checked(type(self), self.param_groups, state_dict, whole=whole)
        before = [dict(group) for group in self.param_groups]
        loaded = self._load_as_torch(state_dict)
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._parameters, strict=True):
            self.state[p] |= {k: _placed(k, S, p) for k, S in loaded["state"].get(i, {}).items()}
        self.param_groups = [
            old | group for old, group in zip(before, self.param_groups, strict=True)
        ]
        self.state.update(self.exchange.loaded(self.param_groups, self.state))

    def _load_as_torch(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Load as torch does; what it loads, before it is cast to the dtype of the parameters."""
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        return loaded[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Whatever is loaded, the stacks are made anew from it."""
        super().__setstate__(state)
        if "exchange" not in self.__dict__:  # a copy that was unpickled
            self.exchange = exchange_between(self._parameters, None, type(self))
            if isinstance(self.exchange, Local) and not all(self.state.values()):
                raise ValueError(
                    f"copy of {type(self).__name__}: its matrices have owners.\n"
                    "Other processes hold a part of its state.\n"
                    "Make a new optimiser of the model, and load its state_dict."
                )
        self._layout = Layout(type(self))

    def _is_rehearsal(self, gradients: dict[Tensor, Tensor]) -> bool:
        """Whether this first step, with nothing but zeros, only asks which state there will be.

        `torch.distributed.checkpoint` takes one such step before it loads; it should not count.
        """
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        return not self.exchange.anywhere(any(bool(G.any()) for G in gradients.values()))

    def _updates(
        self, gradients: dict[Tensor, Tensor], observed: Mapping[Tensor, State] | None = None
    ) -> list[Update]:
        """The part without parameters: gradients in, updates out, and the next state.

        What was `observed` of a parameter in this step, `direction` finds in its state.
        """
        buckets = self._layout.arrange(self.param_groups, self.state, gradients)
        return [u for bucket in buckets for u in bucket.advance(gradients, observed or {})]

    def _apply(self, updates: list[Update]) -> None:
        """`p <- p (1 - lr wd) - lr u`, with each group's own numbers."""
        by_parameter = {u.parameter: u._replace(parameter=local(u.parameter)) for u in updates}
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            mine = [by_parameter[p] for p in group["params"] if p in by_parameter]
            _apply_together([u for u in mine if _is_exact(u)], lr, decay)
            for update in itertools.filterfalse(_is_exact, mine):
                p, keep = update.parameter, 1 - lr * decay * update.applied
                p.copy_(p.to(update.direction.dtype) * keep - lr * update.direction)  # rounds once


def listed(parameters: Any) -> list[Any]:
    """One parameter, or several."""
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _refuse_complex(name: str, parameters: Iterable[Tensor]) -> None:
    """Raise if a parameter is complex."""
    for p in parameters:
        if p.is_complex():
            raise ValueError(
                f"{name}: a parameter of shape {tuple(p.shape)} is complex.\n"
                "The methods are for real matrices.\n"
                "Give it to torch.optim.AdamW, or train its real and imaginary parts."
            )


def _is_exact(update: Update) -> bool:
    """Whether a parameter is kept in the precision in which it is updated."""
    return update.parameter.dtype == update.direction.dtype


def _apply_together(updates: list[Update], lr: Any, decay: Any) -> None:
    """The updates of one group in two calls."""
    if not updates:
        return
    together: Any = torch  # its functions on lists are public only in torch's own optimisers
    parameters = [u.parameter for u in updates]
    if decay != 0:
        together._foreach_mul_(parameters, [1 - lr * decay * u.applied for u in updates])
    directions = [u.direction for u in updates]
    if isinstance(lr, Tensor):
        together._foreach_sub_(parameters, together._foreach_mul(directions, lr))
    else:
        together._foreach_sub_(parameters, directions, alpha=lr)


def _bare(name: str, p: Tensor) -> BlockView | None:
    """The view of a parameter that came without its module."""
    if p.ndim > 2:
        raise ValueError(
            f"{name}: a parameter of shape {tuple(p.shape)} came without its module.\n"
            "Which of its axes are rows, columns and blocks is not known from the shape.\n"
            "Pass the model, or matrigami.optim.plan(model), or groups with views."
        )
    view = stacked_view(tuple(p.shape)) if p.ndim == 2 else None
    return view if view and view.two_sided else None


def _plain(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` takes a value."""
    if type(value) in {list, tuple}:
        return all(_plain(x) for x in value)
    return value is None or type(value) in {bool, int, float, str} or isinstance(value, Tensor)


def _placed(name: str, S: Any, p: Tensor) -> Any:
    """A loaded tensor on the parameter's device, in its working precision."""
    if not isinstance(S, Tensor):
        return S
    if name in ON_HOST or not S.is_floating_point():
        return S.to("cpu" if name in ON_HOST else p.device, copy=True)
    dtype = S.dtype if S.ndim == 0 else working_dtype(p)
    return S.to(p.device, dtype, copy=True)
