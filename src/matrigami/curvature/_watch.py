"""Watch a model while it trains: second moments at labels that the model itself draws.

A hook on the whole model draws labels for its outputs and pulls their gradients back to the layers,
before the training loss is even computed: one more backward pass, without gradients of parameters,
in the batches in which it is wanted. Nothing changes in the training loop.

Shapes: N = examples, b = blocks, i = inputs and o = outputs of a block.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matrigami.curvature._factors import Adding, Factors
from matrigami.curvature._kfoc import fitted
from matrigami.curvature._likelihood import output_columns, terms
from matrigami.curvature._objective import Loss
from matrigami.curvature._passes import Key, SharedInputs, finite, joined, named_uses
from matrigami.curvature._record import Record, Site, find_sites, pull_back, unwrapped
from matrigami.curvature._uses import Use
from matrigami.operators import trace


class Sides(NamedTuple):
    """`B (x) A` of one parameter for the last batches; both are means over them."""

    A: Float[Tensor, "b i i"]
    B: Float[Tensor, "b o o"]


class Watch:
    """Hooks on a model that estimate the Kronecker factors of some of its weights.

    Args:
        model: The model; a data-parallel wrapper averages over its processes.
        loss: Its loss, which has a known likelihood.
        wanted: The weights. Those of embeddings and norms are not for this.
        labels: How many labels to draw for each output.
        optimal: The nearest Kronecker product to the block (KFOC) instead of K-FAC's.

    Raises:
        ValueError: If the loss is no known likelihood.
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
        terms(loss, torch.empty(1, 1))  # refuses a loss without a likelihood at once
        self.model, self.loss, self.labels, self.optimal = unwrapped(model), loss, labels, optimal
        self.distributed = isinstance(model, DistributedDataParallel)
        self.sites = find_sites(self.model, joint=False, wanted=wanted)
        self.clock: int | None = None
        self.rejected = 0
        self._batches, self._records = 0, list[Record]()
        self._found: dict[str, list[Sides]] = {}
        for site in self.sites:
            site.layer.register_forward_hook(self._hook(site))
        self.model.register_forward_pre_hook(self._begin)
        self.model.register_forward_hook(self._end)

    def open(self, clock: int | None) -> None:
        """Look at the batches from now on, or with None at none; the clock seeds the labels."""
        self.clock, self._batches = clock, 0

    def take(self) -> dict[str, Sides]:
        """The factors since the last call, by parameter name; looks at no more batches."""
        self.clock = None
        found = {name: _mean(parts) for name, parts in self._found.items()}
        self._found = {}
        if self.distributed:
            for t in [t for sides in found.values() for t in sides]:
                dist.all_reduce(t)
                t.div_(dist.get_world_size())
        return found

    def _watching(self) -> bool:
        """Whether this forward pass counts."""
        return self.clock is not None and self.model.training and torch.is_grad_enabled()

    def _begin(self, *_: Any) -> None:
        """Before the forward pass of the model."""
        self._records = []

    def _hook(self, site: Site) -> Any:
        """The hook of one layer."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            """Note a call."""
            if self._watching() and output.requires_grad:
                self._records.append(Record.of(site, inputs[0], output))

        return hook

    def _end(self, _module: nn.Module, _inputs: Any, outputs: Tensor) -> None:
        """After the forward pass: draw labels, pull back, and add to the factors."""
        records, self._records = self._records, []
        if not records or self.clock is None:
            return
        if not bool(outputs.isfinite().all()):
            self.rejected += 1
            return
        seed = 1_000_003 * self.clock + self._batches
        generator = torch.Generator(outputs.device).manual_seed(seed)
        self._batches += 1
        f = outputs.detach()
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        for columns in output_columns(self.loss, f, f, self.labels, generator):
            pull_back(outputs, records, columns.to(outputs.dtype))
        self._add(records)

    @torch.no_grad()
    def _add(self, records: list[Record]) -> None:
        """The factors of one batch, unless it holds NaN."""
        blocks: dict[Key, list[Use]] = {}
        seen = SharedInputs()
        for record in (r for r in records if r.g is not None):
            for key, use in named_uses(record, seen).items():
                blocks.setdefault(key, []).append(use)
        blocks = {key: joined(parts) for key, parts in blocks.items()}
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
            self._found.setdefault(key[0], []).append(sides)


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


def _mean(parts: list[Sides]) -> Sides:
    """Of several batches."""
    A, B = (torch.stack(ts).mean(0) for ts in zip(*parts, strict=True))
    return Sides(A, B)
