"""What is known of HODLR matrices beyond products: solutions, determinants, the Cholesky factor.

Also of their corners, which a size that the halvings do not divide makes: the rest of the padded
matrix is replaced by the identity, and does not couple.

Shapes: c = leaves of p rows, n = rows = columns, k = right-hand sides.
"""

from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.operators import (
    CroppedMatrix,
    DiagonalMatrix,
    LinearOperator,
    add,
    cholesky,
    diagonal,
    is_big,
    is_differentiated,
    named_tensors,
    norm,
    refuse_indefinite,
    root_of_squares,
    scale,
    slogdet,
    solve,
)
from matrigami.structures._hodlr import HODLRMatrix
from matrigami.structures._hodlr_factors import determinant, hodlr_solve
from matrigami.structures._hodlr_root import HODLRRootMatrix, symmetric_root
from matrigami.structures._permuted import PermutedMatrix


def _corner(A: CroppedMatrix, *_: Any) -> bool:
    """Whether a matrix is the square corner of a square HODLR matrix."""
    return isinstance(A.padded, HODLRMatrix) and A.rows == A.columns


def _decoupled(A: CroppedMatrix) -> HODLRMatrix:
    """The corner, and the identity in the rest: the solution and the determinant of the corner."""
    H: Any = A.padded
    c, p, _ = H.leaves.shape[-3:]
    keep = (torch.arange(c * p, device=A.device) < A.rows).reshape(c, p)
    eye = torch.eye(p, dtype=A.dtype, device=A.device)
    leaves = torch.where(keep[:, :, None] & keep[:, None, :], H.leaves, eye)
    left, right = (
        tuple([F * keep.reshape(F.shape[-3:-1])[..., None].to(F.dtype) for F in side])
        for side in (H.left, H.right)
    )
    return HODLRMatrix(leaves, left, right)


def _padded(A: CroppedMatrix, B: Tensor) -> Tensor:
    """Rows of zeros up to the size of the padded matrix."""
    return torch.nn.functional.pad(B, (0, 0, 0, A.padded.shape[-2] - A.rows))


@add.register(where=_corner)
def _(A: CroppedMatrix, B: DiagonalMatrix) -> LinearOperator:
    d = _padded(A, B.diagonal[..., None])[..., 0]
    return CroppedMatrix(add(A.padded, DiagonalMatrix(d)), A.rows, A.columns)


@add.register(where=lambda A, B: isinstance(B.padded, HODLRMatrix))
def _(A: DiagonalMatrix, B: CroppedMatrix) -> LinearOperator:
    return add(B, A)


@scale.register(where=lambda A, factor: isinstance(A.padded, HODLRMatrix))
def _(A: CroppedMatrix, factor: Tensor) -> CroppedMatrix:
    return CroppedMatrix(scale(A.padded, factor), A.rows, A.columns)


@solve.register
def _(A: HODLRMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return hodlr_solve(A, B)


@solve.register(where=_corner)
def _(A: CroppedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return hodlr_solve(_decoupled(A), _padded(A, B))[..., : A.rows, :]


@slogdet.register
def _(A: HODLRMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return determinant(A)


@slogdet.register(where=_corner)
def _(A: CroppedMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return determinant(_decoupled(A))


def _plain(A: LinearOperator) -> bool:
    """Whether numbers are there, and nobody asks for a derivative."""
    return not is_differentiated(*named_tensors(A).values())


@cholesky.register(where=_plain)
def _(A: HODLRMatrix) -> LinearOperator:
    """The symmetric factor; a derivative needs the triangle of the dense matrix."""
    return symmetric_root(A) or refuse_indefinite(A)


@cholesky.register(where=lambda A: _corner(A) and _plain(A))
def _(A: CroppedMatrix) -> LinearOperator:
    return CroppedMatrix(cholesky(_decoupled(A)), A.rows, A.columns)


@cholesky.register(where=lambda A: A.columns is None and _holds_hodlr(A.matrix) and _plain(A))
def _(A: PermutedMatrix) -> LinearOperator:
    return PermutedMatrix(cholesky(A.matrix), A.rows)


def _cropped_root(A: CroppedMatrix, *_: Any) -> bool:
    """Whether a matrix is the corner of a factor that leaves the rest as it is."""
    if not isinstance(A.padded, HODLRRootMatrix) or A.rows != A.columns:
        return False
    rest = (torch.arange(A.padded.shape[-1], device=A.device) >= A.rows).to(A.dtype)[:, None]
    return all(bool((W.matmat(rest) == rest).all()) for W in (A.padded, A.padded.T))


@solve.register(where=_cropped_root)
def _(A: CroppedMatrix, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve(A.padded, _padded(A, B))[..., : A.rows, :]


@slogdet.register(where=_cropped_root)
def _(A: CroppedMatrix) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    return slogdet(A.padded)


def _holds_hodlr(A: LinearOperator) -> bool:
    """Whether a matrix is HODLR, or its corner."""
    return isinstance(A, HODLRMatrix) or (isinstance(A, CroppedMatrix) and _corner(A))


@diagonal.register(where=_corner)
def _(A: CroppedMatrix) -> Inexact[Tensor, "*batch d"]:
    return diagonal(A.padded)[..., : A.rows]


@norm.register(where=lambda A, order=None: is_big(A, order) and _corner(A))
def _(A: CroppedMatrix, order: float | None = None) -> Float[Tensor, "*batch"]:
    H, surplus = _decoupled(A), A.padded.shape[-1] - A.rows
    return root_of_squares(norm(H).square() - surplus)
