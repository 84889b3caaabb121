"""Which method each parameter of a model takes, what it costs, and the groups that say so to torch.

A plan is printed before training: nothing about it is a surprise in the run.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami.nn import Rule, StructuredLinear, spectral_rule
from matrigami.optim._adam import Adam
from matrigami.optim._bucket import working_dtype
from matrigami.optim._exchange import exchange_between
from matrigami.optim._method import MatrixMethod, Options
from matrigami.optim._routing import Role, Route, routes
from matrigami.optim._view import MatrixView


@dataclass(frozen=True)
class Row:
    """One parameter of a plan.

    Args:
        name: Its name in the model.
        parameter: The parameter.
        role: What it does.
        view: How it is a stack of matrices; None: it takes Adam.
        method: Name of its method.
        bytes: Size of its state.
        flops: Floating-point operations of a mean step.
        owner: Rank of the process that updates it for all that share it; None: each one does.
    """

    name: str
    parameter: Tensor = field(repr=False)
    role: Role
    view: MatrixView | None
    method: str
    bytes: int
    flops: float
    owner: int | None = None

    @property
    def blocks(self) -> str:
        """Shape of the stack, or of the parameter."""
        if self.view is None:
            return "x".join(map(str, self.parameter.shape)) or "1"
        b, m, n = self.view.stack
        return f"{b} of {m}x{n}"


@dataclass(frozen=True)
class Plan:
    """The routes of all trainable parameters of a model; its `repr` is a table.

    Args:
        rows: One for each parameter.
        method: The optimiser class.
        options: Its options.
        replicas: The process group of a `DistributedDataParallel` model.
        model: The model.
    """

    rows: tuple[Row, ...]
    method: type[MatrixMethod]
    options: Options
    replicas: Any = field(default=None, repr=False)
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Size of the whole state."""
        return sum(row.bytes for row in self.rows)

    @property
    def flops(self) -> float:
        """Floating-point operations of a mean step."""
        return sum(row.flops for row in self.rows)

    @property
    def rules(self) -> dict[str, Rule]:
        """How the learning rate of each matrix follows its size: for `nn.param_groups`.

        Examples:
            >>> from matrigami.nn import param_groups
            >>> from matrigami.optim import Muon, plan
            >>> model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 2, bias=False))
            >>> routes = plan(model, Muon)  # Muon for the first, Adam for the head
            >>> groups = param_groups(model, 0.02, base_width=16, width=64, rules=routes.rules)
            >>> optimizer = Muon(routes.groups(groups))
            >>> [(g["lr"], g["views"][0] is None) for g in optimizer.param_groups]
            [(0.005, True), (0.01, False)]
        """
        rule = spectral_rule(partial(self.method.norm, options=self.options))
        return {row.name: rule for row in self.rows if row.view is not None}

    def groups(self, groups: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Parameter groups that carry the views: for the optimiser's constructor.

        Args:
            groups: Groups of the same model's parameters, such as those of `nn.param_groups` with
                learning rates that transfer; each is returned with its views. By default there are
                two groups: the matrices, and everything else.

        Raises:
            ValueError: If a parameter is not in the plan.
        """
        if groups is not None:
            return [group | {"views": self._views(group["params"])} for group in groups]
        kinds = [[r for r in self.rows if (r.view is None) is flat] for flat in (False, True)]
        return [
            {
                "params": [(r.name, r.parameter) for r in rows],
                "views": [r.view for r in rows],
            }
            for rows in kinds
            if rows
        ]

    def _views(self, parameters: Any) -> list[MatrixView | None]:
        """The views of some parameters, which may be named."""
        known = {row.parameter: row.view for row in self.rows}
        plain = [p[1] if isinstance(p, tuple) else p for p in parameters]
        missing = [tuple(p.shape) for p in plain if p not in known]
        if missing:
            raise ValueError(
                f"Plan.groups was given parameters of shapes {missing}.\n"
                "The plan does not have them.\nMake the plan of the model that owns them."
            )
        return [known[p] for p in plain]

    def __repr__(self) -> str:
        """One line for each parameter, and the totals."""
        head = ["parameter", "role", "method", "blocks", "state bytes", "FLOPs a step"]
        lines = [
            [r.name, r.role.value, r.method, r.blocks, f"{r.bytes:,}", f"{r.flops:,.0f}"]
            for r in self.rows
        ]
        lines.append(["total", "", "", "", f"{self.bytes:,}", f"{self.flops:,.0f}"])
        if any(r.owner is not None for r in self.rows):
            head.append("owner")
            for line, row in zip(lines, self.rows, strict=False):
                line.append("" if row.owner is None else f"{row.owner}")
            lines[-1].append("")
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        text = [
            "  ".join(
                cell.rjust(w) if i > 3 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *lines)
        ]
        return "\n".join(line.rstrip() for line in text)


def planned(
    model: nn.Module,
    method: type[MatrixMethod],
    options: Options,
    *,
    head: Collection[str] | None = None,
    elementwise: Collection[str] = (),
) -> Plan:
    """The plan of a model; see `matrigami.optim.plan`."""
    replicas, whole_model = None, model
    if isinstance(model, DistributedDataParallel):
        model, replicas = model.module, model.process_group
    found = _routed(model, _heads(model) if head is None else head, elementwise)
    rows = []
    for name, (p, route) in found.items():
        view = route.view
        if view is not None:
            view = method.viewed(view, options) if method.takes(route.role) else None
        rows.append(_row(name, p, Route(route.role, view), method, options))
    exchange = exchange_between((r.parameter for r in rows), replicas, method)
    group = {"params": [r.parameter for r in rows], "views": [r.view for r in rows]}
    owners = exchange.owners([{**options, **group}])
    owned = (replace(row, owner=owners.get(row.parameter)) for row in rows)
    return Plan(tuple(owned), method, options, replicas, whole_model)


def _row(name: str, p: Tensor, route: Route, method: type[MatrixMethod], options: Options) -> Row:
    """One parameter with what it costs; the state is measured without allocating it."""
    view = route.view
    stack = (1, p.numel()) if view is None else view.stack
    G = torch.empty(stack, device="meta", dtype=working_dtype(p))
    chosen = Adam if view is None else method
    size = sum(S.nbytes for S in chosen.init(G, options).values())
    work = 12.0 * p.numel()
    if view is not None:
        b, m, n = view.stack
        work = b * method.flops(m, n, options)
    return Row(name, p, route.role, view, chosen.__name__, size, work)


def _routed(
    model: nn.Module, heads: Collection[str], elementwise: Collection[str]
) -> dict[str, tuple[Tensor, Route]]:
    """Each trainable parameter once, with its name and route."""
    _check_names(model, heads, elementwise)
    found: dict[Tensor, tuple[str, Route]] = {}
    for prefix, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        names = {n: f"{prefix}.{n}" if prefix else n for n in own}
        listed = {n for n in own if names[n] in elementwise}
        rule = _rule(module, names) if set(own) - listed else {}
        for n, p in own.items():
            route = Route(Role.LISTED) if n in listed else rule[n]
            if prefix in heads and route.role in {Role.MATRIX, Role.CORE}:
                route = Route(Role.HEAD, route.view)
            name, known = found.get(p, (names[n], route))
            found[p] = (name, _tied(name, known, route))
    return {name: (p, route) for p, (name, route) in found.items()}


def _rule(module: nn.Module, names: dict[str, str]) -> dict[str, Route]:
    """The routes of a module; an error names its parameters as the model does."""
    try:
        return routes(module)
    except ValueError as error:
        text = str(error).replace(str(list(names)), str(list(names.values())))
        raise ValueError(text) from error


def _tied(name: str, first: Route, second: Route) -> Route:
    """The route of a parameter that two modules share."""
    if first.view == second.view:
        return first
    if Role.EMBEDDING in {first.role, second.role} or Role.TIED in {first.role, second.role}:
        return Route(Role.TIED)
    raise ValueError(
        f"A plan was asked for in which two modules share {name}.\n"
        f"One uses it as {first.role.value}, the other as {second.role.value}.\n"
        "List its name in plan(elementwise=...), or untie it."
    )


def _heads(model: nn.Module) -> list[str]:
    """The last linear layer, unless it is all of the model."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | StructuredLinear)]
    return [name for name in layers[-1:] if name]


def _check_names(model: nn.Module, heads: Collection[str], elementwise: Collection[str]) -> None:
    """Raise if a listed name is no module or no parameter."""
    unknown = sorted(set(heads) - {name for name, _ in model.named_modules()})
    unknown += sorted(
        set(elementwise) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    )
    if unknown:
        raise ValueError(
            f"plan(head=..., elementwise=...) names {unknown}.\n"
            "The model has no such modules or parameters.\n"
            "head takes names of layers, elementwise names of parameters."
        )
