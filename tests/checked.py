"""Annotations checked at run time: types by beartype, shapes by jaxtyping.

The same as `jaxtyping.install_import_hook`, for less than half of the suite's time: one wrapper
checks arguments and results and is made when it is first called, names of axes have a context only
where there are any, a function inside of another is checked the first time that it is defined, and
of the calls of a function in one test the first `CALLS` are checked.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

TYPED = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int will do for a float
        violation_type=TypeError,
    )
)
PARTS = "code", "globals", "name", "defaults", "closure"
BLOCKS = ast.stmt | ast.excepthandler | ast.match_case

CALLS = 16
"""Of a function in a test: the thousands of a loop do not differ."""

defined: set[CodeType] = set()


@dataclass
class State:
    """Whether anything is checked, and in which test this is."""

    on: bool = True
    test: int = 0


state = State()


def install(package: str) -> None:
    """Check what is imported of a package from now on."""
    sys.meta_path.insert(0, Finder(package))


@contextmanager
def switched_off() -> Iterator[None]:
    """Nothing is checked: what is refused here the package refuses itself."""
    state.on = False
    try:
        yield
    finally:
        state.on = True


def checked(function: Any) -> Any:
    """A function, or a dataclass, whose arguments and results are checked."""
    if inspect.isclass(function):
        if is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    if not function.__annotations__:
        return function
    check, calls, test = None, 0, -1

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        """Most are never called: their checks are not compiled."""
        nonlocal check, calls, test
        if test != state.test:
            calls, test = 0, state.test
        if not state.on or calls >= CALLS:
            return function(*args, **kwargs)
        calls += 1
        check = check or compiled(function)
        return check(*args, **kwargs)

    return inner


def checked_once(function: Any) -> Any:
    """The same for what is defined at each call of another function: the first of them."""
    if inspect.isclass(function) or function.__code__ in defined:
        return function
    defined.add(function.__code__)
    return checked(function)


def compiled(function: FunctionType) -> Callable[..., Any]:
    """A twin with checks; the function keeps its annotations as they are written."""
    twin = FunctionType(*(getattr(function, f"__{part}__") for part in PARTS))
    functools.update_wrapper(twin, function)
    twin.__kwdefaults__ = function.__kwdefaults__
    hints = {name: resolved(hint, function) for name, hint in function.__annotations__.items()}
    twin.__annotations__ = hints
    return in_context(TYPED(twin)) if any(map(has_shapes, hints.values())) else TYPED(twin)


def resolved(hint: Any, function: FunctionType) -> Any:
    """A hint that may be a string; anything goes where only type checkers know the name."""
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return Any


def has_shapes(hint: Any) -> bool:
    """Whether a hint names axes, or a part of it does."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(has_shapes, get_args(hint)))


def in_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """A name of an axis means one size within a call."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        """In a context of its own."""
        with jaxtyped("context"):
            return function(*args, **kwargs)

    return inner


def decorate(node: ast.AST, decorator: str = "__checked__") -> None:
    """Put the checks innermost on all functions, and outermost on classes, within a node."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, BLOCKS) or is_exempt(child):
            continue
        is_function = isinstance(child, ast.FunctionDef)
        decorate(child, "__checked_once__" if is_function else decorator)
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            at = len(child.decorator_list) if is_function else 0
            name = ast.copy_location(ast.Name(decorator, ast.Load()), child)
            child.decorator_list.insert(at, name)


def is_exempt(node: ast.AST) -> bool:
    """Whether a function or class says `@no_type_check`."""
    names = (ast.unparse(d) for d in getattr(node, "decorator_list", ()))
    return any(name.endswith("no_type_check") for name in names)


class Loader(SourceFileLoader):
    """Loads modules with the checks."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew: what is cached has none."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        decorate(tree)
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        """With the names of the decorators."""
        vars(module).update(__checked__=checked, __checked_once__=checked_once)
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds the modules of a package for that loader."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the module lies."""
        if not f"{fullname}.".startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec
