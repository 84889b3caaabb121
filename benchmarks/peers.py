"""Layers of other libraries, where they are installed."""

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor, nn

from matrigami.operators import factorize


def layers(d: int) -> dict[str, tuple[nn.Module, int]]:
    """The layers that can be built here, by name, with the multiply-adds of one vector."""
    return {name: build(d) for name, (_, module, build) in PEERS.items() if not _failure(module)}


def versions() -> dict[str, str]:
    """The libraries that are here."""
    return {
        package: version(package) for package, module, _ in PEERS.values() if not _failure(module)
    }


def missing() -> list[str]:
    """One line for each library that cannot be imported."""
    failures = {package: _failure(module) for package, module, _ in PEERS.values()}
    return [f"Skipped {package}: {reason}." for package, reason in failures.items() if reason]


def _failure(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _tensorly(d: int) -> tuple[nn.Module, int]:
    """Tensor train of rank 8 by tensorly-torch, with balanced axes."""
    tltorch = import_module("tltorch")
    a, b = factorize(d, 2)
    layer = tltorch.FactorizedLinear(
        (a, b),
        (a, b),
        factorization="blocktt",
        rank=[1, 8, 1],
        implementation="factorized",
        bias=False,
    )
    return layer, 8 * d * (a + b)


def _torch_structured(d: int) -> tuple[nn.Module, int]:
    """Monarch of 16 blocks by torch-structured."""
    module = import_module("torch_structured.monarch.monarch_linear")
    layer = module.MonarchLinear(d, d, nblocks=16, bias=False)
    return layer, sum(p.numel() for p in layer.parameters())


class _Operator(nn.Module):
    """A Kronecker product by CoLA."""

    def __init__(self, d: int) -> None:
        super().__init__()
        a, b = factorize(d, 2)
        self.left = nn.Parameter(torch.randn(a, a) / a**0.5)
        self.right = nn.Parameter(torch.randn(b, b) / b**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply columns."""
        ops = import_module("cola.ops")
        return (ops.Kronecker(ops.Dense(self.left), ops.Dense(self.right)) @ x.mT).mT


def _cola(d: int) -> tuple[nn.Module, int]:
    """Kronecker product by CoLA."""
    return _Operator(d), d * sum(factorize(d, 2))


PEERS: dict[str, tuple[str, str, Callable[[int], tuple[nn.Module, int]]]] = {
    "tensorly-torch TT, r=8": ("tensorly-torch", "tltorch", _tensorly),
    "torch-structured Monarch, 16 blocks": (
        "torch-structured",
        "torch_structured.monarch.monarch_linear",
        _torch_structured,
    ),
    "CoLA Kronecker": ("cola-ml", "cola.ops", _cola),
}
"""Name of the row: the package, what to import, and how to build the layer."""
