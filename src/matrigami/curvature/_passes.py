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

from matrigami.curvature._beside import refuse_other_uses
from matrigami.curvature._blocks import (
    Blocks,
    SharedInputs,
    by_block,
    rows_that_count,
    with_gradients,
)
from matrigami.curvature._examples import (
    Examples,
    Finder,
    Place,
    by_positions,
    by_terms,
)
from matrigami.curvature._factors import total
from matrigami.curvature._likelihood import (
    Terms,
    drawn_gradients,
    empirical_gradient,
    output_root,
    term_axis,
    term_count,
    terms,
)
from matrigami.curvature._objective import Batch, Loss, Objective, objective
from matrigami.curvature._tape import (
    LayerCall,
    TapedLayer,
    find_layers,
    pull_back,
    recording,
    refuse_not_finite,
    unwrapped,
)
from matrigami.nn import OneHot, Use

Labels = int | Literal["exact", "empirical", "examples"]
"""Which labels: those of the model in expectation, so many drawn from it, or those of the data.

`"empirical"` takes the gradient of each term of the loss, such as one position of a sequence;
`"examples"` that of all terms of an example together.
"""


ENTRIES = 2**27
"""Gradients of outputs of layers that are held at once; more columns come in turns."""

KEPT = 2**27
"""Numbers up to which a pass over the data is kept in memory for the next one."""


@dataclass(frozen=True, eq=False)
class Passes:
    """An iterable of `{block: uses}`, one for each batch; every iteration is the same pass again.

    Args:
        objective: Model, loss and batches.
        layers: The layers.
        labels: Which labels.
        seed: Of drawn labels; the same in each pass.
        reduce: Average inputs and sum gradients over shared positions first.
        distributed: Whether each process has its own share of the data.
        finder: Where the examples are; it is asked once for all passes.
        apart: Whether it matters which rows of a layer are of one example: not for sums over all
            rows of gradients at labels that are drawn.
    """

    objective: Objective
    layers: list[TapedLayer]
    labels: Labels
    seed: int
    reduce: bool
    distributed: bool
    apart: bool
    finder: Finder

    def __iter__(self) -> Iterator[Blocks]:
        """Run the model forward and backward over each batch."""
        device = next(self.objective.model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        for i, (inputs, targets, weight) in enumerate(self.objective):
            with recording(self.layers) as calls:
                outputs = one_tensor(self.objective.model(inputs))
            refuse_shapes(self.objective.loss, outputs.detach(), targets)
            if i == 0:
                refuse_other_uses(outputs, calls)
            width = sum(c.x.shape[:-1].numel() * _width(c.layer.module) for c in calls)
            turns = max(1, ENTRIES // max(width, 1))
            f, root = outputs.detach(), weight**0.5
            counted = terms(self.objective.loss, targets)
            drawn = self._drawn(f, root, counted, generator)
            found = self.finder.find(inputs, outputs, calls, drawn) if self.apart else None
            is_pulled = any(call.g is not None for call in calls)
            places = [None] * len(calls) if found is None else found.inputs
            rows = rows_that_count(outputs, calls, places, counted)
            every = self._known(f, root, counted, targets, found) if drawn is None else [drawn]
            for columns in _in_turns(every, turns):
                if not is_pulled:
                    pull_back(outputs, calls, columns)
                self._refuse_unused(calls)
                refuse_not_finite(calls, i)
                seen = with_gradients(calls, places)
                yield by_block(seen, SharedInputs(), rows, reduce=self.reduce)

    def _drawn(
        self, f: Tensor, root: float, counted: Terms, generator: torch.Generator
    ) -> Tensor | None:
        """Output gradients `(k, N, ...)` at labels that are drawn; None: none are."""
        if not isinstance(self.labels, int):
            return None
        drawn = drawn_gradients(self.objective.loss, f, counted, self.labels, generator)
        return root * (drawn * self.labels**-0.5)

    def _known(
        self, f: Tensor, root: float, counted: Terms, targets: Tensor, found: Examples | None
    ) -> Iterator[Tensor]:
        """Output gradients whose outer products sum to a curvature of the loss, by turns."""
        loss = self.objective.loss
        if self.labels == "exact":
            every = output_root(loss, f, counted)
        else:
            g = empirical_gradient(loss, f, targets, counted)
            each = self.labels == "empirical" and self.apart
            every = by_terms(g, term_axis(loss, g.ndim)) if each else iter([g[None]])
        place = Place(len(f)) if found is None else found.outputs
        whole = self.labels == "examples" and place.examples > 1
        for columns in every:
            for some in [columns] if whole else by_positions(columns, place):
                yield root * some

    def _refuse_unused(self, calls: list[LayerCall]) -> None:
        """A layer that is not called, or whose outputs are dropped, has no curvature."""
        called = {id(call.layer) for call in calls if call.g is not None}
        for layer in self.layers:
            if id(layer) not in called:
                raise ValueError(
                    f"curvature: {layer.name} has no part in the outputs.\n"
                    "The model did not call this layer on the way to its outputs "
                    "(fused attention calls none of its own, reentrant checkpoints hide theirs).\n"
                    "Freeze it with requires_grad_(False), use separate layers, or checkpoint with "
                    "use_reentrant=False."
                )


def refuse_shapes(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Let the loss refuse shapes that do not fit; where it would broadcast, refuse it here."""
    if isinstance(loss, nn.MSELoss) and outputs.shape != targets.shape:
        raise ValueError(
            f"curvature: the outputs are {tuple(outputs.shape)}, the targets "
            f"{tuple(targets.shape)}.\nThe loss would compare all of them with all others.\n"
            "Give both one shape: reshape the targets, or end the model with nn.Flatten(0)."
        )
    loss(outputs, targets)


def one_tensor(outputs: Any) -> Tensor:
    """What a model returned.

    Raises:
        TypeError: If it is no tensor.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"curvature: the model returns a {type(outputs).__name__}.\n"
            "It should return one tensor, as the loss takes it.\n"
            "Wrap the model in a module that returns its logits."
        )
    return outputs


class Repeated:
    """Passes whose uses are kept in memory after the first one, if they are few enough."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.kept: list[Blocks] | None = None

    def load(self) -> list[Blocks]:
        """Run the first pass; what was kept of it, which is nothing if it was too much."""
        for _ in self:
            pass
        return self.kept or []

    def __iter__(self) -> Iterator[Blocks]:
        """One pass."""
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Blocks] = []
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
    apart: bool = True


def passes(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch, setting: Setting) -> Passes:
    """Check a model, a loss and data, and hold them together.

    Raises:
        ValueError: If nothing is trainable, the data are empty or hold NaN, the loss has no known
            likelihood, or the labels are of no known kind.
        TypeError: If a trainable parameter belongs to a module without a rule.
    """
    refuse_labels("", setting.labels)
    inner, distributed = unwrapped(model), isinstance(model, DistributedDataParallel)
    target = objective(inner, loss, data)
    target = among_all_processes(target) if distributed else target
    term_count(target.loss, torch.empty(1, 1))  # refuses a loss without a likelihood at once
    return Passes(
        target,
        find_layers(inner, joint=setting.joint),
        setting.labels,
        setting.seed,
        setting.reduce,
        distributed,
        setting.apart or setting.reduce or setting.labels == "exact",
        Finder(alone=isinstance(setting.labels, int)),
    )


def refuse_labels(name: str, labels: Any) -> None:
    """Raise unless labels are of a known kind."""
    known = labels in ("exact", "empirical", "examples")
    if not known and (not isinstance(labels, int) or labels < 1):
        raise ValueError(
            f"{name}labels={labels!r}: there are no such labels.\n"
            "labels is 'exact', 'empirical', 'examples' or a number of samples of at least 1."
        )


def among_all_processes(target: Objective) -> Objective:
    """The same batches with their weights among those of all processes."""
    every = total(target.total, next(target.model.parameters()).device)
    return replace(target, total=every)


def _width(layer: nn.Module) -> int:
    """Output features of a layer, roughly, for a bound on memory."""
    sizes = (getattr(layer, name, None) for name in ("out_features", "out_channels"))
    return next((s for s in sizes if isinstance(s, int)), 1)


def _in_turns(columns: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Columns `(k, N, ...)`, no more than so many at a time."""
    for many in columns:
        yield from many.split(size)


def _numbers(use: Use) -> int:
    """Numbers that a use holds."""
    inputs = use.inputs.indices if isinstance(use.inputs, OneHot) else use.inputs
    return inputs.numel() + (0 if use.gradients is None else use.gradients.numel())
