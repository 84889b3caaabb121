"""Second moments as metrics: checked, damped, factored, and the loss that they measure.

Shapes: m = rows, n = columns.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import DenseMatrix, gram, metric_fault, operator

BLOCK = 128
"""Columns of a symmetric moment that are multiplied at once, with those behind them."""


@dataclass(frozen=True)
class Sums:
    """What vectors add to the moments of every layer that sees them.

    Attributes:
        squares: Sum of `x x.T`, in double precision.
        rows: Vectors in it.
        rejected: Vectors with NaN or infinite entries, which are not.
        drift: Sum of `(z - x) x.T`; None without `z`.
    """

    squares: Float[Tensor, "n n"]
    rows: int
    rejected: int
    drift: Float[Tensor, "n n"] | None

    @classmethod
    def of(cls, x: Float[Tensor, "N n"], z: Float[Tensor, "N n"] | None = None) -> "Sums":
        """Of vectors, and of those in their place in the model as it was given."""
        good = x.isfinite().all(-1)
        rejected = 0 if bool(good.all()) else int((~good).sum())
        if rejected:
            x, z = x[good], None if z is None else z[good]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # sums in half precision are no sums
        unit = unit_of(x)
        x, z = x / unit, None if z is None else z / unit
        drift = None if z is None else ((z - x).nan_to_num(0, 0, 0).mT @ x).double() * unit**2
        return cls(gram(x[None])[0].double() * unit**2, len(x), rejected, drift)


def unit_of(x: Tensor) -> float:
    """A power of two near the largest number: squares in such units neither vanish nor overflow."""
    power = math.frexp(float(x.abs().max()))[1] if x.numel() else 0
    return 2.0 ** max(min(power, 120), -120)


def paired(z: Float[Tensor, "N n"], x: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    """`z`, but `x` in the rows that are no pair: an expert may have been given another token.

    Means aside, vectors of different tokens have squared distances `|z|^2 + |x|^2` in the mean;
    those of a pair are less than half of it.
    """
    finite = torch.where(z.isfinite().all(-1, keepdim=True), z, x).float()
    a, b = finite - finite.mean(0), x.float() - x.float().mean(0)
    limit = (a.square().sum(-1) + b.square().sum(-1).mean()) / 2
    return torch.where(((a - b).square().sum(-1) <= limit)[:, None], z, x)


@dataclass
class Seen:
    """Second moments of the inputs of a layer.

    Attributes:
        A: Mean of `x x.T`.
        holdout: The same of vectors that `A` has not seen.
        rows: Vectors in `A`.
        held: Vectors in `holdout`.
        rejected: Vectors with NaN or infinite entries, which were left out.
        drift: Sum of `(z - x) x.T` over the vectors in `A`, where the model as it was given has `z`
            in the place of `x`; None where that is not known.
    """

    A: Float[Tensor, "n n"]
    holdout: Float[Tensor, "n n"]
    rows: int = 0
    held: int = 0
    rejected: int = 0
    drift: Float[Tensor, "n n"] | None = None

    @classmethod
    def empty(cls, x: Float[Tensor, "N n"]) -> "Seen":
        """Nothing yet, for vectors of this size."""
        n = x.shape[-1]
        zeros = torch.zeros(2, n, n, dtype=torch.float64, device=x.device)
        return cls(zeros[0], zeros[1])

    def add(self, sums: "Sums", held: bool) -> None:
        """Count vectors in one of the means."""
        self.rejected += sums.rejected
        if sums.drift is not None:
            self.drift = sums.drift if self.drift is None else self.drift + sums.drift
        total = self.holdout if held else self.A
        total += sums.squares
        self.held, self.rows = self.held + sums.rows * held, self.rows + sums.rows * (not held)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The two means; without vectors of its own the second is the first."""
        A = self.A / max(self.rows, 1)
        return A, self.holdout / self.held if self.held else A


def checked_moments(
    name: str, W: Tensor, A: object, B: object, holdout: object
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Weights and moments in double precision, and the moment by which the loss is told.

    Without `A` it is the identity.

    Raises:
        ValueError: If the sizes do not fit, or something is not finite, or no moment.
    """
    if not bool(W.isfinite().all()):
        raise ValueError(f"{name}(W): W has NaN or infinite entries.\nMend the weights first.")
    m, n = W.shape[-2:]
    inputs = torch.eye(n, device=W.device) if A is None else A
    first = _moment(name, "A", inputs, (m, n), n)
    gradients = None if B is None else _moment(name, "B", B, (m, n), m)
    judge = first if holdout is None else _moment(name, "holdout", holdout, (m, n), n)
    return W.double(), first, gradients, judge


def _moment(name: str, label: str, M: object, sizes: tuple[int, int], size: int) -> Tensor:
    """A moment of the right size, dense and in double precision."""
    dense = operator(M).dense()
    fault = "is complex" if dense.is_complex() else ""
    if tuple(dense.shape[-2:]) != (size, size):
        shape = "x".join(map(str, dense.shape))
        raise ValueError(
            f"{name}(W, {label}): {label} is {shape}, and W {sizes[0]}x{sizes[1]}.\n"
            f"{label} must be {size}x{size}."
        )
    if fault := fault or metric_fault(DenseMatrix(dense.detach())):
        raise ValueError(
            f"{name}(W, {label}): {label} {fault}.\n"
            "Give a second moment: a mean of x x.T over finite vectors x."
        )
    return dense.double()


def checked_dampings(name: str, damping: float | tuple[float, ...]) -> tuple[float, ...]:
    """One damping or several.

    Raises:
        ValueError: If there is none, or one below zero or not finite.
    """
    options = damping if isinstance(damping, tuple) else (damping,)
    numbers = all(isinstance(d, int | float) and 0 <= d < math.inf for d in options)
    if not options or not numbers:
        raise ValueError(
            f"{name}(damping={damping}): it must be a number from 0, or some of them.\n"
            "It is a share of the mean of the diagonal, e.g. 0.01 or (0.001, 0.01)."
        )
    return options


def damped(M: Tensor, damping: float) -> Tensor:
    """A moment with a share of the mean of its diagonal added to the diagonal."""
    mean = M.diagonal(dim1=-2, dim2=-1).mean(-1)
    amount = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return M + amount[..., None, None] * torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


def unit_lower(M: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """`L` and the diagonal of `D` with `M = L D L.T`.

    Raises:
        ValueError: If the matrix is not positive definite.
    """
    C, failed = torch.linalg.cholesky_ex(M)
    if bool((failed > 0).any()) or not bool(C.isfinite().all()):
        raise ValueError(
            f"round_ldl(W, A, B): {name} is not positive semi-definite, or not finite.\n"
            "Give a second moment, or a larger damping."
        )
    d = C.diagonal(dim1=-2, dim2=-1)
    return C / d[..., None, :], d.square()


def relative(part: Tensor, whole: Tensor) -> Tensor:
    """A loss in parts of that of removing everything, or another ratio; zero of nothing."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(part))


def row_losses(E: Tensor, A: Tensor, B: Tensor | None) -> Float[Tensor, "*batch m"]:
    """`tr(B E A E.T)` by rows; without B half of the products are enough, as A is symmetric."""
    if B is not None:
        return ((B @ E) @ A * E).sum(-1)
    total = E.new_zeros(E.shape[:-1])
    for start in range(0, E.shape[-1], BLOCK):
        own, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        part = E[..., later] @ A[..., later, own]
        part = 2 * part + E[..., own] @ A[..., own, own]
        total = total + (part * E[..., own]).sum(-1)
    return total
