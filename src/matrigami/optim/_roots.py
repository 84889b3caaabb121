"""Inverse roots of symmetric positive semidefinite matrices, a stack at a time.

By eigendecomposition (any exponent), by the coupled Newton iteration (any whole root) and by
coupled polynomials, a fixed number of products that never waits for the device (square roots of
square roots). Which is fastest depends on the device and the size: `measured_root` finds out.

Shapes: b = blocks, m = size of the matrices.
"""

import functools
from collections.abc import Callable
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.optim._bases import eigenpairs
from matrigami.optim._polynomials import Polynomial, cans

Root = Callable[[Tensor, float, float], Tensor]
"""A stack, the exponent, and the damping: `A^exponent`."""

CUBICS: tuple[Polynomial, ...] = cans(3e-4, steps=14)
"""For matrices of condition number up to 1e7, the most that single precision resolves."""


def eigh_root(
    A: Float[Tensor, "b m m"], exponent: float, damping: float | Tensor = 0.0
) -> Float[Tensor, "b m m"]:
    """`A^exponent` by eigendecomposition.

    Where the smallest eigenvalue is below `damping`, all are shifted so that it is `damping`. With
    no damping, eigenvalues that are zero up to rounding stay zero: the pseudo-inverse.

    Args:
        A: Symmetric positive semidefinite matrices.
        exponent: Such as -1/4.
        damping: A number, or one for each matrix, of shape `(b, 1)`.

    Examples:
        >>> eigh_root(torch.diag(torch.tensor([0.1, 3.1]))[None], -0.5, 1.0)[0]
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
        >>> eigh_root(torch.diag(torch.tensor([1.0, 4.0, 0.0]))[None], -0.5)[0].diagonal()
        tensor([1.0000, 0.5000, 0.0000])
    """
    e, Q = eigenpairs(A)
    rounding = A.shape[-1] * torch.finfo(A.dtype).eps * e[:, -1:].abs()
    e = e + (damping - e[:, :1]).clamp_min(0) * (e[:, :1] < damping)
    positive = e > rounding * (torch.as_tensor(damping, device=e.device) <= 0)
    power = torch.where(positive, e, 1.0).pow(exponent) * positive
    return (Q * power[:, None]) @ Q.mT


def newton_root(
    A: Float[Tensor, "b m m"], exponent: float, damping: float | Tensor = 0.0, steps: int = 40
) -> Float[Tensor, "b m m"]:
    """`A^(-1/p)` by the coupled Newton iteration of Guo and Higham (2006).

    Raises:
        ValueError: If `-1 / exponent` is not a whole number.

    Examples:
        >>> newton_root(torch.diag(torch.tensor([16.0, 1.0]))[None], -0.25)[0].diagonal()
        tensor([0.5000, 1.0000])
    """
    p = whole_root(exponent)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A = _damped(A, damping)
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A, keepdim=True))
    X, M = z ** (1 / p) * eye, z * A
    for _ in range(steps):
        N = ((p + 1) * eye - M) / p
        X, M = X @ N, torch.linalg.matrix_power(N, p) @ M
        if A.device.type == "cpu" and bool((M - eye).abs().amax() < 1e-6):
            break
    return X


def cans_root(
    A: Float[Tensor, "b m m"], exponent: float, damping: float | Tensor = 0.0
) -> Float[Tensor, "b m m"]:
    """`A^(-1/p)`, `p` a power of 2, by coupled polynomials: only products, no question asked.

    With `Y -> A^(1/2)` and `Z -> A^(-1/2)`, each step multiplies both by the same polynomial of
    `Z Y` (Higham 1997), here the best cubics for the interval instead of Newton-Schulz.

    Raises:
        ValueError: If `-1 / exponent` is not a power of 2.

    Examples:
        >>> cans_root(torch.diag(torch.tensor([16.0, 1.0]))[None], -0.25)[0].diagonal()
        tensor([0.5000, 1.0000])
    """
    p = whole_root(exponent)
    if p & (p - 1):
        raise ValueError(
            f"cans_root(A, {exponent}): the root {p} is not a power of 2.\n"
            "Use eigh_root or newton_root."
        )
    A, Z = _square_roots(_damped(A, damping))
    for _ in range(p.bit_length() - 2):
        A, Z = _square_roots(A)
    return Z


def whole_root(exponent: float) -> int:
    """`p` of the exponent `-1 / p`."""
    p = round(-1 / exponent) if exponent < 0 else 0
    if p < 2 or abs(p * exponent + 1) > 1e-9:
        raise ValueError(
            f"exponent={exponent}: no iteration leads there.\n"
            "They find inverse roots: -1/2, -1/3, -1/4, ...\nUse eigh_root for other exponents."
        )
    return p


def measured_root(device: torch.device, m: int, exponent: float) -> Root:
    """The fastest way to this power on a device, for matrices of about this size.

    It is measured once for each size up to the next power of 2.
    """
    p = -1 / exponent if exponent < 0 else 0.0
    return _measured(device, 1 << (m - 1).bit_length(), p in {2.0, 4.0, 8.0})


@functools.cache
def _measured(device: torch.device, m: int, iterates: bool) -> Root:
    """Time the candidates on a matrix of moderate condition."""
    candidates: tuple[Root, ...] = (eigh_root, cans_root) if iterates else (eigh_root,)
    if len(candidates) == 1 or m < 32:
        return eigh_root
    A = torch.diag(torch.linspace(0.01, 1.0, m, device=device, dtype=torch.float32))[None]
    seconds = {}
    for root in candidates:
        times = []
        for _ in range(2):
            start = perf_counter()
            float(root(A, -0.25, 0.0)[0, 0, 0])  # waits for the device
            times.append(perf_counter() - start)
        seconds[root] = min(times)
    return min(candidates, key=lambda root: seconds[root])


def _square_roots(
    A: Float[Tensor, "b m m"],
) -> tuple[Float[Tensor, "b m m"], Float[Tensor, "b m m"]]:
    """`A^(1/2)` and `A^(-1/2)`."""
    size = 1.01 * torch.linalg.matrix_norm(A, float("inf"), keepdim=True)  # bounds eigenvalues
    size = size.clamp_min(torch.finfo(A.dtype).tiny)
    Y, Z = A / size, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    for a, b, _ in CUBICS:
        H = b * (Z @ Y)
        H.diagonal(dim1=-2, dim2=-1).add_(a)
        Y, Z = Y @ H, H @ Z
    return Y * size.sqrt(), Z / size.sqrt()


def _damped(A: Float[Tensor, "b m m"], damping: float | Tensor) -> Float[Tensor, "b m m"]:
    """The damping on the diagonal."""
    d = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    return A + d.reshape(-1, 1, 1) * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
