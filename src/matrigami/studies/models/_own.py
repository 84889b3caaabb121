"""A model of your own: any module, from a function in a Python file.

The function is called with those of these arguments that it names: `width`, `depth`, `heads` (of
the run), `features`, `channels`, `side`, `outputs` (of the task: an image has `channels * side**2`
features, a text has `channels` tokens below `outputs`).

Shapes: b = examples.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from matrigami._words import cause
from matrigami.nn import StructuredLinear, chosen, matrix_view, replace_
from matrigami.structures import Dense, parse
from matrigami.studies._config import RunConfig
from matrigami.studies._own import call, function_of, refuse_changed
from matrigami.studies.models._base import Network
from matrigami.studies.tasks import DTYPE, Shape


class OwnModel(Network):
    """A module of the user, with structures put into it.

    Images come in as `(b, channels, side, side)`, vectors as `(b, features)`, texts as token
    numbers `(b, tokens)`; the answer is `(b, outputs)`, or `(b, tokens, outputs)`. What the module
    draws in training (dropout) depends on the run and the step alone, so that a run that was
    interrupted goes on as if it had not been.

    Args:
        config: The run: where the function is, structure, targets, width.
        shape: Sizes of the task.

    Raises:
        ValueError: If the function is missing, gives no module, or one of other outputs; if the
            structure does not fit, or the targets match nothing.
    """

    recordable = False  # its code is not known

    def __init__(self, config: RunConfig, shape: Shape) -> None:
        super().__init__()
        refuse_changed(config.folder, config.model, config.model_hash)
        if config.structured_layers != "all":
            raise ValueError(
                f"{config.model}, structured_layers = "
                f"{config.structured_layers!r}.\nWhat its hidden layers are is not known.\n"
                "Say by `targets` which layers carry the structure."
            )
        self.shape, self.seed = shape, config.seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        function = function_of(config.model, config.folder)
        arguments = _arguments(function, config, shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * config.seed)
            made = call(config.model, config.folder, function, **arguments)
            self.net = _module(made, config.model)
            _check_parameters(self.net, config.model)
            targets = config.targets or None
            if not isinstance(recipe := parse(config.structure), Dense):
                replace_(self.net, recipe, targets=targets, init="random")
            elif targets is not None:  # a pattern that matches nothing is refused here, too
                chosen(self.net, targets)
        self.to(DTYPE)
        self.width = config.width if "width" in arguments else None
        names = [name for name, m in self.named_modules() if matrix_view(m) is not None]
        self.reads, self.answers = tuple(names[:1]), tuple(names[-1:])
        self._macs = self._counted(config.model)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a batch of the task: classes, or positions, as torch's losses have them."""
        s = self.shape
        x = x.unflatten(1, (s.channels, s.side, s.side)) if s.side > 1 else x
        if not self.training:
            return self._answer(x)
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed((self.seed << 32) + int(self.calls))
            self.calls += 1
            return self._answer(x)

    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example.

        Structured layers count by `cost`, everything else by torch's counter of operations.
        """
        return self._macs

    def _answer(self, x: Tensor) -> Tensor:
        """What the module says; models of transformers put it into `logits`."""
        y = self.net(x)
        y = getattr(y, "logits", y)
        if not isinstance(y, Tensor):
            raise TypeError(f"it answers with a {type(y).__name__}")
        return y.mT if self.shape.is_text else y

    def _counted(self, name: str) -> int:
        """Run it on one and on two examples: check its outputs, count its operations."""
        self.eval()
        with torch.no_grad():
            macs = self._tried(name, 1)[0]
        _, y = self._tried(name, 2)
        self.train()
        if not y.requires_grad:
            raise _unfit(name, self.shape, "what it answers has no derivative (a detach?)")
        return macs

    def _tried(self, name: str, examples: int) -> tuple[int, Tensor]:
        """Multiply-adds and outputs of some examples."""
        s = self.shape
        x = torch.zeros(examples, s.features, dtype=torch.int64 if s.is_text else DTYPE)
        try:
            macs, y = counted_macs(self, x)
        except Exception as error:
            what = f"it fails on {examples}: {type(error).__name__}: {cause(error)}"
            raise _unfit(name, s, what) from error
        wanted = (examples, s.outputs, *([s.channels] if s.is_text else []))
        if tuple(y.shape) != wanted:
            what = f"it answers {examples} with a tensor of {tuple(y.shape)}"
            raise _unfit(name, s, what)
        return macs, y


def counted_macs(model: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """Multiply-adds of a model on one example, and its outputs.

    Structured layers count by `cost`, all else by torch's counter: two operations each.

    Examples:
        >>> counted_macs(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(3, 8))[0]
        120
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    vectors: Counter[str] = Counter()

    def seen(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, _: Any) -> None:
            vectors[name] += inputs[0].numel() // layer.in_features

        return hook

    handles = [layer.register_forward_hook(seen(name)) for name, layer in layers.items()]
    # the product of attention in one kernel is not counted on every device, its two parts are
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = model(example)
    for handle in handles:
        handle.remove()
    counts, root = counter.get_flop_counts(), type(model).__name__
    structured = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in layers)
    plain = (counter.get_total_flops() - structured) // 2
    return plain + sum(n * layers[name].cost().macs for name, n in vectors.items()), y


def _arguments(function: Callable[..., Any], config: RunConfig, shape: Shape) -> dict[str, int]:
    """What the function is called with."""
    known = {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "features": shape.features,
        "channels": shape.channels,
        "side": shape.side,
        "outputs": shape.outputs,
    }
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if needed and p.name not in known:
            raise ValueError(
                f"Model {config.model!r}: its argument {p.name!r} is not known.\n"
                f"Known are {', '.join(known)}; give others a default."
            )
    return {p.name: known[p.name] for p in parameters if p.name in known}


def _module(made: Any, name: str) -> nn.Module:
    """What the function gave, if it is a module."""
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"Model {name!r}: the function gave a {type(made).__name__}.\n"
            "It should give a torch.nn.Module."
        )
    return made


def _check_parameters(net: nn.Module, name: str) -> None:
    """Refuse a module that has nothing to train, or does not know yet what."""
    parameters = list(net.parameters())
    lazy = any(map(is_lazy, parameters))
    if lazy or not any(p.requires_grad for p in parameters):
        what = "layers that get their sizes later" if lazy else "no parameter that is trained"
        raise ValueError(
            f"Model {name!r}: it has {what}.\n"
            "Give every layer its sizes, and leave requires_grad as it is."
        )


def _unfit(name: str, shape: Shape, what: str) -> ValueError:
    """What to raise for a module that does not do what the task asks."""
    s = shape
    given = f"(b, {s.channels}, {s.side}, {s.side})" if s.side > 1 else f"(b, {s.features})"
    wanted = f"(b, {s.channels}, {s.outputs})" if s.is_text else f"(b, {s.outputs})"
    kind = "token numbers" if s.is_text else "numbers"
    return ValueError(
        f"Model {name!r} on examples of {given} {kind}: "
        f"it does not fit: {what}.\n"
        f"It should answer with a tensor of {wanted}."
    )
