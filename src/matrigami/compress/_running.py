"""A model on a batch: at rest, watched by hooks, and what of its outputs is meant."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")

FEW = 4
"""Arguments that are told of many."""


class Once(Generic[T]):
    """What a function made of tensors, for the next who comes with the same ones, as they then are.

    Views of the same memory are the same, until one of them is written into.
    """

    def __init__(self, made: Callable[..., T]) -> None:
        """Nothing is known yet."""
        self.made = made
        self.known: tuple[list[object], Any, T] | None = None

    def __call__(self, *tensors: Tensor | None) -> T:
        """What was made of them last, or is made now."""
        now = [_as_it_is(t) for t in tensors]
        if self.known is None or self.known[0] != now:
            made = self.made(*tensors)
            self.known = now, tensors, made  # tensors, so that no others take their memory
        return self.known[2]

    def clear(self) -> None:
        """Nothing is known any more."""
        self.known = None


def _as_it_is(x: Tensor | None) -> object:
    """Equal for views of the same memory, as long as nobody writes into it."""
    if x is None or x.is_inference():  # which counts no versions
        return x if x is None else object()
    return x.data_ptr(), x.device, x.dtype, x.shape, x.stride(), x._version


@contextmanager
def hooked(
    hooks: Mapping[str, tuple[nn.Module, Callable[..., Any]]], before: bool = False
) -> Iterator[None]:
    """Hooks on some modules, taken off whatever happens; they are given keywords, too."""
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if before
        else module.register_forward_hook(hook, with_kwargs=True)
        for module, hook in hooks.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, keeping no cache of keys and values; as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if cached:
            config.use_cache = cached  # pyright: ignore[reportOptionalMemberAccess]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Backward passes whatever the caller wants, without parameters; as it was afterwards."""
    free = [p for p in model.parameters() if p.requires_grad]
    for p in free:
        p.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in free:
            p.requires_grad_(True)


def expect(call: str, given: object, kinds: Any, example: str) -> None:
    """Raise for an argument of another kind, or for a class in the place of its instance."""
    if not isinstance(given, kinds) or isinstance(given, type):
        raise TypeError(f"{call}: {given!r} is a {type(given).__name__}.\nGive {example}.")


def batches_of(calibration: Iterable[Any]) -> list[Any]:
    """All batches.

    Raises:
        ValueError: If there are none.
        TypeError: If it is not what can be gone through batch by batch.
    """
    if isinstance(calibration, str | bytes | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"the calibration is a {type(calibration).__name__}, not batches.\n"
            "Give a list of them: each a tensor, a tuple of arguments or a mapping of keywords; of "
            'a language model "self" lets it write them.'
        )
    data = [
        pytree.tree_map_only(Tensor, Tensor.detach, batch)
        for batch in calibration
        if _examples(batch)
    ]
    if not data:
        raise ValueError(
            "the calibration has no batches with examples.\n"
            "Give some: a few hundred vectors are enough."
        )
    return data


def _examples(batch: Any) -> int:
    """How many a batch has; one where it does not tell."""
    parts = batch.values() if isinstance(batch, Mapping) else batch
    parts = (
        list(parts) if isinstance(parts, Iterable) and not isinstance(parts, Tensor) else [parts]
    )
    return min((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), default=1)


def forwarded(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def called(model: nn.Module, batch: Any) -> Any:
    """The same; what the model does not take is told.

    Raises:
        ValueError: If the model fails.
    """
    with explained(model, batch):
        return forwarded(model, batch)


@contextmanager
def explained(module: nn.Module, batch: Any) -> Iterator[None]:
    """Say what a model or block that fails was called with."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"a {type(module).__name__} was called with {_described(batch)}.\n"
            f"It failed: {str(error).strip().partition(chr(10))[0]}\n"
            "A batch is a tensor, a tuple of arguments or a mapping of keywords; check its types."
        ) from error


def _described(batch: Any) -> str:
    """A batch in words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{name}: {_described(part)}" for name, part in batch.items())
    if isinstance(batch, tuple | list):
        return ", ".join([*map(_described, batch[:FEW]), *["..."][: len(batch) > FEW]])
    return f"a {type(batch).__name__}"


def first(output: Any) -> Any:
    """What a block hands to the next one."""
    return output[0] if isinstance(output, tuple | list) else output


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with, by its place or by its name."""
    return args[0] if args else next(iter(kwargs.values()))


def logits(output: Any) -> Tensor:
    """The logits among the outputs of a model: by their name, the first, or the only one.

    Raises:
        ValueError: If it is not told which they are.
    """
    found, names = getattr(output, "logits", None), []
    if isinstance(output, Mapping):
        names = [name for name, t in output.items() if isinstance(t, Tensor)]
        alone = len(names) == 1 and names[0] != "last_hidden_state"
        found = output[names[0]] if alone else output.get("logits")
    elif found is None:
        found = first(output)
    if not isinstance(found, Tensor):
        told = f" with {', '.join(names)}" if names else ""
        raise ValueError(
            f"logits of a model: it returns a {type(output).__name__}{told}.\n"
            "None of these is called logits.\nLet it return its logits, or look at the inputs of "
            "its layers alone: two_sided=False, on the command line --one-sided."
        )
    return found


def answer(output: Any) -> Tensor:
    """What two models are compared by: the logits, or the first tensor."""
    tensors = list(output.values()) if isinstance(output, Mapping) else []
    one = next((t for t in tensors if isinstance(t, Tensor)), None)
    return logits(output) if one is None or "logits" in output else one
