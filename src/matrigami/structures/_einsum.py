"""Einsum: the continuous family that holds every other product of two factors.

`W[(phi eps delta), (gamma beta alpha)] = sum_rho A[gamma rho phi delta alpha] B[phi eps gamma beta
rho]`. The seven sizes are `d^theta`: alpha, beta, gamma split the inputs, delta, eps, phi the
outputs, rho is the rank. `gamma` and `phi` are seen by both factors, `alpha` and `delta` by `A`
only, `beta` and `eps` by `B` only. Special cases, theta in the order alpha, beta, gamma, delta,
eps, phi, rho:

    dense (0,0,1,0,0,1,0)   low rank (1,0,0,0,1,0,r)   Kronecker (1/2,1/2,0,1/2,1/2,0,0)   TT
    (1/2,1/2,0,1/2,1/2,0,r) Monarch (1/2,0,1/2,0,1/2,1/2,0)   BTT (1/2,0,1/2,0,1/2,1/2,r)

Storage `phi delta rho gamma alpha + phi eps rho gamma beta`; cost per vector the cheaper of `n phi
delta rho + m gamma beta rho` (`A` first) and `n phi eps rho + m gamma alpha rho` (`B` first).
Projection: one truncated SVD for each `(phi, gamma)` of the matrix `(delta alpha) x (eps beta)`,
the best approximation for every theta. Source: Potapczynski et al. (2024), arXiv:2410.02117.

Shapes: m = rows, n = columns, k = right-hand sides; the seven sizes by their Greek names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    Contraction,
    Cost,
    Fan,
    LinearOperator,
    Structure,
    add,
    chained,
    contraction,
    contractions,
    cost,
    cropped,
    diagonal,
    diagonal_by_entries,
    entries,
    example,
    fans,
    fitted_corner,
    is_big,
    norm,
    project,
    resolve_rank,
    root_of_squares,
    scale,
    truncated_svd,
)

__all__ = ["Einsum", "EinsumMatrix"]

PADDING = 0.15
"""Largest relative padding of a size whose divisors miss `d^theta` (as in the paper)."""


@dataclass(frozen=True, eq=False, repr=False)
class EinsumMatrix(LinearOperator):
    """The contraction of `A[gamma rho phi delta alpha]` and `B[phi eps gamma beta rho]`.

    With `interleaved_rows` the output axes are `(eps, delta, phi)` instead of `(phi, eps, delta)`,
    with `interleaved_columns` the input axes `(beta, alpha, gamma)` instead of `(gamma, beta,
    alpha)`.
    """

    A: Inexact[Tensor, "*batch gamma rho phi delta alpha"]
    B: Inexact[Tensor, "*batch phi eps gamma beta rho"]
    interleaved_rows: bool = False
    interleaved_columns: bool = False

    @property
    def dims(self) -> tuple[int, int, int, int, int, int, int]:
        """Sizes alpha, beta, gamma, delta, eps, phi, rho."""
        gamma, rho, phi, delta, alpha = self.A.shape[-5:]
        return alpha, self.B.shape[-2], gamma, delta, self.B.shape[-4], phi, rho

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading batch axes, rows, columns."""
        alpha, beta, gamma, delta, eps, phi, _ = self.dims
        batch = torch.broadcast_shapes(self.A.shape[:-5], self.B.shape[:-5])
        return (*batch, phi * eps * delta, gamma * beta * alpha)

    def matmat(self, X: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... m k"]:
        """Contract the factor first that makes the product cheaper."""
        alpha, beta, gamma, *_ = self.dims
        grid = (beta, alpha, gamma) if self.interleaved_columns else (gamma, beta, alpha)
        X = X.unflatten(-2, grid)
        X = X.movedim(-2, -4) if self.interleaved_columns else X  # ... gamma beta alpha k
        a_first, b_first = _orders(self.dims)
        if a_first <= b_first:
            Y = _contract(self.A, self.B, X)  # ... phi eps delta k
        else:
            A = self.A.movedim(
                (-5, -4, -3, -2, -1), (-3, -1, -5, -4, -2)
            )  # phi delta gamma alpha rho
            B = self.B.movedim((-5, -4, -3, -2, -1), (-3, -2, -5, -1, -4))  # gamma rho phi eps beta
            Y = _contract(B, A, X.transpose(-3, -2)).transpose(-3, -2)
        Y = Y.movedim(-4, -2) if self.interleaved_rows else Y
        return Y.flatten(-4, -2)

    @property
    def T(self) -> "EinsumMatrix":
        """Inputs and outputs change places: alpha with delta, beta with eps, gamma with phi."""
        A = self.A.movedim((-5, -4, -3, -2, -1), (-3, -4, -5, -1, -2))
        B = self.B.movedim((-5, -4, -3, -2, -1), (-3, -2, -5, -4, -1))
        return EinsumMatrix(A, B, self.interleaved_columns, self.interleaved_rows)

    def dense(self) -> Inexact[Tensor, "*batch m n"]:
        """The matrix itself."""
        rows = "edf" if self.interleaved_rows else "fed"
        columns = "bag" if self.interleaved_columns else "gba"
        W = torch.einsum(f"...grfda,...fegbr->...{rows}{columns}", self.A, self.B)
        return W.flatten(-3, -1).flatten(-4, -2)


def _check_theta(theta: Sequence[float]) -> None:
    """Seven exponents in [0, 1] whose thirds sum to one."""
    valid = len(theta) == 7 and all(0 <= t <= 1 for t in theta)
    if not valid or abs(sum(theta[:3]) - 1) > 1e-6 or abs(sum(theta[3:6]) - 1) > 1e-6:
        raise ValueError(
            f"Einsum(theta={tuple(theta)}): these are not seven exponents in [0, 1].\n"
            "They are alpha, beta, gamma, delta, eps, phi, rho.\n"
            "alpha + beta + gamma and delta + eps + phi should each be 1."
        )


@example("einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25))
@dataclass(frozen=True)
class Einsum(Structure):
    """The family with exponents `theta`, or with given sizes.

    Args:
        theta: Exponents of alpha, beta, gamma (summing to 1, of the inputs), delta, eps, phi
            (summing to 1, of the outputs) and rho (of the smaller side).
        dims: The seven sizes instead.
        interleaved: Output axes `(eps, delta, phi)` instead of `(phi, eps, delta)`.

    Examples:
        >>> btt = Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))
        >>> btt.init(16, 16), btt.omega, btt.psi, btt.nu
        (EinsumMatrix(16x16, 128 parameters), 0.0, 1.0, 0.5)
    """

    theta: Sequence[float] | None = None
    dims: Sequence[int] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Refuse exponents or sizes that describe no family."""
        if (self.theta is None) == (self.dims is None):
            raise ValueError(
                "Einsum(theta, dims): exactly one of them is needed.\n"
                "It takes seven exponents, or seven sizes.\n"
                "For BTT: Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))."
            )
        if self.dims is not None and (
            len(self.dims) != 7 or any(int(d) != d or d < 1 for d in self.dims)
        ):
            raise ValueError(
                f"Einsum(dims={tuple(self.dims)}): these are not seven positive sizes.\n"
                "They are alpha, beta, gamma, delta, eps, phi, rho."
            )
        if self.theta is not None:
            _check_theta(self.theta)

    @property
    def exponents(self) -> tuple[float, ...]:
        """The seven exponents; of given sizes, logarithms in base `n`, `m` and `min(m, n)`."""
        if self.theta is not None:
            return tuple(map(float, self.theta))
        alpha, beta, gamma, delta, eps, phi, rho = self.dims or (1,) * 7
        n, m = alpha * beta * gamma, delta * eps * phi
        logs = [
            math.log(d) / math.log(b) if b > 1 else 0.0
            for d, b in zip(
                (alpha, beta, gamma, delta, eps, phi, rho),
                (n,) * 3 + (m,) * 3 + (min(m, n),),
                strict=True,
            )
        ]
        return tuple(logs)

    @property
    def omega(self) -> float:
        """Parameter sharing: `macs / params = d^omega`; 0 if every weight is used once."""
        alpha, beta, _, delta, eps, _, _ = self.exponents
        return min(alpha + delta, beta + eps) - min(alpha, eps)

    @property
    def psi(self) -> float:
        """Rank: `rank(W) = d^psi`; 1 is full rank."""
        alpha, _, _, _, eps, _, rho = self.exponents
        return 1 + min(0.0, 1 + rho - alpha - eps)

    @property
    def nu(self) -> float:
        """Compute intensity: `macs = d^(1 + nu)`; 1 is dense."""
        alpha, _, _, _, eps, _, rho = self.exponents
        return 1 + rho - min(alpha, eps)

    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """The tensors of a member.

        Raises:
            ValueError: If given sizes do not multiply to the size of the matrix, or the rank
                exceeds full.
        """
        alpha, beta, gamma, delta, eps, phi, rho = self._sizes(m, n)
        A = empty(gamma, rho, phi, delta, alpha)
        B = empty(phi, eps, gamma, beta, rho)
        return cropped(EinsumMatrix(A, B, self.interleaved), m, n)

    def _sizes(self, m: int, n: int) -> tuple[int, ...]:
        """The seven sizes for one shape."""
        if self.dims is not None:
            alpha, beta, gamma, delta, eps, phi, rho = self.dims
            if (phi * eps * delta, gamma * beta * alpha) != (m, n):
                raise ValueError(
                    f"{self}: it does not fit a {m}x{n} matrix.\n"
                    f"Its sizes multiply to {phi * eps * delta}x{gamma * beta * alpha}.\n"
                    "alpha * beta * gamma should be the columns, delta * eps * phi the rows."
                )
        else:
            exponents = self.exponents
            alpha, beta, gamma = _split_size(n, exponents[:3])
            delta, eps, phi = _split_size(m, exponents[3:6])
            rho = round(min(m, n) ** exponents[6])
        full = min(delta * alpha, eps * beta)
        return (
            alpha,
            beta,
            gamma,
            delta,
            eps,
            phi,
            resolve_rank(rho, full, str(self)) if self.dims else min(rho, full),
        )


@cache
def _split_size(d: int, exponents: tuple[float, ...]) -> tuple[int, ...]:
    """Three sizes near `d^theta` whose product is `d`, or a padded size within the tolerance."""

    def distance(sizes: tuple[int, ...]) -> float:
        """How far the sizes are from their exponents, and from `d`."""
        miss = sum(
            (math.log(s) - e * math.log(d)) ** 2 for s, e in zip(sizes, exponents, strict=True)
        )
        return miss + 10 * (math.prod(sizes) / d - 1)

    limit = max(math.floor(d * (1 + PADDING)), d + 1)
    free = [i for i in range(3) if exponents[i] > 0]
    found = [_place(d, free, [d])] if len(free) == 1 else []
    for size in range(d, limit + 1) if len(free) > 1 else ():
        for first in _divisors(size):
            seconds = _divisors(size // first) if len(free) == 3 else [size // first]
            found += [
                _place(size, free, [first, second, size // first // second][: len(free)])
                for second in seconds
            ]
    return min(found, key=distance)


def _place(size: int, free: list[int], sizes: list[int]) -> tuple[int, ...]:
    """Sizes at the places whose exponent is not zero, 1 elsewhere."""
    return tuple(sizes[free.index(i)] if i in free else 1 for i in range(3))


@cache
def _divisors(n: int) -> list[int]:
    """All divisors of `n`."""
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def _orders(dims: tuple[int, ...]) -> tuple[int, int]:
    """Multiply-adds with `A` first and with `B` first."""
    alpha, beta, gamma, delta, eps, phi, rho = dims
    m, n = phi * eps * delta, gamma * beta * alpha
    return rho * (n * phi * delta + m * gamma * beta), rho * (n * phi * eps + m * gamma * alpha)


def _contract(A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """Apply `A` to the last input axis, then `B`; for BTT and Kronecker without a copy.

    Shapes: A `gamma rho phi delta alpha`, B `phi eps gamma beta rho`, X `gamma beta alpha k`,
        result `phi eps delta k`.
    """
    _, rho, phi, delta, _ = A.shape[-5:]
    A = A.flatten(-4, -2).unsqueeze(-3)  # expanded, for matmul copies X to broadcast a matrix
    Z = A.expand(*A.shape[:-3], X.shape[-3], *A.shape[-2:]) @ X  # ... gamma beta (rho phi delta) k
    Z = Z.unflatten(-2, (rho, phi, delta)).flatten(-6, -4)  # ... (gamma beta rho) phi delta k
    Z = Z.transpose(-4, -3).flatten(-2, -1)  # ... phi (gamma beta rho) (delta k)
    return (B.flatten(-3, -1) @ Z).unflatten(-1, (delta, X.shape[-1]))


@fans.register
def _(A: EinsumMatrix) -> tuple[Fan, ...]:
    alpha, beta, gamma, delta, eps, phi, rho = A.dims
    return Fan(alpha, delta * phi * rho), Fan(beta * gamma * rho, eps, last=True)


@contractions.register
def _(A: EinsumMatrix) -> tuple[Contraction, ...]:
    names = ("alpha", "beta", "gamma", "delta", "eps", "phi", "rho")
    sizes = dict(zip(names, A.dims, strict=True))
    columns = "beta alpha gamma" if A.interleaved_columns else "gamma beta alpha"
    rows = "eps delta phi" if A.interleaved_rows else "phi eps delta"
    a_axes, b_axes = "gamma rho phi delta alpha", "phi eps gamma beta rho"
    a_first, b_first = _orders(A.dims)
    if a_first <= b_first:
        between = "gamma beta rho phi delta"
        first = contraction(A.A, a_axes, columns, between, **sizes)
        return chained(first, contraction(A.B, b_axes, between, rows, **sizes))
    between = "gamma alpha phi eps rho"
    first = contraction(A.B, b_axes, columns, between, **sizes)
    return tuple(reversed(chained(first, contraction(A.A, a_axes, between, rows, **sizes))))


@cost.register
def _(A: EinsumMatrix) -> Cost:
    params = A.A.numel() + A.B.numel()
    return Cost(params, min(_orders(A.dims)) * math.prod(A.shape[:-2]), params * A.A.itemsize)


@add.register(where=lambda A, B: _layout(A) == _layout(B))
def _(A: EinsumMatrix, B: EinsumMatrix) -> EinsumMatrix:
    return EinsumMatrix(
        torch.cat([A.A, B.A], -4),
        torch.cat([A.B, B.B], -1),
        A.interleaved_rows,
        A.interleaved_columns,
    )


def _layout(A: EinsumMatrix) -> tuple[object, ...]:
    """All that two members must share for their ranks to concatenate."""
    return (A.A.shape[:-5], A.dims[:6], A.interleaved_rows, A.interleaved_columns)


@scale.register
def _(A: EinsumMatrix, factor: Tensor) -> EinsumMatrix:
    scaled = A.A * factor[(..., *[None] * 5)]
    return EinsumMatrix(scaled, A.B, A.interleaved_rows, A.interleaved_columns)


@entries.register
def _(A: EinsumMatrix, rows: Tensor, columns: Tensor) -> Inexact[Tensor, "*batch e"]:
    """A sum over the rank, of one number of each factor."""
    alpha, beta, gamma, delta, eps, phi, _ = A.dims
    if A.interleaved_columns:
        b, a, g = torch.unravel_index(columns, (beta, alpha, gamma))
    else:
        g, b, a = torch.unravel_index(columns, (gamma, beta, alpha))
    if A.interleaved_rows:
        e, d, f = torch.unravel_index(rows, (eps, delta, phi))
    else:
        f, e, d = torch.unravel_index(rows, (phi, eps, delta))
    return (A.A.movedim(-4, -1)[..., g, f, d, a, :] * A.B[..., f, e, g, b, :]).sum(-1)


@diagonal.register
def _(A: EinsumMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal_by_entries(A)


@norm.register(where=is_big)
def _(A: EinsumMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    """Gram matrices of the rank, for each pair of phi and gamma."""
    G = torch.einsum("...grfda,...gsfda->...gfrs", A.A, A.A.conj())
    H = torch.einsum("...fegbr,...fegbs->...gfrs", A.B, A.B.conj())
    squares = (G * H).sum((-4, -3, -2, -1)).real
    return root_of_squares(squares)


@project.register
def _(recipe: Einsum, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    m, n = W.shape[-2:]
    alpha, beta, gamma, delta, eps, phi, rho = recipe._sizes(m, n)
    D = torch.nn.functional.pad(W, (0, alpha * beta * gamma - n, 0, delta * eps * phi - m))
    D = D.unflatten(-1, (gamma, beta, alpha))
    D = (
        D.unflatten(-4, (eps, delta, phi)).movedim(-4, -6)
        if recipe.interleaved
        else D.unflatten(-4, (phi, eps, delta))
    )
    tiles = D.movedim(
        (-6, -3, -4, -1, -5, -2), (-6, -5, -4, -3, -2, -1)
    )  # ... phi gamma delta alpha eps beta
    L, R = truncated_svd(tiles.flatten(-2, -1).flatten(-3, -2), rho)
    A = L.unflatten(-2, (delta, alpha)).movedim((-5, -4, -3, -2, -1), (-3, -5, -2, -1, -4))
    B = R.unflatten(-1, (eps, beta)).movedim((-5, -4, -3, -2, -1), (-5, -3, -1, -4, -2))
    return fitted_corner(EinsumMatrix(A, B, recipe.interleaved), W)
