"""Odd polynomials whose composition sends every singular value to 1: orthogonalisation by products.

A step is `X <- a X + b (X X') X + c (X X')^2 X`, which acts on the singular values as
`a s + b s^3 + c s^5` and leaves the singular vectors alone.

Shapes: b = blocks, m = rows, n = columns.
"""

import functools
from time import perf_counter
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.optim._bases import of_moderate_size


class Polynomial(NamedTuple):
    """`a x + b x^3 + c x^5`."""

    a: float
    b: float
    c: float = 0.0


QUINTIC = (Polynomial(3.4445, -4.7750, 2.0315),) * 5
"""Jordan et al. (2024): steep at 0; ends in [0.68, 1.16] for singular values above 0.005."""

POLAR_EXPRESS = (
    Polynomial(8.28721201814563, -23.595886519098837, 17.300387312530933),
    Polynomial(4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    Polynomial(3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    Polynomial(3.3184196573706015, -2.488488024314874, 0.51004894012372),
    Polynomial(2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
"""Best quintics one after the other, for [0.001, 1]. Amsel et al. (2025), arXiv:2505.16932."""


def cans(smallest: float, steps: int) -> tuple[Polynomial, ...]:
    """Best cubics one after the other, for singular values in `[smallest, 1]`.

    On `[l, u]` the odd cubic nearest to 1 in the maximum norm takes the values `1 - e` at both
    ends and `1 + e` between; `[1 - e, 1 + e]` is the next interval.
    Source: Grishina, Smirnov and Rakhuba (2025), arXiv:2506.10935.

    Examples:
        >>> first = cans(0.1, steps=2)[0]
        >>> [round(first.a * x + first.b * x**3, 3) for x in (0.1, 1.0)]  # the same at both ends
        [0.393, 0.393]
    """
    found, low, high = [], smallest, 1.0
    for _ in range(steps):
        square = low * low + low * high + high * high
        peak = 2 * (square / 3) ** 1.5
        scale = 2 / (peak + low * high * (low + high))
        found.append(Polynomial(scale * square, -scale))
        error = 1 - scale * low * high * (low + high)
        low, high = 1 - error, 1 + error
    return tuple(found)


CANS = cans(1e-3, steps=9)
"""`cans` for singular values above 0.001, to 1 %."""


ASPECT = 2
"""Columns to a row from which the Gram matrix is iterated on."""

PAIR = 2
"""Steps on one Gram matrix."""


def orthogonalised(
    G: Float[Tensor, "b m n"], polynomials: tuple[Polynomial, ...], dtype: torch.dtype
) -> Float[Tensor, "b m n"]:
    """`U V'` of the singular value decomposition `U S V'`, nearly; zero stays zero.

    Examples:
        >>> G = torch.diag(torch.tensor([1.0, 0.5, 0.1]))[None]
        >>> orthogonalised(G, CANS, torch.float32)[0].diagonal()
        tensor([1.0015, 0.9989, 1.0020])
    """
    X = of_moderate_size(G)
    size = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = (X / size.clamp_min(torch.finfo(G.dtype).tiny)).to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    wide = X.shape[-1] >= ASPECT * X.shape[-2] and dtype != torch.bfloat16
    for i in range(0, len(polynomials), PAIR if wide else 1):
        now = polynomials[i : i + PAIR]
        X = _two_steps(X, *now) if wide and len(now) == PAIR else _step(X, polynomials[i])
    return (X.mT if tall else X).to(G.dtype)


def _step(X: Float[Tensor, "b m n"], p: Polynomial) -> Float[Tensor, "b m n"]:
    """`a X + b (X X') X + c (X X')^2 X`."""
    return torch.baddbmm(X, _even(_gram(X), p), X, beta=p.a)


def _gram(X: Float[Tensor, "b m n"]) -> Float[Tensor, "b m m"]:
    """`X X'`; `X @ X.mT` would copy the transpose first, in half precision."""
    return torch.baddbmm(X.new_empty(1), X, X.mT, beta=0)


def _even(A: Float[Tensor, "b m m"], p: Polynomial) -> Float[Tensor, "b m m"]:
    """`b A + c A^2`."""
    return torch.baddbmm(A, A, A, beta=p.b, alpha=p.c) if p.c else p.b * A


def _two_steps(X: Float[Tensor, "b m n"], p: Polynomial, q: Polynomial) -> Float[Tensor, "b m n"]:
    """Two steps on the small Gram matrix `A = X X'`: two products with `X` instead of four.

    With `E = a + b A + c A^2` the first step is `E X`, whose Gram matrix is `E A E`. More steps
    without a fresh Gram matrix lose small singular values: 1.2e-4 instead of 7e-5 of the result at
    a condition of 1e4 in single precision, and all of it in half.
    """
    A = X @ X.mT
    E = _even(A, p)
    E.diagonal(dim1=-2, dim2=-1).add_(p.a)
    F = _even(E @ A @ E, q)
    return torch.baddbmm(E, F, E, beta=q.a) @ X


@functools.cache
def fastest_dtype(device: torch.device, n: int = 256) -> torch.dtype:
    """The faster of bfloat16 and float32 for a product on a device, measured once.

    Processors without bfloat16 units emulate them, tens of times slower.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        A = torch.ones(n, n, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            start = perf_counter()
            float((A @ A)[0, 0])  # waits for the device
            times.append(perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return min(seconds, key=lambda dtype: seconds[dtype])
