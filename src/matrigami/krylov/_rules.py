"""Answers for matrices too large to be made dense, by products alone.

These register on `LinearOperator`, so they stand between a structure's own rule and the dense
default.

Shapes: n = rows = columns, k = right-hand sides.
"""

from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.krylov._cg import cg
from matrigami.krylov._eigenpairs import largest_eigenpairs
from matrigami.krylov._gmres import gmres
from matrigami.krylov._implicit import implicit_solve
from matrigami.krylov._lsmr import lsmr
from matrigami.krylov._minres import minres
from matrigami.krylov._solution import tolerance
from matrigami.krylov._symmetry import is_hermitian
from matrigami.krylov._systems import check_system, with_precision, working_type
from matrigami.operators import (
    SKEW,
    DenseMatrix,
    DiagonalMatrix,
    Eigh,
    LinearOperator,
    compose,
    diagonal,
    diagonal_by_entries,
    eigh,
    fits_dense,
    hermitian,
    inverse,
    is_concrete,
    iterate,
    lstsq,
    named_tensors,
    pinv,
    power,
    refuse_skew,
    slogdet,
    solve,
)

DENSE_LIMIT = 4096 * 4096
"""Entries up to which a matrix is made dense (128 MiB in double precision)."""

ROUNDED = 50
"""A relative residual of so many times the rounding of one operation is as small as any."""


def is_large(A: LinearOperator, *_: Any, **__: Any) -> bool:
    """Whether a value is too large to be made dense, by itself or for the free memory.

    One that is dense already is not.
    """
    if isinstance(A, DenseMatrix):
        return False
    return A.shape[-2] * A.shape[-1] > DENSE_LIMIT or not fits_dense(A)


def solve_iteratively(
    A: LinearOperator, B: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """Solve by MINRES if `A` is Hermitian, else by GMRES; differentiable to every order.

    Args:
        A: A square, nonsingular matrix, or a stack of them.
        B: Right-hand sides.

    Returns:
        The solution; its residual was computed and is at most `eps^(2/3)` of `B`.

    Raises:
        ValueError: If `A` is not square, or `B` does not fit or is not finite.
        RuntimeError: If the residual did not become that small.

    Examples:
        >>> import torch
        >>> A = DenseMatrix(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> solve_iteratively(A, torch.tensor([[2.0], [2.0]]))
        tensor([[1.0000],
                [0.5000]])
    """
    check_system("solve_iteratively", A, B)
    return iterate(A, B)


@iterate.register
def _(
    A: LinearOperator,
    B: Tensor,
    tol: float | None = None,
    preconditioner: Any = None,
    method: Any = None,
) -> Tensor:
    M = preconditioner.matmat if isinstance(preconditioner, LinearOperator) else preconditioner
    return implicit_solve(A, B, partial(_iterate, tol=tol, preconditioner=M, method=method))


def _iterate(
    A: LinearOperator, B: Tensor, *, tol: float | None, preconditioner: Any, method: Any
) -> Tensor:
    """Choose the method and insist on convergence."""
    check_system("solve", A, B)
    hermitian = (cg if preconditioner else minres) if method is None else method
    method = method or (hermitian if is_hermitian(A) else gmres)
    inverse = {"preconditioner": preconditioner} if preconditioner else {}
    found = method(A, B, tol=tol, **inverse)
    if not found.converged.all():
        raise RuntimeError(
            f"solve(A, B): {method.__name__.upper()} reached a relative residual of "
            f"{float(found.residuals[-1].max()):.1e} in {found.steps} steps for {A!r}, no less.\n"
            "If A is singular, lstsq(A, B) gives the X of least norm.\n"
            "Else call matrigami.krylov.cg, minres or gmres with a preconditioner or a looser tol."
        )
    return found.X


@solve.register(where=is_large)
def _(A: LinearOperator, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve_iteratively(A, B)


@slogdet.register(where=is_large)
def _(A: LinearOperator) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    raise ValueError(
        f"slogdet(A): {A!r} is too large to be made dense, and no closed form is known for it.\n"
        "Of a positive definite matrix matrigami.krylov.stochastic_logdet(A) gives an estimate "
        "with its error.\nIf memory allows, use slogdet(DenseMatrix(A.dense()))."
    )


@eigh.register(where=is_large)
def _(A: LinearOperator, k: int | None = None) -> Eigh:
    if k is None:
        raise ValueError(
            f"eigh(A): {A!r} is too large to be made dense; not all eigenvalues can be had.\n"
            "Give k, the number of largest ones, or use A.dense()."
        )
    if is_concrete(*named_tensors(A).values()) and not is_hermitian(A, tolerance=SKEW):
        refuse_skew(A, "eigh")
    return largest_eigenpairs(A, k)


@power.register(where=lambda A, p: float(p).is_integer() and is_large(A))
def _(A: LinearOperator, p: float) -> LinearOperator:
    """A product, in the structure that holds it."""
    if p < 0:
        return power(inverse(A), -p)
    if p == 0:
        ones = torch.ones((), dtype=A.dtype, device=A.device)
        return DiagonalMatrix(ones.expand(A.shape[:-1]))
    return reduce(compose, [A] * int(p))


@diagonal.register(where=is_large)
def _(A: LinearOperator) -> Inexact[Tensor, "*batch d"]:
    return diagonal_by_entries(A)


def _has_pseudoinverse(A: LinearOperator) -> bool:
    """Whether a closed form of it is known: of the structure, or by its eigenpairs."""
    return pinv.knows(A) or (eigh.knows(A) and hermitian(A))


@lstsq.register(where=lambda A, *_: is_large(A) and not _has_pseudoinverse(A))
def _(A: LinearOperator, B: Inexact[Tensor, "... m k"]) -> Inexact[Tensor, "... n k"]:
    return _LeastSquares.apply(A.detach(), B, *named_tensors(A).values())


class _LeastSquares(torch.autograd.Function):
    """`A^+ B`, linear in `B`; what it is in the tensors of `A` is not known."""

    @staticmethod
    def forward(A: LinearOperator, B: Tensor, *_: Tensor) -> Tensor:
        """In the range of `A` by MINRES if `A` is Hermitian, else by LSMR, in more steps."""
        hermitian = A.shape[-1] == A.shape[-2] and is_hermitian(A)
        found = _within_range(A, B) if hermitian else None
        return _by_lsmr(A, B) if found is None else found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        """Keep the matrix."""
        ctx.A, ctx.shape = inputs[0], inputs[1].shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The pseudoinverse of the adjoint."""
        if any(ctx.needs_input_grad[2:]):
            raise NotImplementedError(
                f"lstsq(A, B): of a matrix as large as {ctx.A!r} the derivative in its tensors is "
                "not known.\nThat in B is: give A.detach(), or solve(A, B) of a regular matrix."
            )
        moved = lstsq(ctx.A.H, grads[0]).sum_to_size(ctx.shape)
        return None, moved, *[None for _ in ctx.needs_input_grad[2:]]


def _by_lsmr(A: LinearOperator, B: Inexact[Tensor, "... m k"]) -> Inexact[Tensor, "... n k"]:
    """For any matrix.

    Raises:
        RuntimeError: If it does not converge.
    """
    found = lsmr(A, B)
    if not found.converged.all():
        raise RuntimeError(
            f"lstsq(A, B): LSMR did not converge for {A!r} in {found.steps} steps.\n"
            "Call matrigami.krylov.lsmr with a damping or a looser tol."
        )
    return found.X


@torch.no_grad()
def _within_range(
    A: LinearOperator, B: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"] | None:
    """`A^+ B` of a Hermitian matrix, if MINRES finds it: `A Z = A B`, then `A X = Z`.

    Both have solutions, and the Krylov spaces lie in the range of `A`, as do those of least norm.
    Errors of the first are magnified twice, so that it is solved as far as double precision goes.
    """
    check_system("lstsq", A, B)
    if not B.numel():
        return None
    asked = torch.promote_types(A.dtype, B.dtype)
    size = B.abs().amax(-2, keepdim=True)
    size = torch.where(size > 0, size, 1)
    kind = working_type(torch.float64, asked)
    A, unit = with_precision(A, kind), (B / size).to(kind)
    eps = torch.finfo(kind).eps
    projected = minres(A, A @ unit, tol=ROUNDED * eps)
    found = minres(A, projected.X)
    good = (projected.residuals[-1] <= tolerance(kind)) & found.converged
    return (size * found.X).to(asked) if good.all() else None
