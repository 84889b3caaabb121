"""Products of two factors: without copies, with all derivatives, and in one kernel of Triton."""

import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from matrigami import BlockTensorTrain, Kronecker, Monarch, Structure
from matrigami.nn import StructuredLinear
from matrigami.operators import _two_factors, two_factors

LAYOUTS = [(False, False), (True, False), (False, True), (True, True)]
SHAPES = [(4, 1, 4, 4, 4), (3, 2, 5, 7, 4), (5, 3, 2, 6, 9), (1, 2, 3, 1, 5)]
"""g, r, i, a, j."""


def factors(shape, k, **kind):
    g, r, i, a, j = shape
    sizes = (k, g * a), (g, r, i, a), (i, j, g, r)
    x, R, L = (torch.randn(size, **kind) for size in sizes)
    return x.mT, R / a**0.5, L / (g * r) ** 0.5


def dense(R, L, rows, columns):
    """`W[(i, j), (g, a)] = sum_r L[i, j, g, r] R[g, r, i, a]`, in any layout."""
    out, into = "ji" if rows else "ij", "ag" if columns else "ga"
    W = torch.einsum(f"ijgr,gria->{out}{into}", L, R)
    return W.flatten(0, 1).flatten(1, 2)


def product(X, R, L, layout):
    rows, columns = layout
    return two_factors(X, R, L, interleaved_rows=rows, interleaved_columns=columns)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_dense_product_with_its_gradients(shape, layout):
    X, R, L = (t.requires_grad_() for t in factors(shape, 5))
    got, wanted = product(X, R, L, layout), dense(R, L, *layout) @ X
    torch.testing.assert_close(got, wanted)
    for like in (torch.randn_like(got), torch.randn_like(got.mT.contiguous()).mT):
        ours, theirs = (torch.autograd.grad(Y, (X, R, L), like, True) for Y in (got, wanted))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_derivatives(layout):
    X, R, L = (t.requires_grad_() for t in factors((3, 2, 2, 2, 3), 2))
    torch.autograd.gradgradcheck(lambda *args: product(*args, layout), (X, R, L))


@pytest.mark.parametrize("needed", range(3))
def test_only_the_gradients_that_are_asked_for(needed):
    arguments = factors((3, 2, 2, 2, 3), 4)
    arguments[needed].requires_grad_()
    got = product(*arguments, (True, False)).square().sum()
    X, R, L = arguments
    wanted = (dense(R, L, True, False) @ X).square().sum()
    ours, theirs = (torch.autograd.grad(y, arguments[needed])[0] for y in (got, wanted))
    torch.testing.assert_close(ours, theirs)


def test_gradients_of_many_outputs_at_once():
    X, R, L = (t.requires_grad_() for t in factors((3, 2, 2, 2, 3), 4))
    got, wanted = product(X, R, L, (True, True)), dense(R, L, True, True) @ X
    many = torch.randn(6, *got.shape)
    ours, theirs = (
        torch.autograd.grad(Y, (X, R, L), many, is_grads_batched=True) for Y in (got, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_tracers_see_plain_operations():
    """The graph has derivatives, and FLOPs are counted."""
    layer, x = StructuredLinear(16, 16, Monarch(blocks=4), bias=False), torch.randn(5, 16)
    graph = make_fx(layer)(x)
    ours, theirs = (
        torch.autograd.grad(call(x).square().sum(), layer.get_parameter("right"))
        for call in (graph, layer)
    )
    torch.testing.assert_close(ours, theirs)
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * 5 * layer.cost().macs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_kernel_does_not_keep_is_computed_again(layout, monkeypatch):
    tensors = [t.requires_grad_() for t in factors((3, 2, 2, 2, 3), 4)]
    kept = torch.autograd.grad(product(*tensors, layout).square().sum(), tensors)
    monkeypatch.setattr(
        _two_factors, "_forward", lambda *given: (_two_factors.by_two(*given[:4])[0], None)
    )
    again = torch.autograd.grad(product(*tensors, layout).square().sum(), tensors)
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def copies(call, numbers: int) -> int:
    """How often a call copies that many numbers."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    shapes = [e.input_shapes[0] for e in seen.events() if e.name == "aten::copy_"]
    return sum(torch.Size(shape).numel() >= numbers for shape in shapes)


@pytest.mark.parametrize(
    ("recipe", "row_gradient"),
    [
        (BlockTensorTrain(rank=1), 0),
        (BlockTensorTrain(rank=4), 0),
        (BlockTensorTrain(rank=2, interleaved=True), 1),
        (Monarch(blocks=4), 1),
        (Monarch(blocks=4, interleaved=False), 0),
        (Kronecker(), 1),
    ],
    ids=str,
)
def test_nothing_is_copied(recipe: Structure, row_gradient: int):
    """A gradient that comes row by row is transposed where rows are interleaved."""
    layer, x = StructuredLinear(64, 64, recipe, bias=False), torch.randn(200, 64)
    x.requires_grad_()
    leaves = (x, *layer.parameters())
    y = layer(x)
    counts = Counter(
        forward=copies(lambda: layer(x), x.numel()),
        backward=copies(
            lambda: torch.autograd.grad(y, leaves, torch.randn_like(y), True), x.numel()
        ),
        rows=copies(lambda: torch.autograd.grad(y, leaves, torch.randn(200, 64), True), x.numel()),
    )
    assert counts == {"forward": 0, "backward": 0, "rows": row_gradient}


INTERPRETED = """
import sys, torch
sys.path.insert(0, "tests/operators")
from test_two_factors import LAYOUTS, SHAPES, check_kernel, factors
for shape in SHAPES:
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.float16):  # its products of bfloat16 are of bits
            assert check_kernel(shape, layout, dtype, "cpu") >= 2
print("checked", len(SHAPES) * len(LAYOUTS))
from matrigami.operators import _fused
print(len(_fused.tiles(*factors(SHAPES[0], 1, dtype=torch.float64)[1:])))
"""


def check_kernel(shape, layout, dtype, device, k=37):
    """The first tiles against the dense product in double precision, into poisoned memory."""
    from matrigami.operators import _fused

    torch.set_float32_matmul_precision("highest")
    X, R, L = factors(shape, k, dtype=dtype, device=device)
    wanted = dense(R.double(), L.double(), *layout) @ X.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    found = _fused.tiles(R, L)[:2]
    for tile, given in zip(found, (X, X.contiguous()), strict=False):
        X.new_full((shape[2] * shape[4] * k,), torch.nan)  # freed, and given to the result
        got = _fused.run(given, R, L, layout, tile).double()
        error = float((got - wanted).norm() / wanted.norm())
        assert error < tolerance, (shape, layout, dtype, tile, error)
    return len(found)


def why_not() -> str:
    """Why the kernel cannot be interpreted."""
    if find_spec("triton") is None:
        return "needs the extra kernels"
    old = int(version("triton").split(".")[1]) < 9
    new_numpy = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    return "Triton before 3.9 interprets with NumPy below 2.4" if old and new_numpy else ""


@pytest.mark.skipif(why_not() != "", reason=why_not())
def test_kernel_in_the_interpreter():
    """In a process of its own: the interpreter replaces the compiler for good."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TYPECHECK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", "16", "0"]  # sums are in single precision


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_on_a_card(layout, dtype):
    shapes = [(3, 2, 5, 7, 4), (32, 1, 32, 32, 32), (8, 4, 8, 12, 20)]
    for shape in shapes if dtype == torch.bfloat16 else shapes[:1]:
        assert check_kernel(shape, layout, dtype, "cuda", k=1037) == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # first product of a thread
@pytest.mark.parametrize("mode", ["0", "1"])
@pytest.mark.parametrize("layout", LAYOUTS[1:3])
@pytest.mark.parametrize("shape", [(16, 1, 16, 16, 16), (3, 2, 5, 7, 4)])
def test_gradients_on_a_card(shape, layout, mode, monkeypatch):
    """By two products, and by one kernel."""
    monkeypatch.setenv("MATRIGAMI_TRITON", mode)
    torch.set_float32_matmul_precision("highest")
    tensors = [t.requires_grad_() for t in factors(shape, 301, dtype=torch.float32, device="cuda")]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got, wanted = product(*tensors, layout), dense(*exact[1:], *layout) @ exact[0]
    g = torch.randn_like(wanted)
    ours, theirs = (
        torch.autograd.grad(got, tensors, g.float()),
        torch.autograd.grad(wanted, exact, g),
    )
    for a, b in zip((got, *ours), (wanted, *theirs), strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe", [BlockTensorTrain(rank=2), Monarch(blocks=8), Kronecker()], ids=str
)
def test_layers_in_a_graph_on_a_card(recipe):
    """A recorded graph replays what a call computes."""
    layer = StructuredLinear(64, 64, recipe, device="cuda", dtype=torch.float32)
    x = torch.randn(256, 64, device="cuda", dtype=torch.float32)
    with torch.no_grad():
        wanted = layer(x)
        for _ in range(3):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer(x)
        graph.replay()
    torch.testing.assert_close(got, wanted)
    W = layer.matrix().dense().double()
    torch.testing.assert_close(got.double(), x.double() @ W.mT, atol=1e-4, rtol=1e-4)
