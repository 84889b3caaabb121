"""The checks of annotations that all tests run with."""

import importlib
import sys

import pytest
import torch

from tests.checked import CALLS, Finder, state, switched_off

MODULE = """
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, no_type_check

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown


@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, "m k"]
    right: "Float[Tensor, 'k n']"

    @property
    def size(self) -> tuple[int, int]:
        return len(self.left), self.right.shape[-1] if len(self.left) else "none"

    def plus(self, other: "Pair", *, times: float = 1) -> "Pair":
        return Pair(self.left + times * other.left, self.right)


def product(x: Float[Tensor, "m k"], y: Float[Tensor, "k n"] | None) -> Float[Tensor, "m n"]:
    return x if y is None else x @ y


def nothing(x: Float[Tensor, " m"], y: Tensor) -> Float[Tensor, " m"]:
    return y


def with_inner(value: object) -> int:
    def inner(n: int) -> int:
        return n

    return inner(value)


@contextmanager
def opened(n: int):
    yield n


def unknown(x: "Unknown") -> "Unknown":
    return x


@no_type_check
def unchecked(n: int) -> str:
    return n
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "measured.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Finder("measured"), *sys.meta_path])
    yield importlib.import_module("measured")
    del sys.modules["measured"]


def test_sizes_of_one_name_are_one(module):
    x, y = torch.ones(2, 3), torch.ones(3, 4)
    assert module.product(x, y).shape == (2, 4)
    with pytest.raises(TypeError, match="product"):
        module.product(x, torch.ones(2, 4))


def test_a_result_has_the_sizes_of_the_arguments(module):
    module.nothing(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="return"):
        module.nothing(torch.ones(2), torch.ones(3))


def test_dataclasses_are_checked_where_they_are_made_and_in_their_methods(module):
    pair = module.Pair(torch.ones(2, 3), torch.ones(3, 4))
    assert pair.size == (2, 4)
    assert pair.plus(pair, times=2).left.sum() == 18
    with pytest.raises(TypeError, match="right"):
        module.Pair(torch.ones(2, 3), torch.ones(4, 4))
    with pytest.raises(TypeError, match="other"):
        pair.plus(3)
    with pytest.raises(TypeError, match="return"):
        module.Pair(torch.ones(0, 3), torch.ones(3, 4)).size  # noqa: B018


def test_inner_functions_are_checked_the_first_time(module):
    with pytest.raises(TypeError, match="inner"):
        module.with_inner("three")


def test_other_decorators_and_unknown_names_stand(module):
    with module.opened(3) as n:
        assert n == 3
    with pytest.raises(TypeError, match="opened"), module.opened("three"):
        pass
    assert module.unknown(3) == module.unchecked(3) == 3
    assert module.product.__annotations__["return"] is not None
    assert module.unknown.__annotations__["x"] == "Unknown"


def test_they_can_be_switched_off(module):
    with switched_off():
        assert module.product(3, None) == 3
    with pytest.raises(TypeError, match="product"):
        module.product(3, None)


def test_the_first_calls_in_a_test_are_checked(module):
    for _ in range(CALLS):
        module.nothing(torch.ones(2), torch.ones(2))
    assert module.nothing(3, 4) == 4
    state.test += 1
    with pytest.raises(TypeError, match="nothing"):
        module.nothing(3, 4)
