"""The size, naming and layering rules of CONTRIBUTING.md, as tests."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import matrigami
from matrigami.operators import Structure
from matrigami.structures import EXAMPLES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "matrigami"
FILES = sorted(
    path
    for pattern in ("src/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "docs/*.py")
    for path in ROOT.glob(pattern)
)
VAGUE = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "misc",
    "core",
    "tools",
    "types",
    "constants",
}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the root of the project, without the run-time checks of the tests."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@each_file
def test_file_is_short_and_says_what_it_is(path: Path):
    assert path.stem.strip("_") not in VAGUE
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert not lines or lines[0].lstrip("r").startswith('"""')


@each_file
def test_functions_are_short(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, (
                f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            )


DECISIONS = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case)


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """What a function has in it, without the functions and classes that it defines."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def complexity(function: ast.AST) -> int:
    """One, and one for each branch, loop and handler, those of comprehensions included."""
    nodes = list(own_nodes(function))
    loops = [node for node in nodes if isinstance(node, ast.comprehension)]
    branches = sum(isinstance(node, DECISIONS) for node in nodes)
    return 1 + branches + sum(1 + len(loop.ifs) for loop in loops)


def test_complexity_counts_each_way_through_a_function():
    text = """
def f(xs):
    for x in [x for x in xs if x if x > 1]:
        if x and x or x:
            try:
                y = 1 if x else 2
            except ValueError:
                pass
        elif x:
            match x:
                case 1: pass
                case 2: pass
    def g(): return [x for x in xs]
"""
    assert complexity(ast.parse(text).body[0]) == 1 + 4 + 1 + 1 + 1 + 2


@each_file
def test_functions_decide_in_few_places(path: Path):
    """Tests are read from the top to the bottom, and may repeat and choose as it needs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
            assert complexity(node) <= 8, f"{node.name} has a complexity of {complexity(node)}"


def depth(node: ast.AST, level: int = 0) -> int:
    """The deepest block below a node; an `elif` is no deeper than its `if`."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
        deepest = max(deepest, depth(child, level + (block and not chained)))
    return deepest


def test_blocks_of_the_package_are_nested_three_deep_at_most():
    deep = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and depth(node) > 3
    ]
    assert deep == []


@each_file
def test_annotations_are_evaluated(path: Path):
    """The run-time checks and `singledispatch` read them."""
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    assert "__future__" not in [node.module for node in imports]


def test_source_neither_asserts_nor_prints():
    """Bad input is a ValueError (asserts vanish under -O); only the command line talks."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            asserts = isinstance(node, ast.Assert)
            prints = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            )
            if asserts or (prints and "cli" not in path.parts):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_modules_are_private_and_packages_public():
    modules = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    assert [str(m) for m in modules if not m.name.startswith("_")] == []
    packages = [p.parent for p in PACKAGE.rglob("__init__.py")]
    assert [p.name for p in packages if "__all__" not in (p / "__init__.py").read_text()] == []


def test_every_structure_file_is_exported():
    text = (PACKAGE / "structures" / "__init__.py").read_text()
    for path in (PACKAGE / "structures").glob("_[a-z]*.py"):
        assert re.search(rf"\b{path.stem}\b", text)


def test_every_structure_has_an_example():
    recipes = {cls for cls in Structure.__subclasses__() if not inspect.isabstract(cls)}
    ours = {cls for cls in recipes if cls.__module__.startswith("matrigami.structures")}
    assert {type(recipe) for recipe in EXAMPLES.values()} == ours


def test_public_names_exist_once_and_in_order():
    assert sorted(set(matrigami.__all__)) == list(matrigami.__all__)
    for name in matrigami.__all__:
        assert getattr(matrigami, name) is not None


def test_imports_flow_one_way():
    result = run_python(
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    )
    assert result.returncode == 0, result.stdout[-2000:]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(text: str, package: str, modules: Collection[str]) -> set[str]:
    """The modules of the library that one imports, at its top or inside of a function.

    A name that is no module is from the package itself, also beside names that are.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else origin for name in inner}
    return found & set(modules)


def test_all_ways_to_import_are_seen():
    text = """
import p.a, p.b as b
from p import c, name
from p.d import *
from . import e
from .f import name
def late():
    from p.g import name
"""
    modules = {"p", *(f"p.{letter}" for letter in "abcdefg")}
    assert imported(text, "p", modules) == modules
    assert imported("from .. import q", "p.d", {"p", "p.q"}) == {"p.q"}


def test_no_modules_import_each_other():
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {
        name: imported(path.read_text(), module_name(path.parent / "__init__.py"), paths)
        for name, path in paths.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(paths)  # or CycleError


def test_ruff_finds_nothing():
    result = run_python("-m", "ruff", "check", "--no-cache", "--output-format", "concise")
    assert result.returncode == 0, result.stdout[-4000:]


def test_import_stays_light():
    heavy = ["matplotlib", "sklearn", "transformers", "ray", "scipy.sparse", "hypothesis"]
    result = run_python(
        "-c", f"import sys, matrigami; print([m for m in {heavy} if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    "words",
    ["matrigami --help", "matrigami.cli --help", "matrigami demo --json", "matrigami list"],
)
def test_the_command_line_starts_without_torch(words: str):
    result = run_python("-X", "importtime", "-m", *words.split())
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) > 5
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert imported & {"torch", "numpy", "scipy", "matplotlib"} == set()
