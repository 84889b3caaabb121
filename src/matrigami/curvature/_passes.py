"""Passes over the data that tell, batch by batch, what every block of parameters saw.

The gradients are those of pseudo-losses whose outer products sum to the curvature of the loss in
the outputs, so that each block of the Gauss-Newton or Fisher matrix is `sum vec(dW) vec(dW).T`.

Shapes: N = examples of a batch, K = columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami.curvature._factors import total
from matrigami.curvature._likelihood import output_columns, terms
from matrigami.curvature._objective import Batch, Loss, Objective, objective
from matrigami.curvature._record import Record, Site, find_sites, pull_back, recording, unwrapped
from matrigami.curvature._uses import OneHot, Use, uses
from matrigami.nn import runs_as

Labels = int | Literal["exact", "empirical"]
"""Which labels: those of the model in expectation, so many drawn from it, or those of the data."""

Key = tuple[str, ...]
"""A block: the names of its parameters in the model."""

ENTRIES = 2**27
"""Gradients of outputs of layers that are held at once; more columns come in turns."""

KEPT = 2**27
"""Numbers up to which a pass over the data is kept in memory for the next one."""


@dataclass(frozen=True, eq=False)
class Passes:
    """An iterable of `{block: uses}`, one for each batch; every iteration is the same pass again.

    Args:
        objective: Model, loss and batches.
        sites: The layers.
        labels: Which labels.
        seed: Of drawn labels; the same in each pass.
        reduce: Average inputs and sum gradients over shared positions first.
        distributed: Whether each process has its own share of the data.
    """

    objective: Objective
    sites: list[Site]
    labels: Labels
    seed: int
    reduce: bool
    distributed: bool

    def __iter__(self) -> Iterator[dict[Key, list[Use]]]:
        """Run the model forward and backward over each batch."""
        device = next(self.objective.model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        for i, (inputs, targets) in enumerate(self.objective.batches):
            weight = self.objective.weights[i] ** 0.5
            with torch.enable_grad(), recording(self.sites) as records:
                outputs = one_tensor(self.objective.model(inputs))
            self._refuse_targets(outputs.detach(), targets)
            self._refuse_unused(records)
            width = sum(r.x[..., 0].numel() * _width(r.site.layer) for r in records)
            turns = max(1, ENTRIES // max(width, 1))
            every = output_columns(
                self.objective.loss, outputs.detach(), targets, self.labels, generator
            )
            for columns in _in_turns(every, turns):
                pull_back(outputs, records, weight * columns)
                yield self._blocks(records, i)

    def _blocks(self, records: list[Record], batch: int) -> dict[Key, list[Use]]:
        """The uses of each block; one input that several layers read stays one tensor."""
        _refuse_nan(records, batch)
        return by_block([r for r in records if r.g is not None], SharedInputs(), reduce=self.reduce)

    def _refuse_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Let the loss refuse shapes that do not fit; labels that it ignores are not known here."""
        self.objective.loss(outputs, targets)
        ignored = getattr(self.objective.loss, "ignore_index", None)
        if ignored is not None and bool((targets == ignored).any()):
            raise ValueError(
                f"curvature was asked for targets that hold ignore_index, {ignored}.\n"
                "Those positions would count like all others.\n"
                "Leave them out of the data: flatten the outputs and keep the labelled ones."
            )

    def _refuse_unused(self, records: list[Record]) -> None:
        """A layer that is not called has no curvature."""
        called = {id(record.site) for record in records if record.edge is not None}
        for site in self.sites:
            if id(site) not in called:
                raise ValueError(
                    f"curvature was asked for the parameters of {site.name}.\n"
                    "The model did not call this layer on the way to its outputs "
                    "(fused attention calls none of its own).\n"
                    "Freeze it with requires_grad_(False), or use separate layers."
                )


def one_tensor(outputs: Any) -> Tensor:
    """What a model returned.

    Raises:
        TypeError: If it is no tensor.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"curvature was asked of a model that returns a {type(outputs).__name__}.\n"
            "It should return one tensor, as the loss takes it.\n"
            "Wrap the model in a module that returns its logits."
        )
    return outputs


class Repeated:
    """Passes whose uses are kept in memory after the first one, if they are few enough."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.kept: list[dict[Key, list[Use]]] | None = None

    def load(self) -> list[dict[Key, list[Use]]]:
        """Run the first pass; what was kept of it, which is nothing if it was too much."""
        for _ in self:
            pass
        return self.kept or []

    def __iter__(self) -> Iterator[dict[Key, list[Use]]]:
        """One pass."""
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[dict[Key, list[Use]]] = []
        room = KEPT
        for found in self.passes:
            yield found
            room -= sum(_numbers(use) for parts in found.values() for use in parts)
            kept = [*kept, found] if room > 0 else []
        self.kept = kept if room > 0 else None


class Setting(NamedTuple):
    """How to look at the data: the options that K-FAC, EKFAC and KFOC share."""

    labels: Labels
    joint: bool
    reduce: bool
    seed: int


def passes(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch, setting: Setting) -> Passes:
    """Check a model, a loss and data, and hold them together.

    Raises:
        ValueError: If nothing is trainable, the data are empty or hold NaN, the loss has no known
            likelihood, or the labels are of no known kind.
        TypeError: If a trainable parameter belongs to a module without a rule.
    """
    if setting.labels not in ("exact", "empirical") and (
        not isinstance(setting.labels, int) or setting.labels < 1
    ):
        raise ValueError(
            f"labels={setting.labels!r} was asked for.\n"
            "labels is 'exact', 'empirical' or a number of samples of at least 1."
        )
    inner, distributed = unwrapped(model), isinstance(model, DistributedDataParallel)
    target = objective(inner, loss, data)
    target = among_all_processes(target) if distributed else target
    with torch.no_grad():
        terms(loss, torch.empty(1, 1))  # refuses a loss without a likelihood at once
    return Passes(
        target,
        find_sites(inner, joint=setting.joint),
        setting.labels,
        setting.seed,
        setting.reduce,
        distributed,
    )


def among_all_processes(target: Objective) -> Objective:
    """The same batches with their weights among those of all processes."""
    if getattr(target.loss, "reduction", "mean") == "sum":
        return target
    own = sum(len(targets) for _, targets in target.batches)
    every = total(own, next(target.model.parameters()).device)
    return replace(target, weights=tuple(weight * own / every for weight in target.weights))


class SharedInputs:
    """The inputs that linear layers of one batch have in common, each made once."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], tuple[Tensor, Use]] = {}

    def shared(self, record: Record, place: int, parts: int, use: Use) -> Use:
        """The use with the inputs of an earlier layer that read the same tensor."""
        if not runs_as(record.site.layer, nn.Linear):
            return use
        x = record.x  # held below, so that its memory is not given to another tensor
        source = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), place, parts)
        return use._replace(inputs=self.known.setdefault(source, (x, use))[1].inputs)


def named_uses(record: Record, seen: SharedInputs) -> dict[Key, Use]:
    """The uses of one call, by the model's names of the parameters, without frozen ones."""
    site = record.site
    x, g = (
        t.to(torch.promote_types(t.dtype, torch.float32))
        if t is not None and t.is_floating_point()
        else t
        for t in (record.x, record.g)
    )
    with torch.no_grad(), torch.autocast(record.x.device.type, enabled=False):
        found = uses(site.layer, x, g, site.joint)  # pyright: ignore[reportArgumentType]
    named = {}
    for i, (keys, use) in enumerate(found.items()):
        free = [key for key in keys if key in site.names]
        if free and len(free) < len(keys):
            raise TypeError(
                f"curvature was asked for {site.name} with {', '.join(free)} trainable alone.\n"
                f"{', '.join(keys)} share one block.\nTrain or freeze them together."
            )
        if free:
            named[tuple(site.names[key] for key in keys)] = seen.shared(record, i, len(keys), use)
    return named


def by_block(
    records: list[Record], seen: SharedInputs, *, reduce: bool = False
) -> dict[Key, list[Use]]:
    """The uses of each block in some calls; those alike as one."""
    found: dict[Key, list[Use]] = {}
    for record in records:
        for key, use in named_uses(record, seen).items():
            found.setdefault(key, []).append(_reduced(use) if reduce else use)
    return {key: joined(parts) for key, parts in found.items()}


def joined(parts: list[Use]) -> list[Use]:
    """Uses of one block in one batch: those alike become further shared positions."""
    first, *rest = parts
    alike = all(
        isinstance(use.inputs, Tensor)
        and isinstance(first.inputs, Tensor)
        and use.transposed == first.transposed
        and use.inputs.shape[:2] == first.inputs.shape[:2]
        for use in rest
    )
    if not rest or not alike:
        return parts
    inputs = torch.cat([use.inputs for use in parts], 2)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if first.gradients is None:
        return [first._replace(inputs=inputs)]
    gradients = torch.cat([use.gradients for use in parts], 3)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return [Use(inputs, gradients, first.transposed)]


def _reduced(use: Use) -> Use:
    """One position: the mean of the inputs, the sum of the gradients."""
    if isinstance(use.inputs, OneHot) or use.gradients is None:
        return use
    inputs, gradients = use.inputs.mean(2, keepdim=True), use.gradients.sum(3, keepdim=True)
    return use._replace(inputs=inputs, gradients=gradients)


def _width(layer: nn.Module) -> int:
    """Output features of a layer, roughly, for a bound on memory."""
    sizes = (getattr(layer, name, None) for name in ("out_features", "out_channels"))
    return next((s for s in sizes if isinstance(s, int)), 1)


def _in_turns(columns: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Columns `(k, N, ...)`, no more than so many at a time."""
    for many in columns:
        yield from many.split(size)


def _numbers(use: Use) -> int:
    """Numbers that a use holds."""
    inputs = use.inputs.indices if isinstance(use.inputs, OneHot) else use.inputs
    return inputs.numel() + (0 if use.gradients is None else use.gradients.numel())


def finite(use: Use) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(_finite(t) for t in (use.inputs, use.gradients) if isinstance(t, Tensor))


def _finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite: then neither is the sum, which takes one pass."""
    return bool(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite())


def _refuse_nan(records: list[Record], batch: int) -> None:
    """Refuse what is not finite before it reaches a factor, where it arises first."""
    seen = [(record, record.x, "activations") for record in records]
    seen += [(record, record.g, "gradients") for record in reversed(records)]
    for record, t, what in seen:
        if t is not None and not _finite(t):
            layer = record.site.name or type(record.site.layer).__name__
            raise ValueError(
                f"curvature was asked for a batch (number {batch}) whose {what} at the layer "
                f"{layer} are NaN or infinite.\n"
                "Nothing was added to any factor.\nLook for a layer beside it that overflows."
            )
