"""Shape annotations are checked at run time in every test, except under compile."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from _pytest.doctest import DoctestItem
from hypothesis import settings

from tests.checked import install, state, switched_off

TYPECHECK = os.environ.get("TYPECHECK", "1") == "1"
if TYPECHECK:
    install("matrigami")

collect_ignore = [] if find_spec("triton") else ["src/matrigami/operators/_fused.py"]

settings.register_profile(
    "everyday", deadline=None, derandomize=True, database=None, max_examples=20
)
settings.register_profile("nightly", deadline=None, max_examples=300)
settings.load_profile("everyday")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeded; tests in double precision, doctests in single, as a user sees them."""
    before = torch.get_default_dtype()
    state.test += 1
    torch.manual_seed(0)
    torch.set_default_dtype(before if isinstance(request.node, DoctestItem) else torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As a user runs it: the package itself refuses what is of a wrong type."""
    with switched_off():
        yield


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Seeded as well: what a module draws for its parameters, when it is imported."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dynamo cannot trace the run-time checks, and a machine may have no accelerator."""
    for item in items:
        if TYPECHECK and item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.skip(reason="runs with TYPECHECK=0"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
