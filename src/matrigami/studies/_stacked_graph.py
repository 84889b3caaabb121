"""A recorded step without the calls that compute nothing.

A recording of `vmap` and autograd holds a call for each change of shape that either made on the
way, views of views, most of them of axes of length one. Each costs as much as a small product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten: Any = torch.ops.aten

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
"""Calls that change the shape and nothing else."""


def simplified(graph: fx.GraphModule) -> fx.GraphModule:
    """The same numbers with fewer calls: changes of shape that follow each other are one."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            _shorten(node, node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _shorten(node: fx.Node, source: fx.Node) -> None:
    """Read from before the last change of shape; leave out what changes nothing."""
    if _reshapes(node, source):
        while source.target is aten.view.default:
            source = source.all_input_nodes[0]
        node.target, node.args, node.kwargs = aten.view.default, (source, _shape(node)), {}
        changes = _shape(node) != _shape(source)
    elif node.target is aten.expand.default:
        changes = _shape(node) != _shape(source)
    else:
        changes = node.target is not aten.detach.default
    if not changes:
        node.replace_all_uses_with(source)


def _reshapes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a call is a change of shape: also one that moves but axes of length one."""
    if node.target not in MOVES:
        return node.target in RESHAPES
    long = [axis for axis in MOVES[node.target](node, source) if _shape(source)[axis] != 1]
    return long == sorted(long)


def _permuted(node: fx.Node, source: fx.Node) -> list[int]:
    """The order of axes after a permutation."""
    order: Any = node.args[1]
    return [axis % len(_shape(source)) for axis in order]


def _transposed(node: fx.Node, source: fx.Node) -> list[int]:
    """The order of axes after two are exchanged."""
    order, (i, j) = list(range(len(_shape(source)))), map(int, node.args[1:])  # pyright: ignore[reportArgumentType]
    order[i], order[j] = order[j], order[i]
    return order


MOVES: dict[Any, Callable[[fx.Node, fx.Node], list[int]]] = {
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
}
"""Calls that change the order of axes."""


def _shape(node: fx.Node) -> list[int]:
    """The shape that was recorded."""
    return list(node.meta["val"].shape)
