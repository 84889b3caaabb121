"""What one use of a layer tells about its parameters, as its anatomy says.

The taps of `parts` give inputs and gradients of each block of parameters; here they are put
together for the blocks that curvature has: a weight with its bias, or each on its own.
"""

import torch
from torch import Tensor, nn

from matrigami.nn._anatomy import OneHot, Parts, Tap, Use, parts, refusal

Uses = dict[tuple[str, ...], Use]
"""By the names of the layer's parameters that share a block: a weight, with its bias if joint."""


def uses(layer: nn.Module, x: Tensor, g: Tensor | None, joint: bool = True) -> Uses:
    """One use of a layer, for each of its blocks of parameters.

    Args:
        layer: The layer.
        x: Its input, `(N, ...)`.
        g: Gradients with respect to its output, `(K, N, ...)`, or None.
        joint: Whether a bias is one more column of its weight.

    Raises:
        TypeError: If no parameter of the layer can be read.

    Examples:
        >>> x, g = torch.ones(4, 3), torch.ones(1, 4, 2)
        >>> [(names, tuple(use.inputs.shape)) for names, use in uses(nn.Linear(3, 2), x, g).items()]
        [(('weight', 'bias'), (1, 4, 1, 4))]
    """
    found = parts(layer)
    result: Uses = {}
    for tap, names in _blocks(found):
        use, bias = tap(x, g), _bias_of(names[0], found)
        if bias is None:
            result[names] = use
        elif joint:
            result[*names, bias] = use._replace(inputs=_with_ones(use.inputs))
        else:
            result |= {names: use, (bias,): Use(_ones(use.inputs), use.gradients)}
    if not result:
        raise TypeError(refusal("uses", "", layer, list(found)))
    return result


def _blocks(found: Parts) -> list[tuple[Tap, tuple[str, ...]]]:
    """Each tap, with the names of the parameters that share it."""
    shared: dict[int, list[str]] = {}
    taps = {id(part.tap): part.tap for part in found.values() if part.tap is not None}
    for name, part in found.items():
        shared.setdefault(id(part.tap), []).append(name)
    return [(tap, tuple(shared[key])) for key, tap in taps.items()]


def _bias_of(weight: str, found: Parts) -> str | None:
    """The name of the bias that is one more column of a weight."""
    return next((name for name, part in found.items() if part.column_of == weight), None)


def _with_ones(x: Tensor | OneHot) -> Tensor:
    """One more input that is always one."""
    return torch.cat([x, _ones(x)], -1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _ones(x: Tensor | OneHot) -> Tensor:
    """The input of a bias."""
    return x.new_ones(*x.shape[:3], 1)  # pyright: ignore[reportAttributeAccessIssue]
