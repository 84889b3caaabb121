"""Weights that are used beside the calls of their layers: what they do there is on no tape.

Asked is the graph of autograd: how often it reads a parameter, and how many calls do.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from matrigami.curvature._tape import LayerCall

FORMS = ("ToCopyBackward0", "TBackward0")
"""Nodes of the same weight in another form: `autocast` makes a copy, which it keeps, a linear layer
a transpose, which is read again where its derivative is a part of the outputs."""


def refuse_other_uses(outputs: Any, calls: Iterable[LayerCall]) -> None:
    """Refuse weights that enter the outputs beside the calls of their layers.

    A head `F.linear(x, table.weight)` is no call of the table: what it adds would be missing. Only
    torch's own layers are asked, each call of which reads a parameter once.

    Args:
        outputs: What the parameters enter: tensors, in any nest of tuples and mappings.
        calls: The calls of the layers, with their edges.
    """
    reads, visited = _reads(outputs)
    seen: Counter[int] = Counter()
    names: dict[int, str] = {}
    for call in calls:
        layer, edge = call.layer, call.edge
        own = type(layer.module).forward.__module__.startswith("torch.nn.")
        for key, p_name in layer.names.items() if edge and edge.node in visited else ():
            p = getattr(layer.module, key)
            seen[id(p)] += 1 if own else reads[id(p)]
            names[id(p)] = p_name
    more = [p_name for p, p_name in names.items() if reads[p] > seen[p]]
    if more:
        raise ValueError(
            f"curvature: {', '.join(more)} is used outside of its layer (F.linear).\n"
            "What it does there is not seen.\n"
            "Make it the weight of a second layer (head.weight = table.weight), or freeze it."
        )


def _reads(outputs: Any) -> tuple[Counter[int], set[Any]]:
    """How often each parameter is read on the way to some outputs, by its identity; all nodes."""
    found: Counter[int] = Counter()
    visited = _there(getattr(t, "grad_fn", None) for t in tree_leaves(outputs))
    waiting = list(visited)
    while waiting:
        node = waiting.pop()
        if type(node).__name__ not in FORMS:
            found.update(id(_read_at(f)) for f, _ in node.next_functions)
        fresh = _there(f for f, _ in node.next_functions) - visited
        visited |= fresh
        waiting += fresh
    return found, visited


def _there(nodes: Iterable[Any]) -> set[Any]:
    """Those that are no None."""
    return {node for node in nodes if node is not None}


def _read_at(node: Any) -> Tensor | None:
    """The parameter that is read at a node, in any form."""
    while type(node).__name__ in FORMS:
        ((node, _),) = node.next_functions
    return getattr(node, "variable", None)
