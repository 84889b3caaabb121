"""The tape: one `LayerCall` for each call of a layer that holds trainable parameters.

Exact passes (`recording`, then `pull_back`), `capture` (the user's backward pass) and the estimator
of K-FAC (labels that it draws) differ in when a call counts and where its gradient comes from. The
hooks, the layers and their parameters, the reading of inputs and the look for NaN are here, once.

Shapes: N = examples of a batch.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from matrigami.nn import Parts, parts, refusal

_OWN: ContextVar[bool] = ContextVar("own", default=False)
"""Whether the model is run by a pass of the library, in this thread."""


@contextmanager
def unobserved() -> Iterator[None]:
    """A pass of the library itself: captures and estimators of training stand aside."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def is_observed() -> bool:
    """Whether a call of a layer is one of the user's, and not one of `torch.func`."""
    return not _OWN.get() and not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, eq=False)
class TapedLayer:
    """A layer with trainable parameters.

    Args:
        module: The module.
        name: Its name in the model.
        names: The model's name of each of its trainable parameters; of a tied one, the first.
        joint: Whether its bias is one more column of its weight.
        features: How many of the last axes of its input are features, if all others are alike.
    """

    module: nn.Module
    name: str
    names: dict[str, str]
    joint: bool
    features: int | None


@dataclass(eq=False)
class LayerCall:
    """One call of a layer: its input, and where the gradient of its output appears.

    Args:
        layer: The layer.
        x: Its input, detached.
        shape: Shape of its output.
        edge: Where the gradient of its output appears, if it was asked for.
        g: That gradient, `(K, *output)`, once it is known.
        mask: Which positions `(N, S)` count; None: all.
    """

    layer: TapedLayer
    x: Tensor
    shape: tuple[int, ...]
    edge: GradientEdge | None = None
    g: Tensor | None = None
    mask: Tensor | None = None

    def keep_edge(self, output: Tensor) -> None:
        """Note where the gradient of the output appears: it outlives a change of it in place.

        Not for who hangs the call on a hook of the output: nothing would free that circle.
        """
        self.edge = get_gradient_edge(output) if output.requires_grad else None

    def traced(self, output: Tensor) -> "LayerCall":
        """The place of the call in the graph alone: neither is its input held, nor a hook."""
        call = LayerCall(self.layer, self.x.new_empty(0), self.shape)
        call.keep_edge(output)
        return call


class Hook:
    """A hook that does not keep its owner alive, and does nothing in a copy of the model.

    Args:
        method: A bound method; it is given `first`, and what torch gives to a hook.
        first: Arguments.
    """

    def __init__(self, method: Callable[..., Any] | None, *first: Any) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)
        self.first = first

    def __call__(self, *arguments: Any) -> None:
        """Call the method, if its owner still lives."""
        method = None if self.method is None else self.method()
        if method is not None:
            method(*self.first, *arguments)

    def __deepcopy__(self, _memo: Any) -> "Hook":
        """A copy of the model is not on tape."""
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nor is a saved one."""
        return Hook, (None,)


class Tape:
    """Hooks on layers; `note` is told of each call. They go with the tape, or when it is closed."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def note(self, call: LayerCall, output: Tensor) -> None:
        """A call of a layer; what is to be done with it is the user's business."""
        raise NotImplementedError

    def wants(self) -> bool:
        """Whether calls are noted now."""
        return True

    def listen(self, layers: Iterable[TapedLayer]) -> None:
        """Note the calls of some layers, each before all other hooks have changed its output."""
        for layer in layers:
            hook = Hook(self._on_call, layer)
            self.hold(layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def hold(self, handle: Any) -> None:
        """Keep a hook until the tape is closed."""
        self._handles.append(handle)

    def close(self) -> None:
        """Take all hooks off the model."""
        _remove(self._handles)

    def _on_call(
        self, layer: TapedLayer, _module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """The forward hook of a layer."""
        if self.wants():
            x = read_input(layer, args, kwargs).detach()
            self.note(LayerCall(layer, x, tuple(output.shape)), output)


class Recorder(Tape):
    """Keeps every call, for a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []

    def note(self, call: LayerCall, output: Tensor) -> None:
        """Keep it.

        Raises:
            ValueError: If it is made inside of a transform, where nothing can be read.
        """
        if is_transformed():
            raise ValueError(
                f"curvature: {call.layer.name} is called inside of vmap or another transform of "
                "torch.func.\nWhat it sees there cannot be read.\n"
                "Call the layer on all of the batch, or freeze it."
            )
        call.keep_edge(output)
        self.calls.append(call)


@contextmanager
def recording(layers: list[TapedLayer]) -> Iterator[list[LayerCall]]:
    """Every call of the layers in a pass of the library while the context is open."""
    tape = Recorder()
    tape.listen(layers)
    try:
        with torch.enable_grad(), unobserved():
            yield tape.calls
    finally:
        tape.close()


def _remove(handles: list[Any]) -> None:
    """Take hooks off."""
    while handles:
        handles.pop().remove()


def read_input(layer: TapedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call, given by its place or by its name.

    Raises:
        TypeError: If one of torch's layers was given more tensors, which its rule does not know.
    """
    given = [*args, *kwargs.values()]
    if not args and len(kwargs) > 1:
        first = next(iter(inspect.signature(layer.module.forward).parameters))
        given.sort(key=lambda value: value is not kwargs.get(first))
    more = [value for value in given[1:] if isinstance(value, Tensor)]
    if more and type(layer.module).forward.__module__.startswith("torch.nn."):
        raise TypeError(
            f"curvature: {layer.name or 'the model itself'}, a "
            f"{type(layer.module).__name__}, was called with {len(more) + 1} tensors.\n"
            "How the others enter its parameters (offsets, weights of samples) is not known.\n"
            "Call it with one tensor, bags of one length (N, L), or freeze its parameters."
        )
    return given[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of a data-parallel or compiled wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def find_layers(
    model: nn.Module, *, joint: bool, wanted: Collection[Tensor] | None = None
) -> list[TapedLayer]:
    """The layers that hold the trainable parameters, or some of them.

    Args:
        model: The model.
        joint: Whether a bias is one more column of its weight.
        wanted: The parameters that matter; all trainable ones by default.

    Raises:
        TypeError: If a trainable parameter belongs to a module without a rule.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    chosen = set(canonical) if wanted is None else set(map(id, wanted))
    owners, found = _owner_counts(model), []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {
            key: canonical[id(p)] for key, p in own.items() if p.requires_grad and id(p) in chosen
        }
        if not names:
            continue
        known = _seen_parts(name, module, names)
        private = all(owners[id(p)] == 1 for p in own.values())
        whole = joint and private and len(names) == len(own)
        found.append(TapedLayer(module, name, names, whole, _features(known)))
    return found


def _owner_counts(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its identity."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def _seen_parts(name: str, module: nn.Module, wanted: Collection[str]) -> Parts:
    """The parts of a layer, unless it has a rule that sees what some parameters take part in."""
    known = parts(module)
    if unread := [key for key in wanted if key not in known or not known[key].is_seen]:
        raise TypeError(refusal("curvature", name, module, unread))
    return known


def _features(known: Parts) -> int | None:
    """How many of the last axes of an input are features, if all parts of a layer agree."""
    found = {part.features for part in known.values() if part.is_seen}
    return next(iter(found)) if len(found) == 1 else None


def pull_back(outputs: Tensor, calls: list[LayerCall], columns: Tensor) -> None:
    """Set the gradients of all recorded outputs, for each column of output gradients.

    Only what lies between is differentiated: no gradient of a parameter is computed.

    Args:
        outputs: What the model gave, `(N, ...)`.
        calls: The calls on the way to it.
        columns: `(K, N, ...)`.
    """
    live = [call for call in calls if call.edge is not None]
    edges = [call.edge for call in live]
    if not edges:
        return
    if len(columns) == 1:
        found = [None if g is None else g[None] for g in _one(outputs, edges, columns[0])]
    else:
        found = _batched(outputs, edges, columns)
    for call, g in zip(live, found, strict=True):
        call.g = g


def _batched(outputs: Tensor, edges: Any, columns: Tensor) -> list[Tensor | None]:
    """All columns at once; one after the other where an operation cannot be vectorised."""
    try:
        return list(_one(outputs, edges, columns, batched=True))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
    rows = [_one(outputs, edges, c) for c in columns]
    return [None if g[0] is None else torch.stack(g) for g in zip(*rows, strict=True)]  # pyright: ignore[reportArgumentType, reportCallIssue]


def _one(
    outputs: Tensor, edges: Any, cotangent: Tensor, *, batched: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients at the edges, keeping the graph for more."""
    try:
        return torch.autograd.grad(
            outputs,
            edges,
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "curvature: the model has reentrant checkpoints.\n"
            "Gradients of chosen layers cannot pass through them.\n"
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error


def refuse_not_finite(calls: list[LayerCall], batch: int) -> None:
    """Refuse what is NaN or infinite before it reaches a factor, where it arises first."""
    seen = [(call, call.x, "activations") for call in calls]
    seen += [(call, call.g, "gradients") for call in reversed(calls)]
    for call, t, what in seen:
        if t is not None and not is_finite(t):
            layer = call.layer.name or type(call.layer.module).__name__
            raise ValueError(
                f"curvature: batch {batch} has {what} at the layer {layer} that are NaN or "
                "infinite.\n"
                "Nothing was added to any factor.\nLook for a layer beside it that overflows."
            )


def is_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite: then neither is the sum, which takes one pass."""
    return bool(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite())
