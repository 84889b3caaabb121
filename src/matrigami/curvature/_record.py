"""Watch the layers of a model at work: inputs, outputs, and which parameters they belong to.

Shapes: N = examples of a batch.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from matrigami.curvature._uses import unseen, unsupported

_OWN: ContextVar[bool] = ContextVar("own", default=False)
"""Whether the model is run by a pass of the library, in this thread."""


@contextmanager
def unobserved() -> Iterator[None]:
    """A pass of the library itself: watches and captures of training stand aside."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def is_observed() -> bool:
    """Whether a call of a layer is one of the user's, and not one of `torch.func`."""
    return not _OWN.get() and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, eq=False)
class Site:
    """A layer with trainable parameters.

    Args:
        layer: The module.
        name: Its name in the model.
        names: The model's name of each of its trainable parameters; of a tied one, the first.
        joint: Whether its bias is one more column of its weight.
    """

    layer: nn.Module
    name: str
    names: dict[str, str]
    joint: bool


@dataclass(eq=False)
class Record:
    """One call of a layer: its input, and where the gradient of its output appears."""

    site: Site
    x: Tensor
    edge: GradientEdge | None
    g: Tensor | None = None
    shape: tuple[int, ...] = ()
    mask: Tensor | None = None

    @classmethod
    def of(cls, site: Site, x: Tensor, output: Tensor) -> "Record":
        """Note a call; the edge outlives a change of the output in place."""
        edge = get_gradient_edge(output) if output.requires_grad else None
        return cls(site, x.detach(), edge, shape=tuple(output.shape))


def read_input(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call, given by its place or by its name.

    Raises:
        TypeError: If one of torch's layers was given more tensors, which its rule does not know.
    """
    forward = type(site.layer).forward
    given = [*args, *kwargs.values()]
    if not args and len(kwargs) > 1:
        first = next(iter(inspect.signature(site.layer.forward).parameters))
        given.sort(key=lambda value: value is not kwargs.get(first))
    more = [value for value in given[1:] if isinstance(value, Tensor)]
    if more and forward.__module__.startswith("torch.nn."):
        raise TypeError(
            f"curvature was asked for {site.name or 'the model itself'}, a "
            f"{type(site.layer).__name__} that was called with {len(more) + 1} tensors.\n"
            "How the others enter its parameters (offsets, weights of samples) is not known.\n"
            "Call it with one tensor, bags of one length (N, L), or freeze its parameters."
        )
    return given[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of a data-parallel or compiled wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def find_sites(
    model: nn.Module, *, joint: bool, wanted: Collection[Tensor] | None = None
) -> list[Site]:
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
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    found = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {
            key: canonical[id(p)] for key, p in own.items() if p.requires_grad and id(p) in chosen
        }
        if not names:
            continue
        if unread := unseen(module, names):
            raise TypeError(unsupported(name, module, unread))
        private = all(owners[id(p)] == 1 for p in own.values())
        found.append(Site(module, name, names, joint and private and len(names) == len(own)))
    return found


@contextmanager
def recording(sites: list[Site]) -> Iterator[list[Record]]:
    """Record every call of the layers while the context is open."""
    records: list[Record] = []

    def hook_of(site: Site) -> Any:
        """The hook of one layer."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            """Note the call."""
            records.append(Record.of(site, read_input(site, args, kwargs), output))

        return hook

    hooks = [site.layer.register_forward_hook(hook_of(site), with_kwargs=True) for site in sites]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def pull_back(outputs: Tensor, records: list[Record], columns: Tensor) -> None:
    """Set the gradients of all recorded outputs, for each column of output gradients.

    Only what lies between is differentiated: no gradient of a parameter is computed.

    Args:
        outputs: What the model gave, `(N, ...)`.
        records: The calls on the way to it.
        columns: `(K, N, ...)`.
    """
    live = [r for r in records if r.edge is not None]
    edges = [r.edge for r in live]
    if not edges:
        return
    if len(columns) == 1:
        found = [None if g is None else g[None] for g in _one(outputs, edges, columns[0])]
    else:
        found = _batched(outputs, edges, columns)
    for record, g in zip(live, found, strict=True):
        record.g = g


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
            "curvature was asked of a model with reentrant checkpoints.\n"
            "Gradients of chosen layers cannot pass through them.\n"
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error
