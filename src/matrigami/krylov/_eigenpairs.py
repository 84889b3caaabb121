"""The largest eigenvalues of a Hermitian matrix with their multiplicities: restarted block Lanczos.

The space grows by the residuals of the wanted Ritz vectors. In a Krylov space all residuals lie in
the span of its next block, so this is block Lanczos with full reorthogonalisation; keeping the best
Ritz vectors when the space is full is the thick restart of Wu and Simon (2000), SIAM J. Matrix
Anal. Appl. 22, 602-616. A block with no new direction is filled up at random.

A Krylov space sees at most as many vectors of an eigenspace as its block has columns. So what was
found is taken out and the method runs again from random vectors, until the rest of the spectrum is
below what was found.

Shapes: n = rows = columns, k = wanted pairs, b = block, p = dimension of the space.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from matrigami.krylov._pulled import pulled
from matrigami.krylov._systems import counted, exponents, ldexp, with_precision, working_type
from matrigami.operators import DenseMatrix, Eigh, LinearOperator, operator

BLOCK = 16
"""Most columns of a block: wider ones need more products to converge."""


@counted(k=1, max_steps=0)
def largest_eigenpairs(
    A: Any,
    k: int,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigh:
    """The `k` eigenvalues of largest magnitude of one Hermitian matrix, and their eigenvectors.

    Repeated eigenvalues are found as often as they occur. Every residual `|A v - value v|` is below
    `tol` times the largest value, and what is left out is no larger, by the same measure. Values
    are differentiable once in the tensors of `A` (Hellmann-Feynman), vectors are not. It keeps
    two blocks of about `3 k + 70` vectors; where that is not less than `n`, it makes `A` dense by
    products and leaves the rest to LAPACK.

    Args:
        A: A symmetric or complex Hermitian matrix, not a stack; that it is one is not checked.
        k: Number of pairs.
        tol: Relative residual; default 1e-8 in double precision and 2e-5 in single, in which
            half precision is computed.
        max_steps: Most blocks of products; default `1000 + 10 n`.
        generator: Source of the starting vectors.

    Returns:
        Values in descending magnitude, and vectors.

    Raises:
        ValueError: If `A` is a stack, not square or not finite, or there are fewer than `k`
            eigenvalues, or a count is no whole number.
        RuntimeError: If the residuals did not become small.

    Examples:
        >>> largest_eigenpairs(DenseMatrix(torch.diag(torch.tensor([1.0, -3.0, 2.0]))), 2).values
        tensor([-3.,  2.])
    """
    A = operator(A)
    *batch, m, n = A.shape
    if batch or m != n or k > n:
        raise ValueError(
            f"largest_eigenpairs(A, {k}): A is of shape {A.shape}; it must be one square matrix.\n"
            f"k is the number of eigenvalues, and there are {n}.\n"
            "Give one square matrix, and no k above its size."
        )
    asked = A.dtype
    A = with_precision(A, working_type(asked))
    eps = torch.finfo(A.dtype).eps
    search = _Search(
        A,
        k,
        max(1e-8, eps ** (2 / 3)) if tol is None else tol,
        1000 + 10 * n if max_steps is None else max_steps,
        generator,
    )
    with torch.no_grad():
        values, V = search.exact() if search.size >= n // 2 else search.largest()
    values = pulled(A, V, lambda _: V, values)
    return Eigh(values.to(asked.to_real()), DenseMatrix(V.to(asked)))


@dataclass
class _Search:
    """One search, with what all its runs share."""

    A: LinearOperator
    k: int
    tol: float
    steps: int
    generator: torch.Generator | None
    norm: float = field(default=0.0)
    power: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))

    @property
    def block(self) -> int:
        """Columns of a block: enough for the multiplicities of a few wanted values."""
        return min(self.k + 1, BLOCK)

    @property
    def size(self) -> int:
        """Largest dimension of a space."""
        return 3 * self.k + 4 * self.block + 40

    def exact(self) -> tuple[Tensor, Tensor]:
        """All pairs by LAPACK: the space would not be smaller than the matrix."""
        eye = torch.eye(self.A.shape[-1], dtype=self.A.dtype, device=self.A.device)
        D = self.A.matmat(eye)
        if not bool(D.isfinite().all()):
            raise ValueError(
                f"largest_eigenpairs(A, {self.k}): A, a {self.A!r}, has NaN or infinite entries.\n"
                "It has no eigenvalues."
            )
        values, V = torch.linalg.eigh((D + D.mH) / 2)
        order = values.abs().argsort(descending=True)[: self.k]
        return values[order], V[:, order]

    def largest(self) -> tuple[Tensor, Tensor]:
        """The wanted pairs, and then as long as there are larger ones left, these too."""
        V = self.random(self.block)
        self.power = exponents(self.A @ V, (-2, -1))  # squares of residuals stay in range
        V = V[:, :0]
        values, V = self.run(V, V.real[0])
        while True:
            more, W = self.run(V, values)
            if not more.numel():
                return ldexp(values, self.power[0]), V
            values, V = self.ritz(torch.cat([V, W], 1))

    def ritz(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """The best `k` approximations in a span, by Rayleigh and Ritz."""
        V, _ = torch.linalg.qr(V)
        H = V.mH @ self.product(V, V[:, :0])
        values, Y = torch.linalg.eigh((H + H.mH) / 2)
        order = values.abs().argsort(descending=True)[: self.k]
        return values[order], V @ Y[:, order]

    def run(self, locked: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The largest pairs orthogonal to what is locked: `k` of them, or those above the found."""
        Q = self.random(self.block)
        Q = self.extend(locked, Q)
        AQ = self.product(Q, locked)
        while True:
            H = Q.mH @ AQ
            values, Y = torch.linalg.eigh((H + H.mH) / 2)
            order = values.abs().argsort(descending=True)
            values, Y = values[order], Y[:, order]
            self.norm = max(self.norm, float(values[0].abs()))
            count = min(self.k, Q.shape[1])
            R = AQ @ Y[:, :count] - (Q @ Y[:, :count]) * values[:count]
            residuals = torch.linalg.vector_norm(R, dim=0)
            wanted, open_ = self.judge(values[:count], residuals, found)
            if not open_.any() and (found.numel() or count == self.k):
                return values[:count][wanted], Q @ Y[:, :count][:, wanted]
            self.spend(residuals)
            if Q.shape[1] + self.block > self.size:
                Y = Y[:, : (self.size + self.k) // 2]
                Q, AQ = Q @ Y, AQ @ Y
            block = self.filled(R[:, open_][:, : self.block], residuals[open_][: self.block])
            new = self.extend(torch.cat([locked, Q], 1), block)
            Q, AQ = torch.cat([Q, new], 1), torch.cat([AQ, self.product(new, locked)], 1)

    def judge(self, values: Tensor, residuals: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Which Ritz pairs are wanted, and for which of them the residual is still too large."""
        accuracy = self.tol * self.norm
        if not found.numel():
            return torch.ones_like(values, dtype=torch.bool), residuals > accuracy
        bound = found.abs().min() + accuracy
        wanted = values.abs() > bound
        first = torch.cumsum(~wanted, 0) <= 1  # the larger ones, and the first that is not
        return wanted, first & (values.abs() + residuals > bound) & (residuals > accuracy)

    def spend(self, residuals: Tensor) -> None:
        """Count a block of products.

        Raises:
            RuntimeError: If none is left.
        """
        self.steps -= 1
        if self.steps < 0 or not torch.isfinite(residuals).all():
            left = float(residuals.max()) / (self.norm or 1)
            raise RuntimeError(
                f"largest_eigenpairs(A, {self.k}): a residual of {left:.1e} of the largest value "
                f"is left.\nIt was asked for {self.tol:.1e}.\n"
                "Give a larger max_steps or tol, and check that A is Hermitian and finite."
            )

    def product(self, Q: Tensor, locked: Tensor) -> Tensor:
        """`A Q` without its part in what is locked."""
        AQ = ldexp(self.A @ Q, -self.power)
        return AQ - locked @ (locked.mH @ AQ)

    def filled(self, R: Tensor, residuals: Tensor) -> Tensor:
        """A block of unit columns, at random where there is no residual."""
        dead = residuals <= torch.finfo(R.dtype).eps * self.norm
        R = torch.where(dead, self.random(R.shape[1]), R / torch.where(dead, 1, residuals))
        return R if R.shape[1] else self.random(self.block)

    def extend(self, Q: Tensor, block: Tensor) -> Tensor:
        """An orthonormal block orthogonal to `Q`, with random columns for what adds nothing."""
        for _ in range(4):
            block = block / torch.linalg.vector_norm(block, dim=0)
            before = block
            for _ in range(2):
                block = block - Q @ (Q.mH @ block)
            block, triangle = torch.linalg.qr(block)
            dead = triangle.diagonal().abs() <= 100 * torch.finfo(block.dtype).eps
            if not dead.any():
                break
            block = torch.where(dead, self.random(len(dead)), before)
        block = block - Q @ (Q.mH @ block)  # what a small diagonal has magnified
        return torch.linalg.qr(block)[0]

    def random(self, columns: int) -> Tensor:
        """Normal vectors."""
        A = self.A
        return torch.randn(
            A.shape[-1], columns, generator=self.generator, dtype=A.dtype, device=A.device
        )
