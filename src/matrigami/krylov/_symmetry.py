"""Whether a matrix equals its transpose or its adjoint, asked by products.

Shapes: n = rows = columns.
"""

from typing import Any

import torch

from matrigami.krylov._systems import with_precision, working_type
from matrigami.operators import LinearOperator, operator


def is_hermitian(
    A: Any,
    generator: torch.Generator | None = None,
    *,
    tolerance: float | None = None,
) -> bool:
    """Whether `A` equals its adjoint: `A X = A.H X` for random `X`, to round-off.

    Of a real matrix this is symmetry; a complex symmetric matrix is not Hermitian.

    Args:
        A: A square matrix, a value or numbers, or a stack: then all of them.
        generator: Source of `X`; by default the answer is repeatable.
        tolerance: The share of `A X` that may differ; by default `1e3 eps`.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> is_hermitian(DenseMatrix(torch.tensor([[2, 1j], [-1j, 2]])))
        True
        >>> is_hermitian(DenseMatrix(torch.tensor([[2, 1j], [1j, 2]])))
        False
    """
    A = operator(A)
    return _equal(A, A.H, generator, tolerance)


def is_symmetric(A: Any, generator: torch.Generator | None = None) -> bool:
    """Whether `A` equals its transpose: `A X = A.T X` for random `X`, to round-off.

    Args:
        A: A square matrix, a value or numbers, or a stack: then all of them.
        generator: Source of `X`; by default the answer is repeatable.

    Examples:
        >>> from matrigami.operators import DenseMatrix
        >>> is_symmetric(DenseMatrix(torch.tensor([[2, 1j], [1j, 2]])))
        True
    """
    A = operator(A)
    return _equal(A, A.T, generator)


@torch.no_grad()
def _equal(
    A: LinearOperator,
    B: LinearOperator,
    generator: torch.Generator | None,
    tolerance: float | None = None,
) -> bool:
    """Whether both give the same product with four random vectors, in the norm of each product."""
    dtype = working_type(A.dtype)
    generator = torch.Generator(A.device).manual_seed(0) if generator is None else generator
    X = torch.randn(A.shape[-1], 4, generator=generator, dtype=dtype, device=A.device)
    Y, Z = (with_precision(M, dtype) @ X for M in (A, B))
    difference = torch.linalg.matrix_norm(Y - Z)
    share = 1e3 * torch.finfo(dtype).eps if tolerance is None else tolerance
    return bool((difference <= share * torch.linalg.matrix_norm(Y)).all())
