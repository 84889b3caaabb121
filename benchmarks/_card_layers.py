"""Layers in bfloat16 on a card: two products, one kernel, `torch.compile`, and `nn.Linear`."""

from collections.abc import Iterator
from copy import copy
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._card import Attempt, Clock, Row, Sizes, kernels
from matrigami import BlockTensorTrain, Kronecker, LowRank, Monarch, MonarchMatrix, Structure
from matrigami.nn import StructuredLinear
from matrigami.structures import BlockTensorTrainMatrix


class Contestant(NamedTuple):
    """A layer, the way its products take, and whether the library takes it of itself."""

    name: str
    layer: nn.Module
    mode: str = "0"
    taken: str = ""


class Case(NamedTuple):
    """An input, the gradient of its output, and what `nn.Linear` takes: one pass, and both."""

    x: Tensor
    g: Tensor
    dense: tuple[float, float] | None


def recipes(d: int) -> dict[str, Structure]:
    """Structures of a layer."""
    return {
        "BTT, r=1": BlockTensorTrain(rank=1),
        "BTT, r=4": BlockTensorTrain(rank=4),
        "Monarch, 4 blocks": Monarch(blocks=4),
        "Monarch, 32 blocks": Monarch(blocks=32),
        f"low rank, r={d // 16}": LowRank(rank=d // 16),
        "Kronecker": Kronecker(),
    }


def layers(sizes: Sizes, clock: Clock) -> Iterator[Attempt]:
    """Forward, and forward and backward, of each layer, size and number of tokens."""
    for d in sizes.dims:
        for tokens in sizes.tokens:
            x = torch.randn(tokens, d, device=sizes.device, dtype=torch.bfloat16)
            case = Case(x.requires_grad_(), torch.randn_like(x), None)
            linear = Contestant("nn.Linear", nn.Linear(d, d, **_options(sizes)), taken="yes")
            row = measured(linear, case, clock)
            yield linear.name, partial(dict, row)
            case = case._replace(dense=(row["forward_ms"], row["both_ms"]))
            for name, recipe in recipes(d).items():
                layer = StructuredLinear(d, d, recipe, **_options(sizes))
                for one in _ways(name, layer, x, last=tokens == sizes.tokens[-1]):
                    yield f"{one.name}, d={d}, {tokens} tokens", partial(measured, one, case, clock)


def _options(sizes: Sizes) -> dict[str, Any]:
    return {"device": sizes.device, "dtype": torch.bfloat16, "bias": False}


def _ways(name: str, layer: StructuredLinear, x: Tensor, *, last: bool) -> Iterator[Contestant]:
    """Two products, one kernel where it fits, and compiled."""
    ratio = _ratio(layer, x)
    yield Contestant(name, layer, taken=_taken(ratio, one=False))
    if ratio is not None:
        yield Contestant(f"{name}, one kernel", layer, "1", _taken(ratio, one=True))
    if last and name in {"BTT, r=1", "Monarch, 32 blocks"}:
        torch._dynamo.reset()  # past its limit of recompilations it runs the plain path, silently
        compiled = copy(layer)
        compiled.compile()
        yield Contestant(f"{name}, compiled", compiled)


def _taken(ratio: float | None, *, one: bool) -> str:
    """In which passes the library takes this way."""
    ratio = 2.0 if ratio is None else ratio
    passes = {"forward": (ratio <= 1) == one, "both": (ratio <= 0.5) == one}
    return "yes" if all(passes.values()) else " ".join(k for k, v in passes.items() if v)


def _ratio(layer: StructuredLinear, x: Tensor) -> float | None:
    """The time of one kernel over that of two, as the library measured it; None without one."""
    A = layer.matrix()
    if x.device.type != "cuda" or find_spec("triton") is None:
        return None
    if not isinstance(A, MonarchMatrix | BlockTensorTrainMatrix):
        return None
    from matrigami.operators import _fused, _two_factors  # noqa: PLC0415 - needs Triton

    train = A.train if isinstance(A, MonarchMatrix) else A
    (first, second), layout = train.cores, (train.reversed_rows, train.reversed_columns)
    (g, _, r, i, a, _), j = first.shape, second.shape[-3]
    X, R, L = x.detach().mT, first.detach().reshape(g, r, i, a), second.detach()
    L = L.reshape(i, j, g, r)
    choice = _fused.chosen(X, R, L, layout, lambda: _two_factors.by_two(X, R, L, layout)[0])
    return None if choice.tile is None else choice.ratio


def measured(one: Contestant, case: Case, clock: Clock) -> Row:
    """One line of the table."""
    layer, (tokens, d) = one.layer, case.x.shape
    with kernels(one.mode):
        forward = clock(partial(_forward, layer, case.x))
        replayed = clock.replayed(partial(_forward, layer, case.x))
        both = clock(partial(_both, layer, case.x, case.g))
    macs = layer.cost().macs if isinstance(layer, StructuredLinear) else d * d
    numbers = 2 * tokens * d + sum(p.numel() for p in layer.parameters())
    dense = case.dense or (1e3 * forward, 1e3 * both)
    return {
        "d": d,
        "tokens": tokens,
        "layer": one.name,
        "taken": one.taken,
        "macs": macs,
        "forward_ms": 1e3 * forward,
        "replayed_ms": 1e3 * replayed,
        "both_ms": 1e3 * both,
        "tflops": 2 * tokens * macs / replayed / 1e12,
        "tbytes": 2 * numbers / replayed / 1e12,
        "faster_forward": dense[0] / forward / 1e3,
        "faster_both": dense[1] / both / 1e3,
    }


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _both(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), (x, *layer.parameters()), g)
