"""A step as a list of kernels: what `vmap` and autograd find out on the way, they find out once.

The calls that they make hold changes of shape after changes of shape, most of them of axes of
length one, products by one, and copies into another order. Each costs as much as a small product.
What is left is what computes something.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten: Any = torch.ops.aten

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
"""Calls that change the shape and nothing else."""

QUICK: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.bmm.default: torch.bmm,
    aten.mul.Tensor: torch.mul,
    aten.sum.dim_IntList: torch.sum,
    aten.transpose.int: torch.transpose,
    aten.view.default: Tensor.view,
}
"""The commonest calls by the name under which Python needs half the time for them."""


def recorded(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Callable[[Any], Any]:
    """The kernels that a function calls, without those that compute nothing.

    Other tensors that it reads, such as weights, are read again where they are.

    Args:
        function: Of a tuple; called once.
        inputs: Like those to come: tensors, and None where there is none.

    Returns:
        A function of such tuples with the same results, to rounding.
    """
    tape = Tape(_present(inputs))
    with tape:
        results = function(inputs)
    tape.graph.output(tree_map(tape.node, results))
    simplify(tape.graph)
    run, fixed = fx.GraphModule({}, tape.graph).forward, tape.fixed
    return lambda inputs: run(*_present(inputs), *fixed)


class Tape(TorchDispatchMode):
    """Writes down the calls of kernels.

    A tensor that is no input, nor computed from one, is `fixed`; a view of such a tensor is made
    once, and not at each step.

    Args:
        inputs: Tensors that are others in each step.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.fixed: list[Tensor] = []
        self.nodes, self.views = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for i, t in enumerate(inputs):
            self._know(t, self.graph.placeholder(f"given{i}"))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a kernel, and write it down."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if func.is_view and isinstance(result, Tensor) and args[0] not in self.nodes:
            self.views[result] = func(self._view(args[0]), *args[1:], **kwargs)
        else:
            self._know(result, self.graph.call_function(func, *tree_map(self.node, (args, kwargs))))
        return result

    def node(self, value: Any) -> Any:
        """What stands for a value in the list of calls."""
        if not isinstance(value, Tensor):
            return value
        if value in self.nodes:
            return self.nodes[value]
        self.fixed.append(self._view(value))
        node = self.graph.placeholder(f"fixed{len(self.fixed)}")
        node.meta["val"] = self.fixed[-1]
        return node

    def _view(self, t: Tensor) -> Tensor:
        """A fixed tensor, without its history."""
        return self.views[t] if t in self.views else t.detach()

    def _know(self, result: Any, node: fx.Node) -> None:
        """Which call a tensor comes from; of several, each is a part of what it returns."""
        if isinstance(result, Tensor):
            self.nodes[result] = node
            node.meta["val"] = torch.empty_like(result, device="meta")
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                self._know(part, self.graph.call_function(operator.getitem, (node, i)))


def _present(inputs: Iterable[Any]) -> list[Tensor]:
    """Those that are there."""
    return [t for t in inputs if t is not None]


def simplify(graph: fx.Graph) -> None:
    """The same numbers, to rounding, with fewer calls."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            _shorten(node, node.args[0])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.target = QUICK.get(node.target, node.target)


def _shorten(node: fx.Node, source: fx.Node) -> None:
    """Read from before the last change of shape; leave out what changes nothing."""
    if _reshapes(node, source):
        while source.target is aten.view.default:
            source = source.all_input_nodes[0]
        node.target, node.args, node.kwargs = aten.view.default, (source, _shape(node)), {}
    elif node.target is aten.clone.default:
        _turn(node, source)
    if _keeps(node) and _shape(node) == _shape(source):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _keeps(node: fx.Node) -> bool:
    """Whether a call leaves the numbers as they are: if the shape stays, it does nothing."""
    if node.target is aten.mul.Scalar:
        return bool(node.args[1] == 1) and node.meta["val"].is_floating_point()
    return node.target in (aten.view.default, aten.expand.default, aten.detach.default)


def _turn(node: fx.Node, source: fx.Node) -> None:
    """A copy of a transposed product `(A B)'` is the product `B' A'`."""
    product = source.all_input_nodes[0] if source.all_input_nodes else source
    if product.target is aten.bmm.default and _is_transposed(source):
        with node.graph.inserting_before(node):
            A, B = map(_transpose, product.all_input_nodes)
        node.target, node.args, node.kwargs = aten.bmm.default, (B, A), {}


def _is_transposed(node: fx.Node) -> bool:
    """Whether a call exchanges the axes of matrices, stacked once."""
    return node.target in MOVES and MOVES[node.target](node, node.all_input_nodes[0]) == [0, 2, 1]


def _transpose(node: fx.Node) -> fx.Node:
    """The matrices of a stack, transposed."""
    if _is_transposed(node):
        return node.all_input_nodes[0]
    return node.graph.call_function(aten.transpose.int, (node, 1, 2))


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
