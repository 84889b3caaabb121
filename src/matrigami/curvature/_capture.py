"""What layers see while any loop trains: second moments of inputs and of output gradients.

The moment of inputs is K-FAC's factor `A`, the `H` of GPTQ and SparseGPT, and the metric in which a
dense weight is best projected onto a structure. Open a capture around forward passes and, for the
gradients, backward passes of any training loop.

Shapes: b = blocks, N = examples, i = inputs, o = outputs of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matrigami.curvature._beside import refuse_other_uses
from matrigami.curvature._blocks import Key, SharedInputs, are_finite, by_block, of_mask
from matrigami.curvature._factors import MomentCache, SecondMoments, total
from matrigami.curvature._kfac import assembled
from matrigami.curvature._likelihood import as_module, term_count, terms
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._objective import Loss, sums
from matrigami.curvature._tape import (
    Hook,
    LayerCall,
    Tape,
    TapedLayer,
    find_layers,
    is_observed,
    unwrapped,
)
from matrigami.nn import Use
from matrigami.operators import LinearOperator, operator, scale as scaled


class Moments(NamedTuple):
    """What one block of parameters saw.

    Args:
        inputs: The mean of `a a.T`, a stack `(b, i, i)`.
        gradients: The mean over examples of `g g.T`, a stack `(b, o, o)`; None without backward.
        rows: Number of inputs in the mean.
        examples: Number of examples.
    """

    inputs: LinearOperator
    gradients: LinearOperator | None
    rows: int
    examples: int


class Capture(Tape):
    """Second moments of the layers of a model, gathered while the context is open.

    A context manager, and a mapping from parameter names to `Moments`. `capture` makes one.

    Args:
        model: The model.
        loss: The loss of its backward passes, if it does not average over examples.
        joint: Whether a bias is one more input of its weight.
        dtype: Type of the sums.
        scale: The factor by which gradients are too large, such as `scaler.get_scale`.

    Attributes:
        mask: Which positions `(N, S)` of the next forward passes count, such as an attention mask;
            None: all. It applies to layers that see so many positions; tables see tokens.
        rejected: How many batches of a layer held NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        joint: bool,
        dtype: torch.dtype | None,
        scale: Callable[[], float] | None,
    ) -> None:
        super().__init__()
        self.model, self.loss = unwrapped(model), as_module(loss)
        self._called = loss if isinstance(loss, nn.Module) else None
        self.dtype, self.scale = dtype, scale
        self.layers = find_layers(self.model, joint=joint)
        self.rejected: dict[str, int] = {}
        self.mask: Tensor | None = None
        self._sums = SecondMoments(dtype)
        self._examples: dict[Key, int] = {}
        self._counted_by: dict[Key, TapedLayer] = {}
        self._calls = {id(layer): _Calls() for layer in self.layers}
        self._terms: float | None = None
        self._trains = False
        self._traced: list[LayerCall] | None = []
        self._cache, self._seen = MomentCache(dtype), SharedInputs()

    def __enter__(self) -> "Capture":
        """Start to watch."""
        self.listen(self.layers)
        self.hold(self.model.register_forward_pre_hook(Hook(self._forget)))
        self.hold(self.model.register_forward_hook(Hook(self._end)))
        if self._called is not None:
            hook = Hook(self._note_targets)
            self.hold(self._called.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching; the moments stay."""
        self.close()
        self._settle()
        for calls in self._calls.values():  # within a training step, but never again
            hidden, calls.hidden = calls.hidden, []
            for call in hidden:
                self._count([call])

    def __iter__(self) -> Iterator[str]:
        """Names of the parameters that were seen."""
        return (name for key in self._sums for name in key)

    def __len__(self) -> int:
        """How many parameters were seen."""
        return sum(map(len, self._sums))

    def __getitem__(self, name: str) -> Moments:
        """The moments of the block that holds a parameter.

        Raises:
            ValueError: If nothing was seen of it.
        """
        for key in self._sums:
            if name in key:
                F = self._sums[key][0]
                inputs = scaled(operator(F.A), 1 / F.rows)  # pyright: ignore[reportArgumentType]
                examples = self._examples[key]
                gradients = None if F.B is None else scaled(F.B, 1 / examples)
                return Moments(inputs, gradients, int(F.rows), examples)
        seen = ", ".join("+".join(key) for key in self._sums) or "nothing"
        raise ValueError(
            f"capture[{name!r}]: it has not seen this parameter.\nIt has seen {seen}.\n"
            "Run the model while the capture is open; frozen layers are not watched."
        )

    def curvature(self) -> CurvatureMatrix:
        """The Kronecker-factored empirical Fisher matrix of all backward passes.

        Raises:
            ValueError: If there were none.
        """
        summed = self._terms is not None and sums(self.loss)
        blocks = {
            key: scaled(product, 1.0 if summed else 1 / self._examples[key])
            for key, product in self._sums.products().items()
        }
        return assembled(self.model, blocks)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of all processes; each has seen its own share of the data."""
        self._sums.all_reduce(group)
        device = next(self.model.parameters()).device
        for key in sorted(self._examples):  # in one order for all
            self._examples[key] = int(total(self._examples[key], device, group))

    def _forget(self, *_: Any) -> None:
        """A new batch: forget which inputs the layers of the last one shared."""
        self._settle()
        self._cache, self._seen = MomentCache(self.dtype), SharedInputs()
        self._trains = torch.is_grad_enabled()
        self._traced = None if self._traced is None else []

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """The forward pass is over: how many terms the loss of this batch averages."""
        self._trains = False
        if self.loss is not None:
            self._terms = term_count(self.loss, output)
        if self._traced:  # of the first pass with gradients
            traced, self._traced = self._traced, None
            refuse_other_uses(output, traced)

    def _note_targets(self, _loss: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """How many of them count, where the loss itself is called."""
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(targets, Tensor) and is_observed():
            self._terms = terms(self.loss, targets).divisor

    def wants(self) -> bool:
        """Whether a call is one of the user's."""
        return is_observed()

    def note(self, call: LayerCall, output: Tensor) -> None:
        """Count a call without gradients now, any other when they have come."""
        calls = self._calls[id(call.layer)]
        again = torch._C._current_graph_task_id() >= 0  # a checkpoint computes it once more
        if again and not calls.hidden:
            return  # its first call was seen
        call.mask = self.mask
        if again:
            calls.hidden.pop(0)
        if not output.requires_grad:
            if self._trains and not torch.is_grad_enabled():
                calls.hidden.append(call)  # a checkpoint in a training step may repeat it
            else:
                self._count([call])
            return
        if self._trains and self._traced is not None:
            self._traced.append(call.traced(output))
        calls.waiting.add(call)
        output.register_hook(Hook(self._arrive, call))

    def _arrive(self, call: LayerCall, g: Tensor) -> None:
        """One gradient; with the last one of a layer, all its calls are counted.

        Those that a checkpoint hides come one at a time, each when it is computed again.
        """
        calls = self._calls[id(call.layer)]
        call.g = (g if self.scale is None else g / self.scale())[None]
        calls.waiting.discard(call)
        calls.arrived.append(call)
        if not calls.waiting and not calls.hidden:
            self._count_arrived(calls)

    def _settle(self) -> None:
        """Count what has come, of layers whose hidden calls will not be made again."""
        for calls in self._calls.values():
            if calls.arrived and not calls.waiting:
                self._count_arrived(calls)

    def _count_arrived(self, calls: "_Calls") -> None:
        """Count the calls of one layer whose gradients have come."""
        arrived, calls.arrived = calls.arrived, []
        self._count(arrived)

    @torch.no_grad()
    def _count(self, calls: list[LayerCall]) -> None:
        """Add the calls of one layer in one batch, unless they hold NaN."""
        calls = [call for call in calls if call.x.numel()]
        if not calls:
            return
        layer, N = calls[0].layer, len(calls[0].x)
        masked = any(call.mask is not None for call in calls)
        found = by_block(((c, None) for c in calls), self._seen, _by_mask if masked else None)
        if not are_finite(found):
            self.rejected[layer.name] = self.rejected.get(layer.name, 0) + 1
            return
        self._count_examples(layer, found, N)
        weight = N * N if self._terms is None else self._weight(N)
        self._sums.add(found, weight, self._cache)

    def _count_examples(self, layer: TapedLayer, keys: Iterable[Key], number: int) -> None:
        """Add examples to those of some blocks; of tied layers only the first counts."""
        for key in keys:
            if self._counted_by.setdefault(key, layer) is layer:
                self._examples[key] = self._examples.get(key, 0) + number

    def _weight(self, examples: int) -> float:
        """From gradients of the loss of a batch to those of its terms, times their share."""
        return 1.0 if sums(self.loss) else float(examples * (self._terms or examples))


def _by_mask(call: LayerCall, _key: Key, use: Use) -> Tensor | None:
    """The positions that counted when a layer was called."""
    return None if call.mask is None else of_mask(call.mask.bool(), use)


@dataclass(eq=False)
class _Calls:
    """Calls of one layer whose gradient is still to come, those where it has, and hidden ones.

    A call whose graph is thrown away takes itself off the list. Reentrant checkpoints hide a call:
    it has no gradient, and is made again in the backward pass.
    """

    waiting: "WeakSet[LayerCall]" = field(default_factory=WeakSet)
    arrived: list[LayerCall] = field(default_factory=list)
    hidden: list[LayerCall] = field(default_factory=list)


def capture(
    model: nn.Module,
    *,
    loss: Loss | None = None,
    joint: bool = False,
    dtype: torch.dtype | None = None,
    scale: Callable[[], float] | None = None,
) -> Capture:
    """Gather the second moments of what the layers of a model see.

    Layers that read the same inputs (queries, keys, values) share one moment. Several calls of a
    layer in one pass are summed as positions. Set `moments.mask` to leave out padding. Batches of
    a layer that hold NaN or infinite entries are left out and counted in `rejected`. In distributed
    training call `all_reduce` at the end.

    Args:
        model: Its trainable parameters are watched. Under `no_grad` only inputs are seen.
        loss: Only for `gradients` and `curvature`: the loss, if it is not one that averages over
            the first axis alone (one that sums, or averages over positions too).
        joint: Treat a bias as one more input of its weight, for `curvature`.
        dtype: Type of the sums; by default that of the activations, at least float32.
        scale: The factor by which gradients are too large, such as `scaler.get_scale`.

    Returns:
        A context manager and mapping: `moments["0.weight"].inputs` is the mean of `a a.T`.

    Raises:
        TypeError: If a trainable parameter belongs to a module without a rule; it is named.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with capture(model) as moments, torch.no_grad():
        ...     _ = model(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moments["weight"].inputs.dense(), moments["weight"].rows
        (tensor([[[5., 1.],
                 [1., 2.]]]), 2)
    """
    return Capture(model, loss, joint, dtype, scale)
