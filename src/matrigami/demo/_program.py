"""Runs the example of a topic, and shows it as the program that a reader can run."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from matrigami.demo._topic import Topic

SETTING = "torch.manual_seed(0)\ntorch.set_default_dtype(torch.float64)"
"""What every program begins with."""


@contextmanager
def setting() -> Iterator[None]:
    """The seed and the type that every program sets, and afterwards those of before.

    On one thread: matrices this small are no faster on more, and on a busy machine far slower.
    """
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            torch.set_num_threads(threads)


def ran(topic: Topic, **changes: Any) -> dict[str, Any]:
    """The names of one call of the example, with other values of its parameters."""
    with setting():
        return topic.example(**changes)


def program(topic: Topic) -> str:
    """The example as a program: imports, parameters, body, and a line that prints its numbers."""
    text = textwrap.dedent(inspect.getsource(topic.example))
    function = ast.parse(text).body[0]
    body = [node for node in getattr(function, "body", []) if not _is_docstring(node)][:-1]
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    printed = ", ".join(f"{{{number.name}:{number.spec}}}" for number in topic.numbers)
    parts = [
        _imports(topic.example, "\n".join(lines)),
        SETTING,
        "",
        *_parameters(topic.example),
        textwrap.dedent("\n".join(lines)),
        f'print(f"{printed}")',
    ]
    return "\n".join(parts) + "\n"


def _is_docstring(node: ast.stmt) -> bool:
    """A string alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _parameters(example: Callable[..., Any]) -> list[str]:
    """The defaults, one assignment each."""
    given = inspect.signature(example).parameters.values()
    return [f"{p.name} = {p.default!r}" for p in given]


def _imports(example: Callable[..., Any], body: str) -> str:
    """The imports of the file that the body uses, torch first."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(example) or example))
    nodes = ast.walk(ast.parse(textwrap.dedent(body)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and _is_for_readers(node):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
            found += [ast.unparse(node)] if node.names else []
    return "\n".join(dict.fromkeys(["import torch", *found]))


def _is_for_readers(node: ast.Import | ast.ImportFrom) -> bool:
    """Not the machinery of the gallery."""
    return not (
        isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matrigami.demo")
    )
