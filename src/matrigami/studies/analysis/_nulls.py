"""Null models: random matrices that keep one property of a matrix and lose all others.

A structure is there only if the matrix is nearer to it than its null models are: a hierarchical
format compresses a matrix of decaying singular values even where there is no hierarchy.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.studies.analysis._orderings import Traits

NULLS = {
    "spectrum": "same spectrum",
    "norms": "same spectrum and norms of rows and columns",
    "gaussian": "Gaussian",
    "shuffled": "shuffled entries",
}
"""The models, and what people call them: singular values in random directions; the same, scaled to
the norms of rows and columns; independent Gaussian entries of one norm; the entries in random
places."""

BALANCING = 30
"""Steps that impose norms of rows and columns in turn."""


class Nulls:
    """Null models of one matrix; of a symmetric one they are symmetric.

    Args:
        A: The matrix.
        traits: Of the matrix.
    """

    def __init__(self, A: Float[Tensor, "m n"], traits: Traits) -> None:
        self.A, self.symmetric = A, traits.symmetric
        self.values = torch.linalg.eigvalsh(A) if self.symmetric else torch.linalg.svdvals(A)

    def draw(self, name: str, seed: int) -> Float[Tensor, "m n"]:
        """One draw of the model of this name."""
        generator = torch.Generator().manual_seed(seed)
        if name == "gaussian":
            return self._gaussian(generator)
        if name == "shuffled":
            return self._shuffled(generator)
        B = self._spectrum(generator)
        return B if name == "spectrum" else self._balanced(B)

    def _gaussian(self, generator: torch.Generator) -> Tensor:
        """Of the same norm."""
        G = torch.randn(*self.A.shape, generator=generator, dtype=self.A.dtype)
        G = (G + G.mT) / 2 if self.symmetric else G
        return G * (self.A.norm() / G.norm())

    def _spectrum(self, generator: torch.Generator) -> Tensor:
        """Singular vectors, of a symmetric matrix eigenvectors, uniformly distributed."""
        m, n = self.A.shape
        U = _orthonormal(m, len(self.values), generator, self.A.dtype)
        if self.symmetric:
            return (U * self.values) @ U.mT
        return (U * self.values) @ _orthonormal(n, len(self.values), generator, self.A.dtype).mT

    def _balanced(self, B: Tensor) -> Tensor:
        """Rows and columns scaled to the norms that A has (Sinkhorn on the squares)."""
        rows, columns = self.A.square().sum(1), self.A.square().sum(0)
        S = B.square()
        r, c = torch.ones_like(rows), torch.ones_like(columns)
        for _ in range(BALANCING):
            r = rows / (S @ c).clamp(min=1e-300)
            c = columns / (S.mT @ r).clamp(min=1e-300)
        if self.symmetric:
            r = c = (r * c).sqrt()
        return r.sqrt()[:, None] * B * c.sqrt()

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """All entries change places; of a symmetric matrix those on and above the diagonal do."""
        if not self.symmetric:
            places = torch.randperm(self.A.numel(), generator=generator)
            return self.A.flatten()[places].reshape(self.A.shape)
        i, j = torch.triu_indices(*self.A.shape)
        entries = self.A[i, j][torch.randperm(len(i), generator=generator)]
        B = torch.empty_like(self.A)
        B[i, j] = entries
        B[j, i] = entries
        return B


def _orthonormal(n: int, k: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniformly distributed orthonormal columns."""
    Q, R = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=dtype))
    return Q * R.diagonal().sign()
