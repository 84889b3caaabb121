"""What one use of a layer tells about its parameters, as its anatomy says.

The taps of `parts` give inputs and gradients of each block of parameters; here they are put
together for the blocks that curvature has: a weight with its bias, or each on its own.
"""

import torch
from torch import Tensor, nn

from matrigami.nn._anatomy import OneHot, Parts, Use, parts, refusal

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
    for names in _blocks(found):
        tap = found[names[0]].tap
        if tap is None:
            continue
        use = tap(x, g)
        bias = next((name for name, p in found.items() if p.column_of == names[0]), None)
        if bias is not None and joint:
            result[*names, bias] = use._replace(inputs=_with_ones(use.inputs))
            continue
        result[names] = use
        if bias is not None:
            result[(bias,)] = Use(_ones(use.inputs), use.gradients)
    if not result:
        raise TypeError(refusal("uses", "", layer, list(found)))
    return result


def _blocks(found: Parts) -> list[tuple[str, ...]]:
    """The names that share a tap."""
    shared: dict[int, list[str]] = {}
    for name, part in found.items():
        if part.tap is not None:
            shared.setdefault(id(part.tap), []).append(name)
    return [tuple(names) for names in shared.values()]


def _with_ones(x: Tensor | OneHot) -> Tensor:
    """One more input that is always one."""
    return torch.cat([x, _ones(x)], -1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _ones(x: Tensor | OneHot) -> Tensor:
    """The input of a bias."""
    return x.new_ones(*x.shape[:3], 1)  # pyright: ignore[reportAttributeAccessIssue]
