"""Layers survive the compiler and the exporter: one graph, the same numbers."""

import pytest
import torch
from torch import nn

from matrigami import KroneckerMatrix, solve
from matrigami.nn import StructuredLinear
from matrigami.structures import EXAMPLES

pytestmark = pytest.mark.compile


def model_of(name: str) -> nn.Module:
    torch._dynamo.reset()
    try:
        layer = StructuredLinear(12, 8, EXAMPLES[name])
    except ValueError:  # a square structure
        layer = StructuredLinear(12, 12, EXAMPLES[name])
    return nn.Sequential(layer, nn.GELU())


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_graph_forward_and_backward(name):
    model = model_of(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, requires_grad=True)
    leaves = [x, *model.parameters()]
    torch.testing.assert_close(compiled(x), model(x))
    got = torch.autograd.grad(compiled(x).square().sum(), leaves)
    wanted = torch.autograd.grad(model(x).square().sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["monarch", "btt"])
def test_compiled_to_native_code(name):
    model = model_of(name)
    x = torch.randn(5, 12)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("name", EXAMPLES)
def test_exported_with_any_number_of_tokens(name):
    model = model_of(name)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(model, (torch.randn(5, 12),), dynamic_shapes=({0: tokens},))
    x = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_value_is_an_argument_of_a_compiled_function():
    """A value is a pytree, so that functions of values compile."""
    torch._dynamo.reset()

    def step(A: KroneckerMatrix, b: torch.Tensor) -> torch.Tensor:
        return A.matmat(solve(A, b[:, None]))[:, 0]

    A = KroneckerMatrix(torch.randn(3, 3), torch.randn(2, 2))
    b = torch.randn(6)
    compiled = torch.compile(step, backend="eager")
    torch.testing.assert_close(compiled(A, b), b)
