"""Both products of two factors in one kernel of Triton, where the factors fit on the chip.

A program keeps the blocks of `R` and `L` for some of the output blocks in shared memory and streams
tokens past them; what is between the factors never leaves the chip. Products accumulate in float32.
Imported on a CUDA card with Triton only. It is taken where it agrees with two products and is
measured to be faster; `MATRIGAMI_TRITON=0` in the environment turns it off, `=1` takes the fastest
tile in any case.

Shapes: g = input blocks, a = their columns, i = output blocks, j = their rows, r = rank of a tile,
k = tokens; capitals are the next powers of two, which are padded by zeros.
"""

import os
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import Any, NamedTuple, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton import language as tl  # pyright: ignore[reportMissingImports]

SHARED = 224 * 1024
"""Bytes of shared memory that a program may take; half of that lets two run side by side."""
READS = 4
"""Most times that the input may be read: once for each set of output blocks."""
SUMS = 2**15
"""Most sums in the registers of a program."""
WARPS = 8
TYPES = (torch.float16, torch.bfloat16, torch.float32)

FAILURES = (triton.TritonError, RuntimeError, OSError, CalledProcessError)
"""What a machine may miss: memory on the chip, a C compiler, the headers of Python."""


class Tile(NamedTuple):
    """What a program holds: tokens, output blocks, and bytes of shared memory."""

    tokens: int
    blocks: int
    memory: int


class Choice(NamedTuple):
    """The fastest tile, and its time over that of two separate products."""

    tile: Tile | None
    ratio: float


_CHOICES: dict[tuple[Any, ...], Choice] = {}
"""What was measured, by device, type, shapes and layouts."""


def tiles(R: Tensor, L: Tensor) -> list[Tile]:
    """The tiles that fit, those that read the input least often first."""
    (G, rank, I, A, J), i, found = _padded(R, L), R.shape[2], []
    I = max(I, 8 // rank)
    if R.dtype not in TYPES:
        return []
    while I >= 1 and triton.cdiv(i, I) <= READS and I * rank >= 8:
        for tokens in (32, 16):
            if tokens * I * max(G * rank, J) > SUMS:
                continue
            numbers = G * (rank * I * (A + J) + tokens * (A + rank * I))
            found.append(Tile(tokens, I, numbers * R.element_size()))
        I //= 2
    return [tile for tile in found if tile.memory <= SHARED]


def chosen(
    X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool], two: Callable[[], Tensor]
) -> Choice:
    """The tile to take, if any: checked and measured once for each kind of product."""
    mode = os.environ.get("MATRIGAMI_TRITON")
    if mode == "0" or torch.are_deterministic_algorithms_enabled():
        return Choice(None, 1.0)
    precision = torch.get_float32_matmul_precision()
    about = X.device, X.dtype, precision, X.shape[1].bit_length(), X.stride(0) == 1
    key = *about, R.shape, L.shape[1], R.stride(), L.stride(), layout, mode
    if key not in _CHOICES:
        capturing = torch.cuda.is_current_stream_capturing()  # then nothing can be measured
        measured = None if capturing else _measured(X, R, L, layout, two)
        if measured is None:
            return Choice(None, 1.0)
        _CHOICES[key] = measured
    choice = _CHOICES[key]
    return choice._replace(ratio=0.0) if mode == "1" else choice


def _measured(
    X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool], two: Callable[[], Tensor]
) -> Choice | None:
    """Every tile against two separate products; one that does not build, or is wrong, is left out.

    None where there is nothing to compare with: zeros, or what is not finite.
    """
    best, shortest = None, float("inf")
    with torch.no_grad(), torch.cuda.device_of(X):
        exact = two().float()
        size = float(torch.linalg.vector_norm(exact))
        if not 0 < size < float("inf"):
            return None
        allowed = 4 * max(torch.finfo(X.dtype).eps, 1e-3) * size
        for tile in tiles(R, L)[:4]:
            try:
                error = float(torch.linalg.vector_norm(run(X, R, L, layout, tile) - exact))
                seconds = _seconds(lambda tile=tile: run(X, R, L, layout, tile))
            except FAILURES:
                continue
            if error <= allowed and seconds < shortest:
                best, shortest = tile, seconds
        return Choice(best, shortest / _seconds(two) if best else 1.0)


def _seconds(call: Callable[[], object], calls: int = 5) -> float:
    """Seconds of a few calls, the least of three times."""
    call()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def run(X: Tensor, R: Tensor, L: Tensor, layout: tuple[bool, bool], tile: Tile) -> Tensor:
    """The product `(m, k)`, in the memory order of `X`: row by row of what a layer gives."""
    rows, columns = layout
    (g, r, i, a), j, k = R.shape, L.shape[1], X.shape[1]
    G, rank, _, A, J = _padded(R, L)
    Y = X.new_empty(k, i * j).mT if X.stride(0) == 1 else X.new_empty(i * j, k)
    x, y = X.stride(0), Y.stride(0)
    sets = triton.cdiv(i, tile.blocks)
    side_by_side = 2 if 2 * tile.memory <= SHARED else 1
    programs = max(_processors(X) * side_by_side // sets, 1)
    exact = torch.get_float32_matmul_precision() == "highest"
    grid = sets, min(programs, triton.cdiv(k, tile.tokens))
    with torch.cuda.device_of(X):  # Triton launches on the current one
        _product[grid](  # pyright: ignore[reportIndexIssue]
            *(X, R, L, Y, k, g, r, i, a, j),
            *((x, x * g) if columns else (x * a, x)),
            *(X.stride(1), *R.stride(), *L.stride()),
            *((y, y * i) if rows else (y * j, y)),
            Y.stride(1),
            *(tile.tokens, G, rank, tile.blocks, A, J, "ieee" if exact else "tf32"),
            num_warps=WARPS,
        )
    return Y


def _processors(X: Tensor) -> int:
    """Multiprocessors of the card."""
    if X.device.type != "cuda":  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(X.device).multi_processor_count


def _padded(R: Tensor, L: Tensor) -> tuple[int, int, int, int, int]:
    """`G`, the rank, `I`, `A` and `J`: powers of two, and sums of at least 16 terms."""
    g, r, i, a, j = map(triton.next_power_of_2, (*R.shape, L.shape[1]))
    return max(g, 16 // r), r, i, max(a, 16), max(j, 8)


@triton.jit(do_not_specialize=["k"])  # else it is compiled anew for odd numbers of tokens
@no_type_check
def _product(
    X: tl.tensor,
    R: tl.tensor,
    L: tl.tensor,
    Y: tl.tensor,
    k: tl.tensor,
    g: tl.tensor,
    r: tl.tensor,
    i: tl.tensor,
    a: tl.tensor,
    j: tl.tensor,
    x_g: tl.tensor,
    x_a: tl.tensor,
    x_k: tl.tensor,
    r_g: tl.tensor,
    r_r: tl.tensor,
    r_i: tl.tensor,
    r_a: tl.tensor,
    l_i: tl.tensor,
    l_j: tl.tensor,
    l_g: tl.tensor,
    l_r: tl.tensor,
    y_i: tl.tensor,
    y_j: tl.tensor,
    y_k: tl.tensor,
    TOKENS: tl.constexpr,
    G: tl.constexpr,
    RANK: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    J: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """`I` output blocks of every so many tokens; strides are named by their axes."""
    groups, columns, rows = tl.arange(0, G), tl.arange(0, A), tl.arange(0, J)
    outs, inner = tl.program_id(0) * I + tl.arange(0, I), tl.arange(0, I * RANK)
    out, rank = tl.program_id(0) * I + inner // RANK, inner % RANK
    in_g, in_a = (groups < g)[:, None, None], columns < a
    ends = R + (out * r_i + rank * r_r)[None, None, :]
    held = in_g & in_a[None, :, None] & ((out < i) & (rank < r))[None, None, :]
    places = ends + groups[:, None, None] * r_g + columns[None, :, None] * r_a
    right = tl.load(places, mask=held, other=0.0)
    middle = tl.arange(0, G * RANK)
    group, rank = middle // RANK, middle % RANK
    in_y = (outs < i)[:, None, None] & (rows < j)[None, None, :]
    held = in_y & ((group < g) & (rank < r))[None, :, None]
    starts = L + (group * l_g + rank * l_r)[None, :, None]
    places = starts + outs[:, None, None] * l_i + rows[None, None, :] * l_j
    left = tl.load(places, mask=held, other=0.0)
    xs = groups[:, None, None] * x_g + columns[None, None, :] * x_a
    ys = outs[:, None, None] * y_i + rows[None, None, :] * y_j
    in_x = in_g & in_a[None, None, :]
    for tile in tl.range(tl.program_id(1), tl.cdiv(k, TOKENS), tl.num_programs(1), num_stages=2):
        tokens = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :, None]
        x = tl.load(X + (xs + tokens * x_k), mask=in_x & (tokens < k), other=0.0)
        z = tl.dot(x, right, input_precision=PRECISION).to(Y.dtype.element_ty)
        z = tl.permute(z.reshape(G, TOKENS, I, RANK), (2, 1, 0, 3)).reshape(I, TOKENS, G * RANK)
        y = tl.dot(z, left, input_precision=PRECISION).to(Y.dtype.element_ty)
        tl.store(Y + (ys + tokens * y_k), y, mask=in_y & (tokens < k))
