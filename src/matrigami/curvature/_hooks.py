"""Hooks that tell a watch, without keeping it alive."""

import weakref
from typing import Any

from torch import Tensor, nn


class Hook:
    """A hook that does not keep the watch alive, and does nothing in a copy of the model."""

    def __init__(self, watch: Any, method: Any = None, *first: Any) -> None:
        self.watch = (lambda: None) if watch is None else weakref.ref(watch)
        self.method, self.first = method, first

    def __call__(self, _module: nn.Module, *arguments: Any) -> None:
        """Tell the watch, if there still is one."""
        watch = self.watch()
        if watch is not None:
            self.method(watch, *self.first, *arguments)

    def __deepcopy__(self, _memo: Any) -> "Hook":
        """A copy of the model is not watched."""
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nor is a saved one."""
        return Hook, (None,)


class Late:
    """A hook on outputs, for a backward pass without a loss that is known."""

    def __init__(self, watch: Any, passed: Any) -> None:
        self.watch, self.passed = weakref.ref(watch), weakref.ref(passed)

    def __call__(self, _gradient: Tensor) -> None:
        """Tell the watch, if it still waits."""
        watch, passed = self.watch(), self.passed()
        if watch is not None and passed is not None:
            watch.late(passed)


class Commit:
    """A hook on what a loss was given: its factors count once it is differentiated."""

    def __init__(self, watch: Any, found: Any) -> None:
        self.watch, self.found = weakref.ref(watch), found

    def __call__(self, _gradient: Tensor) -> None:
        """Hand the factors over, once."""
        watch, found, self.found = self.watch(), self.found, {}
        if watch is not None:
            watch.commit(found)
