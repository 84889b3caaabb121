"""Lanczos: a Hermitian matrix becomes a real tridiagonal one.

Step numbers: Saad (2011), Numerical Methods for Large Eigenvalue Problems, Algorithm 6.5, with
full reorthogonalisation. Half precision is computed in single.

Shapes: n = rows = columns, k = starting vectors (each has its own recurrence), j = steps.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.krylov._solution import dot, norms, safe
from matrigami.krylov._systems import check_system, counted, with_precision, working_type
from matrigami.operators import as_tensor, operator


class Tridiagonal(NamedTuple):
    """`A Q = Q T + off[-1] q e_j.T`: orthonormal `Q`, tridiagonal real `T`, for each start.

    Attributes:
        diagonal: Of `T`, `(..., k, j)`.
        off: Below it, `(..., k, j)`; the last entry leads out of the space.
        Q: Basis, `(j, ..., n, k)`.
    """

    diagonal: Float[Tensor, "... k j"]
    off: Float[Tensor, "... k j"]
    Q: Inexact[Tensor, "j ... n k"]

    def eigh(self) -> tuple[Float[Tensor, "... k j"], Float[Tensor, "... k j j"]]:
        """Ritz values, and the eigenvectors of `T`."""
        inner = self.off[..., :-1]
        T = (
            torch.diag_embed(self.diagonal)
            + torch.diag_embed(inner, 1)
            + torch.diag_embed(inner, -1)
        )
        values, vectors = torch.linalg.eigh(T.to(working_type(T.dtype)))
        return values.to(T.dtype), vectors.to(T.dtype)


@counted(steps=1)
def lanczos(A: Any, V: Any, steps: int) -> Tridiagonal:
    """Run `steps` steps of the recurrence from each column of `V`.

    Args:
        A: A symmetric or complex Hermitian matrix; that it is one is not checked.
        V: Starting vectors `(..., n, k)`, a tensor or an array.
        steps: At most `n`; a column whose space is exhausted continues with zeros.

    Returns:
        The tridiagonal matrices and the bases.

    Raises:
        ValueError: If `steps` is no whole number of at least 1, or `V` does not fit or is not
            finite.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> swap = DenseMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> lanczos(swap, torch.tensor([[1.0], [0.0]]), 2).off
        tensor([[1., 0.]])
    """
    A = operator(A)
    V = as_tensor(V, A)
    check_system("lanczos", A, V)
    asked, dtype = torch.promote_types(A.dtype, V.dtype), working_type(A.dtype, V.dtype)
    A = with_precision(A, dtype)
    V = V.to(dtype).expand(*torch.broadcast_shapes(A.shape[:-2], V.shape[:-2]), *V.shape[-2:])
    q = V / safe(norms(V))  # 1
    Q, diagonal, off = [q], [], []
    q_old, beta = torch.zeros_like(q), torch.zeros_like(norms(V))  # 1
    for j in range(steps):  # 2
        w = A @ q - beta * q_old  # 3
        alpha = dot(w, q).real  # 4
        w = w - alpha * q  # 5
        basis = torch.stack(Q)
        for _ in range(2):
            w = w - (basis * (basis.conj() * w).sum(-2, keepdim=True)).sum(0)
        scale = norms(w)
        exhausted = scale <= 10 * torch.finfo(V.dtype).eps * (alpha.abs() + beta)
        beta = torch.where(exhausted, 0, scale)  # 6
        q_old, q = q, torch.where(exhausted, 0, w / safe(scale))  # 7
        diagonal.append(alpha[..., 0, :])
        off.append(beta[..., 0, :])
        if j + 1 < steps:
            Q.append(q)
    real = asked.to_real()
    return Tridiagonal(
        torch.stack(diagonal, -1).to(real), torch.stack(off, -1).to(real), torch.stack(Q).to(asked)
    )
