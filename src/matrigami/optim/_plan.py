"""Which method each parameter of a model takes, what it costs, and the groups that say so to torch.

A plan is printed before training: nothing about it is a surprise in the run.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami._words import columns
from matrigami.curvature import Capture, Moments
from matrigami.nn import Part, Parts, Role, Rule, Whole, anatomy, parts, spectral_rule
from matrigami.operators import BlockView, Fan
from matrigami.optim._adam import Adam
from matrigami.optim._method import MatrixMethod, Options
from matrigami.optim._spectral_condition import SpectralCondition, spectral_condition
from matrigami.optim.distributed import exchange_between, working_dtype


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
        whole: The dense matrix that it is a factor of.
        spectral: Whether a spectral step pays, if it is known what the layer has seen.
    """

    name: str
    parameter: Tensor = field(repr=False)
    role: Role
    view: BlockView | None
    method: str
    bytes: int
    flops: float
    owner: int | None = None
    whole: Whole | None = field(default=None, repr=False)
    spectral: SpectralCondition | None = None

    @property
    def blocks(self) -> str:
        """Shape of the stack, or of the parameter."""
        if self.view is None:
            return "x".join(map(str, self.parameter.shape)) or "1"
        b, m, n = self.view.stack
        return f"{b} of {m}x{n}"

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Name, role, method and blocks."""
        return self.name, self.role.value, self.method, self.blocks


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
        rules = {row.name: rule for row in self.rows if row.view is not None}
        if self.options.get("bound"):
            wholes = ((row.name, row.whole) for row in self.rows)
            rules |= {name: _as_one(rule, w) for name, w in wholes if w and w.product is not None}
        return rules

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
            return [self._equipped(group) for group in groups]
        named: tuple[list[Any], list[Any]] = ([], [])
        for row in self.rows:
            named[row.view is None].append((row.name, row.parameter))
        return [self._equipped({"params": params}) for params in named if params]

    def _equipped(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with the views of its parameters, which may be named."""
        known = {row.parameter: row for row in self.rows}
        plain = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if missing := [tuple(p.shape) for p in plain if p not in known]:
            raise ValueError(
                f"Plan.groups(groups): parameters of shapes {missing} are not in the plan.\n"
                "Make the plan of the model that owns them."
            )
        return group | views_of([known[p] for p in plain])

    def __repr__(self) -> str:
        """One line for each parameter, the totals, and the learning rate to start with."""
        table = [
            ["parameter", "role", "method", "blocks", "state bytes", "FLOPs a step"],
            *([*r.words, f"{r.bytes:,}", f"{r.flops:,.0f}"] for r in self.rows),
            ["total", "", "", "", f"{self.bytes:,}", f"{self.flops:,.0f}"],
        ]
        for head, what in (("owner", "owner"), ("spectral step pays", "spectral")):
            found = [getattr(r, what) for r in self.rows]
            if any(cell is not None for cell in found):
                cells = [head, *("" if cell is None else str(cell) for cell in found), ""]
                table = [[*line, cell] for line, cell in zip(table, cells, strict=True)]
        start = self.method.starting_rate()
        last = [] if start is None else [f"start with lr={start:g}"]
        return "\n".join([*columns(table, [False] * 4 + [True] * 4), *last])


def views_of(rows: Sequence[Row]) -> dict[str, Any]:
    """How parameters are stacks of matrices, and factors, as a group has it."""
    return {"views": [r.view for r in rows], "wholes": [r.whole for r in rows]}


def planned(
    model: nn.Module,
    method: type[MatrixMethod],
    options: Options,
    *,
    head: Collection[str] | None = None,
    elementwise: Collection[str] = (),
    moments: Capture | Mapping[str, Moments] | None = None,
) -> Plan:
    """The plan of a model; see `matrigami.optim.plan`."""
    replicas, whole_model = None, model
    if isinstance(model, DistributedDataParallel):
        model, replicas = model.module, model.process_group
    rows = [
        _row(name, p, part, _view(part, method, options), method, options)
        for name, (p, part) in _routed(model, head, elementwise).items()
    ]
    if moments is not None:
        rows = [replace(row, spectral=_condition(row, moments)) for row in rows]
    exchange = exchange_between((r.parameter for r in rows), replicas, method)
    group = {"params": [r.parameter for r in rows], **views_of(rows)}
    owners = exchange.owners([{**options, **group}])
    owned = (replace(row, owner=owners.get(row.parameter)) for row in rows)
    return Plan(tuple(owned), method, options, replicas, whole_model)


def _condition(row: Row, moments: Capture | Mapping[str, Moments]) -> SpectralCondition | None:
    """Of a matrix that has a gradient and whose inputs were seen."""
    G = row.parameter.grad
    if row.view is None or G is None or row.name not in moments:
        return None
    return spectral_condition(row.view.split(G), moments[row.name].inputs.dense())


def _view(part: Part, method: type[MatrixMethod], options: Options) -> BlockView | None:
    """The stack of matrices that a method takes; None: the parameter takes Adam."""
    if part.blocks is None or not method.takes(part):
        return None
    return method.viewed(part.blocks, options)


def _row(
    name: str,
    p: Tensor,
    part: Part,
    view: BlockView | None,
    method: type[MatrixMethod],
    options: Options,
) -> Row:
    """One parameter with what it costs; the state is measured without allocating it."""
    stack = (1, p.numel()) if view is None else view.stack
    G = torch.empty(stack, device="meta", dtype=working_dtype(p))
    chosen = Adam if view is None else method
    size = sum(S.nbytes for S in chosen.init(G, options).values())
    work = 12.0 * p.numel()
    if view is not None:
        b, m, n = view.stack
        work = b * method.flops(m, n, options)
    return Row(name, p, part.role, view, chosen.__name__, size, work, whole=part.whole)


def _as_one(rule: Rule, whole: Whole) -> Rule:
    """The rule of a matrix that moves as one, whatever its factors are."""
    fan = Fan(whole.inputs, whole.outputs)
    return lambda _fan, inputs, outputs, _factors: rule(fan, inputs, outputs, 1)


def _routed(
    model: nn.Module, head: Collection[str] | None, elementwise: Collection[str]
) -> dict[str, tuple[Tensor, Part]]:
    """Each trainable parameter once, with its name and part."""
    _check_names(model, head or (), elementwise)
    heads = _last_layer(model) if head is None else head
    entries = anatomy(model, "plan", elementwise=elementwise)
    found: dict[Tensor, tuple[str, Part]] = {}
    for entry in (entry for entry in entries if entry.parameter.requires_grad):
        part = _headed(entry.part) if entry.layer in heads else entry.part
        name, first = found.get(entry.parameter, (entry.name, part))
        found[entry.parameter] = (name, _tied(name, first, part))
    return {name: (p, part) for p, (name, part) in found.items()}


def _headed(part: Part) -> Part:
    """The part of a layer that makes the outputs."""
    return replace(part, role=Role.HEAD) if part.role in {Role.MATRIX, Role.CORE} else part


def _tied(name: str, first: Part, second: Part) -> Part:
    """The part of a parameter that two modules share."""
    if first.blocks == second.blocks:
        return first if second.is_seen else second
    if {Role.EMBEDDING, Role.TIED} & {first.role, second.role}:
        return Part(Role.TIED)
    raise ValueError(
        f"plan(model): two modules share {name}.\n"
        f"One uses it as {first.role.value}, the other as {second.role.value}.\n"
        "List its name in plan(elementwise=...), or untie it."
    )


def _last_layer(model: nn.Module) -> list[str]:
    """The last layer with one weight, or with cores, unless it is all of the model."""
    layers = [name for name, module in model.named_modules() if _is_linear(parts(module))]
    return [name for name in layers[-1:] if name]


def _is_linear(found: Parts) -> bool:
    """Whether a layer has one weight, parametrised or not, or cores."""
    weights = {"weight"} | {name for name in found if name.startswith("parametrizations.weight.")}
    return any(
        part.role is Role.CORE or (part.role is Role.MATRIX and name in weights)
        for name, part in found.items()
    )


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
