"""Watch a model while it trains: second moments at labels that the model itself draws.

A hook on the whole model draws labels for its outputs and pulls their gradients back to the layers,
before the training loss is even computed: one more backward pass, without gradients of parameters,
in the batches in which it is wanted. Nothing changes in the training loop.

Shapes: N = examples, b = blocks, i = inputs and o = outputs of a block.
"""

import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami.curvature._factors import Adding, Factors
from matrigami.curvature._kfoc import fitted
from matrigami.curvature._likelihood import Terms, as_module, drawn_gradients, term_count
from matrigami.curvature._objective import Loss
from matrigami.curvature._passes import SharedInputs, by_block, finite, one_tensor
from matrigami.curvature._record import Record, Site, find_sites, is_observed, pull_back, unwrapped
from matrigami.nn import StructuredLinear
from matrigami.operators import trace


class Sides(NamedTuple):
    """`B (x) A` of one parameter for the last batches; both are means over them."""

    A: Float[Tensor, "b i i"]
    B: Float[Tensor, "b o o"]


class Watch:
    """Hooks on a model that estimate the Kronecker factors of some of its weights.

    Args:
        model: The model; of a data-parallel or sharded one the factors are averaged over all
            processes, each of which has its own data.
        loss: Its loss, which has a known likelihood.
        wanted: The weights. Those of embeddings and norms are not for this.
        labels: How many labels to draw for each output.
        optimal: The nearest Kronecker product to the block (KFOC) instead of K-FAC's.

    Raises:
        ValueError: If the loss is no known likelihood, or a structured layer is sharded.
        TypeError: If a weight belongs to a module without a rule.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        wanted: Collection[Tensor],
        *,
        labels: int = 1,
        optimal: bool = False,
    ) -> None:
        term_count(
            as_module(loss), torch.empty(1, 1)
        )  # refuses a loss without a likelihood at once
        self.model, self.loss = unwrapped(model), as_module(loss)
        self.labels, self.optimal = labels, optimal
        sharded = [hasattr(p, "placements") for p in wanted]  # what a DTensor has
        self.distributed = isinstance(model, DistributedDataParallel) or any(sharded)
        self.sites = find_sites(self.model, joint=False, wanted=wanted)
        if any(sharded):
            _refuse_structured(self.sites)
        self.clock: int | None = None
        self.rejected = self.passes = self.seen = 0
        self._inside, self._records = False, list[Record]()
        self._found: dict[str, tuple[int, Sides]] = {}
        layers = [(site.layer, _Hook(self, Watch.note, site)) for site in self.sites]
        self._handles = [layer.register_forward_hook(hook) for layer, hook in layers]
        self._handles.append(self.model.register_forward_pre_hook(_Hook(self, Watch.begin)))
        self._handles.append(self.model.register_forward_hook(_Hook(self, Watch.end)))

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()

    def open(self, clock: int | None) -> None:
        """Look at the batches from now on, or with None at none; the clock seeds the labels."""
        self.clock, self.passes = clock, 0

    def take(self) -> dict[str, Sides]:
        """The factors since the last call, by parameter name; looks at no more batches."""
        self.clock = None
        found = {name: sides for name, (_, sides) in self._found.items()}
        self._found = {}
        if self.distributed:
            for t in [t for sides in found.values() for t in sides]:
                dist.all_reduce(t)
                t.div_(dist.get_world_size())
        return found

    def begin(self, *_: Any) -> None:
        """Before the forward pass of the model."""
        wanted = self.clock is not None and self.model.training and torch.is_grad_enabled()
        self._records, self._inside = [], wanted and is_observed()

    def note(self, site: Site, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A call of one layer; only those within a forward pass of the whole model count."""
        if self._inside and output.requires_grad:
            self._records.append(Record.of(site, inputs[0], output))

    def end(self, _inputs: Any, outputs: Any) -> None:
        """After the forward pass: draw labels, pull back, and add to the factors."""
        records, self._records, self._inside = self._records, [], False
        if not records or self.clock is None or not one_tensor(outputs).numel():
            return
        _refuse_last_axis(self.loss, outputs, records)
        seed = 1_000_003 * self.clock + self.passes
        self.passes += 1
        self.seen += 1
        if not bool(outputs.isfinite().all()):
            self.rejected += 1
            return
        generator = torch.Generator(outputs.device).manual_seed(seed)
        f = outputs.detach()
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        found = Terms(term_count(self.loss, f))
        drawn = drawn_gradients(self.loss, f, found, self.labels, generator)
        pull_back(outputs, records, (drawn * self.labels**-0.5).to(outputs.dtype))
        self._add(records)

    @torch.no_grad()
    def _add(self, records: list[Record]) -> None:
        """The factors of one batch, unless it holds NaN."""
        blocks = by_block([(r, None) for r in records if r.g is not None], SharedInputs())
        if not all(finite(use) for parts in blocks.values() for use in parts):
            self.rejected += 1
            return
        adding = Adding(None)
        best = fitted([blocks], 1) if self.optimal else {}
        for key, parts in blocks.items():
            known = Factors(parts[0].transposed)
            for use in parts:
                known.add(use, adding)
            sides = _sides(known)
            if key in best:
                sides = _balanced(best[key].factors, sides, transposed=known.transposed)
            self._found[key[0]] = _averaged(self._found.get(key[0]), sides)


def _refuse_structured(sites: list[Site]) -> None:
    """The tensors of a structured layer are whole during its own forward pass only."""
    for site in sites:
        if isinstance(site.layer, StructuredLinear):
            raise ValueError(
                f"a watch was asked for a StructuredLinear, {site.name}, "
                "whose tensors are sharded.\n"
                "Its curvature needs them whole after the forward pass.\n"
                "Use DistributedDataParallel, or another optimiser."
            )


def _sides(known: Factors) -> Sides:
    """The mean over inputs and the sum over gradients."""
    left, right = known.product().factors
    return Sides(
        *((left.dense(), right.dense()) if known.transposed else (right.dense(), left.dense()))
    )


def _balanced(factors: Any, plain: Sides, *, transposed: bool) -> Sides:
    """Optimal factors, scaled so that the mean square of the inputs is the measured one."""
    A, B = factors if transposed else factors[::-1]
    scale = plain.A.diagonal(dim1=-2, dim2=-1).sum(-1) / trace(A).clamp_min(1e-30)
    return Sides(
        A.dense() * scale[:, None, None], B.dense() / scale.clamp_min(1e-30)[:, None, None]
    )


def _averaged(known: tuple[int, Sides] | None, new: Sides) -> tuple[int, Sides]:
    """The mean with one more batch, and how many there are."""
    if known is None:
        return 1, new
    k, old = known[0] + 1, known[1]
    return k, Sides(old.A.lerp(new.A, 1 / k), old.B.lerp(new.B, 1 / k))


def _refuse_last_axis(loss: Loss, outputs: Tensor, records: list[Record]) -> None:
    """Classes are axis 1, as the loss takes them; a model of sequences may have them last."""
    last = getattr(records[-1].site.layer, "out_features", None)
    sequence = isinstance(loss, nn.CrossEntropyLoss) and outputs.ndim > 2
    if sequence and outputs.shape[-1] == last != outputs.shape[1]:
        raise ValueError(
            f"a watch was asked for outputs of shape {tuple(outputs.shape)} and cross-entropy.\n"
            "The classes seem to be the last axis; the loss has them on axis 1.\n"
            "Let the model return its outputs as the loss takes them: transposed, or flattened."
        )


class _Hook:
    """A hook that does not keep the watch alive, and does nothing in a copy of the model."""

    def __init__(self, watch: "Watch | None", method: Any = None, *first: Any) -> None:
        self.watch = (lambda: None) if watch is None else weakref.ref(watch)
        self.method, self.first = method, first

    def __call__(self, _module: nn.Module, *arguments: Any) -> None:
        """Tell the watch, if there still is one."""
        watch = self.watch()
        if watch is not None:
            self.method(watch, *self.first, *arguments)

    def __deepcopy__(self, _memo: Any) -> "_Hook":
        """A copy of the model is not watched."""
        return _Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nor is a saved one."""
        return _Hook, (None,)
