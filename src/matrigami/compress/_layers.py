"""A layer as a matrix: its weights, the vectors that they multiply, and their output gradients.

Shapes: m = outputs, n = inputs, N = vectors (tokens, positions).
"""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_matrix(module: nn.Module) -> bool:
    """Whether the forward pass is one product with a matrix of weights that we know.

    A subclass with a `forward` of its own may do something else, so it is not known.
    """
    return _plain(module, nn.Linear) or _plain(module, nn.Conv2d) or _transposed(module)


def weight(module: nn.Module) -> Float[Tensor, "m n"]:
    """The weights of a layer as a matrix, outputs by inputs (of a convolution: by taps)."""
    W = module.weight.detach()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return W.mT if _transposed(module) else W.flatten(1)


@torch.no_grad()
def set_weight(module: nn.Module, W: Float[Tensor, "m n"]) -> None:
    """Overwrite the weights of a layer, in their own type."""
    old: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    old.copy_(W.mT if _transposed(module) else W.reshape(old.shape))


def rows(module: nn.Module, x: Tensor) -> Float[Tensor, "N n"]:
    """The vectors that the matrix of a layer multiplies, example by example."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    x = x if x.ndim == 4 else x[None]
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        ahead = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = nn.functional.pad(x, ahead, mode=mode), 0
    else:
        padding = module.padding
    taps = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return taps.mT.flatten(0, 1)


def gradient_rows(module: nn.Module, g: Tensor) -> Float[Tensor, "N m"]:
    """The gradients of the outputs, one row for each vector of `rows`."""
    if not isinstance(module, nn.Conv2d):
        return g.reshape(-1, g.shape[-1])
    return (g if g.ndim == 4 else g[None]).flatten(2).mT.flatten(0, 1)


def chosen(
    model: nn.Module, targets: str | Iterable[str] | None = None, ignore: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The layers of a model by name patterns such as `*.mlp.*`, in the order of the model.

    By default all that are a matrix but the last, which gives the answer. Of layers that share a
    weight the first counts.

    Args:
        model: The model.
        targets: Patterns of names; None for the default.
        ignore: Patterns of names to leave out.

    Raises:
        ValueError: If a pattern matches nothing, or a layer that is not known.
    """
    named = dict(model.named_modules())
    layers = {name: module for name, module in named.items() if is_matrix(module)}
    left = _matching(_tuple(ignore), layers, model, "ignore")
    if targets is None:
        found = [name for name in list(layers)[:-1] if name not in left]
    else:
        matched = _matching(_tuple(targets), named, model, "targets")
        found = [name for name in layers if name in matched and name not in left]
        if not found:
            raise ValueError(
                f"targets={targets!r}: no layer of one matrix is among what it matches in the "
                f"{type(model).__name__}.\nKnown are Linear, Conv2d of one group, and Conv1D."
            )
    seen: dict[int, str] = {}
    for name in found:
        seen.setdefault(id(layers[name].weight), name)
    return {name: layers[name] for name in seen.values()}


def _matching(
    patterns: tuple[str, ...], named: dict[str, nn.Module], model: nn.Module, label: str
) -> set[str]:
    """The names that one of the patterns matches."""
    every: set[str] = set()
    for pattern in patterns:
        found = {name for name in named if fnmatchcase(name, pattern)}
        if not found:
            near = get_close_matches(pattern, [name for name in named if name], 3, 0.3)
            raise ValueError(
                f"{label}={pattern!r} matches no layer of the {type(model).__name__}.\n"
                f"Nearest: {', '.join(near) or 'none'}."
            )
        every |= found
    return every


def _tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern, or several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the forward pass is that of a kind of torch, with one group."""
    same = isinstance(module, kind) and type(module).forward is kind.forward
    return same and getattr(module, "groups", 1) == 1


def _transposed(module: nn.Module) -> bool:
    """Whether this is the `Conv1D` of transformers: a Linear whose weight is inputs by outputs."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
