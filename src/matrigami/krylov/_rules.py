"""Answers for matrices too large to be made dense, by products alone.

These register on `LinearOperator`, so they stand between a structure's own rule and the dense
default.

Shapes: n = rows = columns, k = right-hand sides.
"""

from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from matrigami.krylov._gmres import gmres
from matrigami.krylov._lanczos import largest_eigenpairs, stochastic_lanczos
from matrigami.krylov._minres import minres
from matrigami.krylov._solution import Solution
from matrigami.operators import (
    DenseMatrix,
    Eigh,
    LinearOperator,
    diagonal,
    eigh,
    named_tensors,
    slogdet,
    solve,
    with_tensors,
)

DENSE_LIMIT = 4096 * 4096
"""Entries up to which a matrix is made dense (128 MiB in double precision)."""

CHUNK = 256
"""Columns of the identity multiplied at a time where a diagonal is read off by products."""


def is_large(A: LinearOperator) -> bool:
    """Whether a value is too large to be made dense; one that is dense already is not."""
    return A.shape[-2] * A.shape[-1] > DENSE_LIMIT and not isinstance(A, DenseMatrix)


def is_symmetric(A: LinearOperator, generator: torch.Generator | None = None) -> bool:
    """Whether `x.T A y = y.T A x` for random vectors: almost surely a symmetric matrix."""
    n = A.shape[-1]
    generator = torch.Generator(A.device).manual_seed(0) if generator is None else generator
    X = torch.randn(n, 2, generator=generator, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        G = X.mT @ A.matmat(X)
    return bool(
        torch.allclose(
            G,
            G.mT,
            rtol=1e3 * torch.finfo(A.dtype).eps,
            atol=1e3 * torch.finfo(A.dtype).eps * float(G.abs().max()),
        )
    )


class _Solve(torch.autograd.Function):
    """`X = A^-1 B` with the adjoint solve: `dB = A^-T dX`, `dA = -dB X.T`."""

    @staticmethod
    def forward(ctx: Any, A: LinearOperator, B: Tensor, *tensors: Tensor) -> Tensor:
        """Solve without recording the iteration."""
        ctx.value = A
        X = _iterate(A, B)
        ctx.save_for_backward(X, *tensors)
        return X

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint solve; itself differentiable."""
        X, *tensors = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not create_graph:
            X, tensors = X.detach(), [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        A = with_tensors(ctx.value, iter(tensors))
        G = solve_iteratively(A.T, grads[0])
        with torch.enable_grad():
            aliases = [
                t.view_as(t) for t in tensors
            ]  # X depends on the tensors too: only the product counts here
            Y = with_tensors(ctx.value, iter(aliases)).matmat(X)
        wanted = [a for a in aliases if a.requires_grad]
        pulled = iter(
            torch.autograd.grad(Y, wanted, -G, create_graph=create_graph) if wanted else ()
        )
        return None, G, *[next(pulled) if a.requires_grad else None for a in aliases]


def solve_iteratively(
    A: LinearOperator, B: Inexact[Tensor, "... n k"]
) -> Inexact[Tensor, "... n k"]:
    """Solve by MINRES if `A` is symmetric, else by GMRES; differentiable throughout.

    Raises:
        RuntimeError: If the iteration did not converge.
    """
    return _Solve.apply(A, B, *named_tensors(A).values())


def _iterate(A: LinearOperator, B: Tensor) -> Tensor:
    """Choose the method and insist on convergence."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    B = B.expand(*batch, *B.shape[-2:])
    symmetric = is_symmetric(A)
    found: Solution = (minres if symmetric else gmres)(A, B)
    if not found.converged.all():
        raise RuntimeError(
            f"solve was asked of {A!r}, which is too large to be made dense.\n"
            f"{'MINRES' if symmetric else 'GMRES'} reached a relative residual of "
            f"{float(found.residuals[-1].max()):.1e} in {found.steps} steps.\n"
            "Call matrigami.krylov.cg, minres or gmres with a preconditioner or a looser tol."
        )
    return found.X


@solve.register(LinearOperator)
def _(A: LinearOperator, B: Inexact[Tensor, "... n k"]) -> Inexact[Tensor, "... n k"]:
    return solve_iteratively(A, B) if is_large(A) else solve.dispatch(object)(A, B)


class _LogDet(torch.autograd.Function):
    """Stochastic Lanczos quadrature, its gradient `A^-T` estimated with as many probes."""

    @staticmethod
    def forward(ctx: Any, A: LinearOperator, *tensors: Tensor) -> Tensor:
        """The estimate."""
        ctx.value = A
        ctx.save_for_backward(*tensors)
        generator = torch.Generator(A.device).manual_seed(0)
        return stochastic_lanczos(A, _log, generator=generator).value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hutchinson: `mean of (A^-T z) z.T` pulled back through the product."""
        tensors = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        A = with_tensors(ctx.value, iter(tensors))
        generator = torch.Generator(A.device).manual_seed(0)
        signs = torch.randint(0, 2, (*A.shape[:-1], 32), generator=generator, device=A.device)
        Z = (2 * signs - 1).to(A.dtype)
        with torch.no_grad():
            W = solve_iteratively(A.T, Z) / Z.shape[-1] * grads[0][..., None, None]
        wanted = [t for t in tensors if t.requires_grad]
        with torch.enable_grad():
            Y = A.matmat(Z)
        pulled = iter(torch.autograd.grad(Y, wanted, W) if wanted else ())
        return None, *[next(pulled) if t.requires_grad else None for t in tensors]


def _log(theta: Tensor) -> Tensor:
    """Logarithm of Ritz values that must be positive."""
    if (theta <= 0).any():
        raise ValueError(
            "logdet was asked of a large matrix with an eigenvalue that is not positive.\n"
            "Stochastic Lanczos quadrature needs a symmetric positive definite matrix.\n"
            "Make it dense (A.dense()), or add damping."
        )
    return theta.log()


@slogdet.register(LinearOperator)
def _(A: LinearOperator) -> tuple[Inexact[Tensor, "*batch"], Inexact[Tensor, "*batch"]]:
    if not is_large(A):
        return slogdet.dispatch(object)(A)
    if not is_symmetric(A):
        raise ValueError(
            f"slogdet was asked of {A!r}, which is too large to be made dense and not symmetric.\n"
            "Only symmetric positive definite matrices have an estimate by products alone.\n"
            "Use log|det A| = logdet(A.T @ A) / 2."
        )
    log = _LogDet.apply(A, *named_tensors(A).values())
    return torch.ones_like(log), log


@eigh.register(LinearOperator)
def _(A: LinearOperator, k: int | None = None) -> Eigh:
    if not is_large(A):
        return eigh.dispatch(object)(A, k)
    if k is None:
        raise ValueError(
            f"eigh was asked for all eigenvalues of {A!r}, which is too large to be made dense.\n"
            "Give k, the number of largest ones, or use A.dense()."
        )
    return largest_eigenpairs(A, k)


@diagonal.register(LinearOperator)
def _(A: LinearOperator) -> Float[Tensor, "*batch d"]:
    if not is_large(A):
        return diagonal.dispatch(object)(A)
    d, parts = min(A.shape[-2:]), []
    for start in range(0, d, CHUNK):
        columns = torch.arange(start, min(start + CHUNK, d), device=A.device)
        E = torch.zeros(A.shape[-1], len(columns), dtype=A.dtype, device=A.device)
        E[columns, torch.arange(len(columns))] = 1
        parts.append(torch.diagonal(A.matmat(E)[..., columns, :], dim1=-2, dim2=-1))
    return torch.cat(parts, -1)
