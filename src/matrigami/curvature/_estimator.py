"""The Fisher matrix of a model while it trains: second moments at labels that it draws itself.

When the loss is called, labels are drawn for the outputs that it is given, and their gradients are
pulled back to the layers: one more backward pass, without gradients of parameters, in the batches
in which it is wanted. The targets tell which positions count. Where another loss is called, this
happens as the backward pass of training reaches the outputs (or after the forward pass, where
weights are sharded), and all positions count. Only what is
differentiated enters. Nothing changes in the training loop.

Shapes: N = examples, b = blocks, i = inputs and o = outputs of a block.
"""

import itertools
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature._blocks import (
    SharedInputs,
    are_finite,
    by_block,
    rows_that_count,
    with_gradients,
)
from matrigami.curvature._factors import Factors, SecondMoments
from matrigami.curvature._kfoc import fitted
from matrigami.curvature._likelihood import (
    Terms,
    as_module,
    drawn_gradients,
    sampled_labels,
    term_count,
    terms,
)
from matrigami.curvature._objective import Loss, sums
from matrigami.curvature._tape import (
    Hook,
    LayerCall,
    TapedLayer,
    is_observed,
    pull_back,
)
from matrigami.curvature._watch import ModelWatch
from matrigami.nn import StructuredLinear, StructuredMoE
from matrigami.operators import trace

WAITING = 16
"""Forward passes that may wait for their loss; an older one is not looked at any more."""

WEIGHTS = ("weight", "pos_weight")
"""Options of losses by which terms have weights of their own."""


class FactorPair(NamedTuple):
    """`B (x) A` of one parameter for the last batches; both are means over them."""

    A: Float[Tensor, "b i i"]
    B: Float[Tensor, "b o o"]


@dataclass(eq=False)
class Forward:
    """A forward pass that waits for its loss, or for its backward pass.

    Args:
        outputs: What the model gave, if that is a tensor.
        calls: The calls of its layers.
    """

    outputs: Tensor | None
    calls: list[LayerCall]

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient came back to one of the calls."""
        return any(call.g is not None for call in self.calls)


class Running(NamedTuple):
    """The factors of one weight, and how much was averaged in them."""

    pair: FactorPair
    rows: float
    terms: float


class FisherEstimator(ModelWatch):
    """Estimates the Kronecker factors of some weights of a model, in the passes of a training loop.

    Args:
        model: The model.
        loss: Its loss, which has a known likelihood. Of a module whose call is a part of the
            training loop the targets are seen, too.
        wanted: The weights.
        labels: How many labels to draw for each output.
        optimal: The nearest Kronecker product to the block (KFOC) instead of K-FAC's.

    Raises:
        ValueError: If the loss is no known likelihood, or a structured layer is sharded.
        TypeError: If a weight belongs to a module without a rule.
    """

    sides = ("A", "B")

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        wanted: Collection[Tensor],
        *,
        labels: int = 1,
        optimal: bool = False,
    ) -> None:
        self.loss = as_module(loss)
        term_count(self.loss, torch.empty(1, 1))  # refuses a loss without a likelihood at once
        self.labels, self.optimal, self.passes = labels, optimal, 0
        self._waiting: list[Forward] = []
        self._found: dict[str, Running] = {}
        super().__init__(model, wanted)
        if isinstance(loss, nn.Module):
            hook = Hook(self._before_loss)
            self.hold(loss.register_forward_pre_hook(hook, with_kwargs=True))

    def check(self, layers: list[TapedLayer]) -> None:
        """The tensors of a structured layer that is sharded are whole too briefly."""
        if any(hasattr(p, "placements") for layer in layers for p in layer.module.parameters()):
            _refuse_structured(layers)

    def start(self, clock: int) -> None:
        """Look at the batches from now on; the clock seeds the labels."""
        super().start(clock)
        self.passes = 0

    def stop(self) -> None:
        """Look at no more batches."""
        super().stop()
        self.passes = 0

    def forget(self) -> None:
        """Drop what was seen since the last call of `take`: its gradients are dropped, too."""
        self._found = {}

    def take(self) -> dict[str, FactorPair]:
        """The factors since the last call, by parameter name; see `ModelWatch`."""
        return {name: FactorPair(*pair) for name, pair in super().take().items()}

    def collected(self) -> dict[str, FactorPair]:
        """The factors of this process; forward passes that wait are not looked at any more."""
        self._waiting = []
        return {name: known.pair for name, known in self._found.items()}

    def note(self, call: LayerCall, output: Tensor) -> None:
        """Keep a call that can be differentiated; of others remember which they were."""
        if output.requires_grad:
            call.keep_edge(output)
            self._within.calls.append(call)
        elif not torch.is_grad_enabled():  # in a reentrant checkpoint, or to no purpose
            self._hidden.add(call.layer.name)

    def _on_call(
        self, layer: TapedLayer, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Refuse a hidden call that is made again: its gradient comes too late for other labels."""
        again = torch._C._current_graph_task_id() >= 0
        if again and layer.name in self._hidden and output.requires_grad and is_observed():
            raise ValueError(
                f"KFAC(model): {layer.name} is inside of a reentrant checkpoint.\n"
                "Nothing is seen of such a layer when labels are drawn.\n"
                "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        super()._on_call(layer, module, args, kwargs, output)

    def passed(self, calls: list[LayerCall], outputs: Any) -> None:
        """After the forward pass: wait for the loss, or for the gradients of the outputs."""
        passed = Forward(outputs if isinstance(outputs, Tensor) else None, calls)
        if passed.outputs is None or not passed.outputs.requires_grad:
            self._wait(passed)
        elif self.sharded:  # weights are whole now, and not any more at the loss
            passed.outputs.register_hook(Hook(self._commit, self._without_targets(passed)))
        else:
            self._wait(passed)  # the graph must not hold its own outputs
            passed.outputs.register_hook(Hook(self._without_loss, weakref.ref(passed)))

    def _wait(self, passed: Forward) -> None:
        """Keep a forward pass until its loss is called or differentiated, if not too many wait."""
        self._waiting = [*self._waiting[1 - WAITING :], passed]

    def _before_loss(self, _loss: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Before the loss: its outputs and targets."""
        given = [*args, *kwargs.values()] if args else [kwargs.get("input"), kwargs.get("target")]
        if len(given) < 2 or not is_observed() or not torch.is_grad_enabled():
            return
        outputs, targets = given[:2]
        if isinstance(outputs, Tensor) and outputs.requires_grad and self._waiting:
            found = self._estimate(outputs, terms(self.loss, targets), self._waiting)
            outputs.register_hook(Hook(self._commit, found))

    def _without_loss(self, forward: "weakref.ref[Forward]", _gradient: Tensor) -> None:
        """Gradients of outputs arrive that no known loss was called with."""
        passed, own = forward(), getattr(self._within, "pulling", False)
        if passed is not None and not own and passed in self._waiting:
            self._commit(self._without_targets(passed))

    def _without_targets(self, passed: Forward) -> dict[str, Running]:
        """The factors of a forward pass, all of whose outputs count."""
        outputs: Any = passed.outputs
        _refuse_last_axis(self.loss, outputs, passed.calls)
        with torch.enable_grad():
            return self._estimate(outputs, self._all_terms(outputs.detach()), [passed])

    def _commit(self, found: dict[str, Running], *_: Any) -> None:
        """The backward pass of training has begun: the factors of its batch count, once."""
        self._ever |= found.keys()
        for name, new in found.items():
            self._found[name] = self._averaged(self._found.get(name), new)
        found.clear()

    def _all_terms(self, outputs: Tensor) -> Terms:
        """The terms of a loss whose targets are not known: those of labels that are drawn."""
        weighted = any(getattr(self.loss, name, None) is not None for name in WEIGHTS)
        if not weighted:
            return Terms(term_count(self.loss, outputs))
        generator = torch.Generator(outputs.device).manual_seed(self._seed() + 1)
        return terms(self.loss, sampled_labels(self.loss, outputs, generator))

    def _seed(self) -> int:
        """Of the labels of this pass."""
        return 1_000_003 * (self.clock or 0) + self.passes

    def _estimate(
        self, outputs: Tensor, counted: Terms, passes: list[Forward]
    ) -> dict[str, Running]:
        """The factors of those forward passes that some outputs come from."""
        calls = list(itertools.chain.from_iterable(passed.calls for passed in passes))
        f = outputs.detach()
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        generator = torch.Generator(outputs.device).manual_seed(self._seed())
        if not outputs.numel() or not counted.divisor or not bool(f.isfinite().all()):
            self._reject(outputs, passes)
            return {}
        places = [None] * len(calls)
        drawn = drawn_gradients(self.loss, f, counted, self.labels, generator)
        with self._pulling():
            rows = rows_that_count(outputs, calls, places, counted)
            pull_back(outputs, calls, (drawn * self.labels**-0.5).to(outputs.dtype))
        used = [p for p in passes if p.has_gradients]
        if not used:
            return {}
        self.check_uses(outputs, calls)
        self._waiting = [p for p in self._waiting if p not in used]
        self.passes += 1
        return self._factors(with_gradients(calls, places), rows, counted)

    @contextmanager
    def _pulling(self) -> Iterator[None]:
        """While the gradients at drawn labels are pulled back: they are not those of training."""
        self._within.pulling = True
        try:
            yield
        finally:
            self._within.pulling = False

    def _reject(self, outputs: Tensor, passes: list[Forward]) -> None:
        """Leave out outputs that are not finite, or empty, or none of which counts."""
        self.passes += 1
        self.rejected += outputs.numel() > 0
        self._waiting = [p for p in self._waiting if p not in passes]

    @torch.no_grad()
    def _factors(self, calls: Any, rows: Any, counted: Terms) -> dict[str, Running]:
        """The factors of one batch, unless it holds NaN; experts without tokens are seen, too."""
        self._ever |= {n for c, _ in calls if not c.x.numel() for n in c.layer.names.values()}
        blocks = by_block(calls, SharedInputs(), rows)
        if not are_finite(blocks):
            self.rejected += 1
            return {}
        moments, made = SecondMoments(), {}
        moments.add(blocks)
        best = fitted([blocks], 1) if self.optimal else {}
        for key in moments:
            known = moments[key][0]  # a matrix is used in one way, or it takes Adam
            if not known.rows:
                continue
            pair = _pair(known)
            if key in best:
                pair = _balanced(best[key].factors, pair, transposed=known.transposed)
            made[key[0]] = Running(pair, known.rows, counted.divisor)
        return made

    def _averaged(self, old: Running | None, new: Running) -> Running:
        """The mean over inputs, and over terms; of a loss that sums, the sum over terms."""
        if old is None:
            return new
        rows, number = old.rows + new.rows, old.terms + new.terms
        A = old.pair.A.lerp(new.pair.A, new.rows / rows)
        if sums(self.loss):
            return Running(FactorPair(A, old.pair.B + new.pair.B), rows, number)
        return Running(FactorPair(A, old.pair.B.lerp(new.pair.B, new.terms / number)), rows, number)


def _refuse_structured(layers: list[TapedLayer]) -> None:
    """The tensors of a structured layer are whole during its own forward pass only."""
    for layer in layers:
        if isinstance(layer.module, StructuredLinear | StructuredMoE):
            raise ValueError(
                f"KFAC(model): the tensors of {layer.name}, a {type(layer.module).__name__}, "
                "are sharded.\n"
                "Its curvature needs them whole after the forward pass.\n"
                "Use DistributedDataParallel, or another optimiser."
            )


def _pair(known: Factors) -> FactorPair:
    """The mean over inputs and the sum over gradients."""
    left, right = known.product().factors
    return FactorPair(
        *((left.dense(), right.dense()) if known.transposed else (right.dense(), left.dense()))
    )


def _balanced(factors: Any, plain: FactorPair, *, transposed: bool) -> FactorPair:
    """Optimal factors, scaled so that the mean square of the inputs is the measured one."""
    A, B = factors if transposed else factors[::-1]
    scale = plain.A.diagonal(dim1=-2, dim2=-1).sum(-1) / trace(A).clamp_min(1e-30)
    return FactorPair(
        A.dense() * scale[:, None, None], B.dense() / scale.clamp_min(1e-30)[:, None, None]
    )


def _refuse_last_axis(loss: Loss, outputs: Tensor, calls: list[LayerCall]) -> None:
    """Classes are axis 1, as the loss takes them; a model of sequences may have them last."""
    last = getattr(calls[-1].layer.module, "out_features", None)
    sequence = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and outputs.ndim > 2
    if sequence and outputs.shape[-1] == last != outputs.shape[1]:
        raise ValueError(
            f"KFAC(model, loss): the outputs are {tuple(outputs.shape)}, the loss cross-entropy.\n"
            "The classes seem to be the last axis; the loss has them on axis 1.\n"
            "Let the model return its outputs as the loss takes them: transposed, or flattened."
        )
