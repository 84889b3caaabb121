"""Laws of the algebra of values: products with vectors, transpose, sums, products, stacks.

Each law is a function of a single matrix `A` in double precision, real or complex.

Shapes: m = rows, n = columns.
"""

import torch

from matrigami.operators import DenseMatrix, LinearOperator, conj, solve
from matrigami.structures import DiagonalMatrix
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    expect_matrix,
    expect_refusal,
    like,
    random,
    stacked,
)

DOUBLE = {torch.float64, torch.complex128}
"""The types of the values that laws are about."""


def shape_and_dense(A: LinearOperator) -> None:
    """`shape` is that of `dense()`, and dtype and device those of the tensors."""
    D = A.dense()
    expect_equal(tuple(A.shape), tuple(D.shape), "A.shape")
    expect_equal(A.dtype, D.dtype, "A.dtype")
    expect_equal(A.device, D.device, "A.device")
    expect(A.dtype in DOUBLE, "the laws ask for a value in double precision")


def product_with_vectors(A: LinearOperator) -> None:
    """`A @ X` for a vector, a matrix, no right-hand side at all, and a stack."""
    n, D = A.shape[-1], A.dense()
    for shape in ((n,), (n, 1), (n, 3), (n, 0), (2, n, 3), (0, n, 2), (2, 1, n, 2)):
        X = like(A, *shape, seed=len(shape))
        expect_close(A @ X, D @ X, f"A @ X with X of shape {shape}")


def product_with_strided_vectors(A: LinearOperator) -> None:
    """`A @ X` for an `X` that is not contiguous."""
    X = like(A, 3, A.shape[-1]).mT
    expect_close(A @ X, A.dense() @ X, "A @ X with X transposed")
    X = like(A, 1, A.shape[-1], 1).expand(2, A.shape[-1], 3)
    expect_close(A @ X, A.dense() @ X, "A @ X with X expanded")


def transpose(A: LinearOperator) -> None:
    """`A.T` is the transpose, and `A.T.T` is `A`."""
    D, X = A.dense(), like(A, A.shape[-2], 2)
    expect_equal(tuple(A.T.shape), tuple(D.mT.shape), "A.T.shape")
    expect_close(A.T.dense(), D.mT, "A.T")
    expect_close(A.T @ X, D.mT @ X, "A.T @ X")
    expect_close(A.T.T.dense(), D, "A.T.T")


def adjoint(A: LinearOperator) -> None:
    """`A.H` is the adjoint, `<Y, A X> = <A.H Y, X>`, and `conj(A)` the conjugate."""
    D, X, Y = A.dense(), like(A, A.shape[-1], 2), like(A, A.shape[-2], 2, seed=1)
    expect_close(A.H.dense(), D.mH, "A.H")
    expect_close(A.H @ Y, D.mH @ Y, "A.H @ Y")
    expect_close(A.H.H.dense(), D, "A.H.H")
    expect_close(conj(A).dense(), D.conj().resolve_conj(), "conj(A)")
    expect_close(Y.mH @ (A @ X), (A.H @ Y).mH @ X, "the inner product with A X")


def mixed_types(A: LinearOperator) -> None:
    """Real and complex, single and double precision are promoted, as NumPy has it."""
    D, n = A.dense(), A.shape[-1]
    for kind in (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int64):
        X = (3 * random(n, 2)).to(kind)
        wanted = D.to(torch.complex128) @ X.to(torch.complex128)
        common = torch.promote_types(A.dtype, kind)
        wanted = wanted if common.is_complex else wanted.real
        expect_close(A @ X, wanted.to(common), f"A @ X with X in {kind}")
    for factor in (1j, torch.tensor(1 - 2j, dtype=torch.complex128)):
        expect_matrix(A * factor, D * factor, f"the multiple by {factor}")
    other = DenseMatrix(random(*A.shape, dtype=torch.complex128))
    total = D + other.dense()
    for found in (A + other, other + A):
        expect_matrix(found, total, "the sum with a complex matrix")
    back = DenseMatrix(random(n, A.shape[-2], dtype=torch.complex64))
    wanted = D.to(torch.complex128) @ back.dense().to(torch.complex128)
    expect_matrix(A @ back, wanted, "the product with a complex matrix", 1e-6)


def sums(A: LinearOperator) -> None:
    """`A + B`, `A - B`, `-A` with `B` of the same structure and of another."""
    D, B = A.dense(), 2.0 * A
    for total, wanted in ((A + B, 3 * D), (A - B, -D), (-A, -D), (A + B - A, 2 * D)):
        expect_matrix(total, wanted, f"the sum {total!r}")
    other = DenseMatrix(like(A, *A.shape))
    for total in (A + other, other + A):
        expect_matrix(total, D + other.dense(), f"the sum {total!r}")


def multiples(A: LinearOperator) -> None:
    """`2.5 * A`, `A * 2.5`, and by a tensor."""
    for multiple in (2.5 * A, A * 2.5, A * torch.tensor(2.5, dtype=A.dtype)):
        expect_matrix(multiple, 2.5 * A.dense(), f"the multiple {multiple!r}")


def products(A: LinearOperator) -> None:
    """`A.T @ A`, `A @ A.T`, longer chains, and products with another structure."""
    D = A.dense()
    for B, wanted in ((A.T @ A, D.mT @ D), (A @ A.T, D @ D.mT), (A @ (A.T @ A), D @ D.mT @ D)):
        expect_matrix(B, wanted, f"the product {B!r}")
    other = DenseMatrix(like(A, A.shape[-1], A.shape[-2]))
    expect_matrix(A @ other, D @ other.dense(), "the product with a dense matrix")
    expect_matrix(other @ A, other.dense() @ D, "the product of a dense matrix")


def batches(A: LinearOperator) -> None:
    """A stack of two members is one value; shape, product, transpose and algebra keep its axis."""
    S, members = stacked(A)
    D, n = torch.stack([B.dense() for B in members]), A.shape[-1]
    for shape in ((n,), (n, 3), (n, 0), (2, n, 3), (3, 1, n, 2), (3, 2, n, 2)):
        X = like(A, *shape)
        expect_close(S @ X, D @ X, f"the stack times X of shape {shape}")
    expect_matrix(S, D, "a stack")
    factor = torch.tensor([2.0, -3.0], dtype=A.dtype)
    expect_matrix(S * factor, factor[:, None, None] * D, "a stack times a factor each")
    for total, wanted in ((S + S, 2 * D), (S + A, D + D[0]), (A - S, D[0] - D)):
        expect_matrix(total, wanted, "a sum with a stack")
    for product, wanted in ((S @ S.T, D @ D.mT), (S @ A.T, D @ D[0].T), (A @ S.T, D[0] @ D.mT)):
        expect_matrix(product, wanted, "a product with a stack")


def wrong_shapes(A: LinearOperator) -> None:
    """Arguments that do not fit are refused in three lines."""
    m, n = A.shape[-2:]
    for shape in ((n + 1,), (n + 1, 2), (2, n + 1, 2), ()):
        expect_refusal(lambda shape=shape: A @ like(A, *shape), f"A @ X with X of shape {shape}")
    wide = A.T @ A  # n x n
    larger = DiagonalMatrix(torch.ones(n + 1, dtype=A.dtype))
    expect_refusal(lambda: A @ larger, "A @ B with too many rows")
    expect_refusal(lambda: wide + larger, "A + B of different sizes")
    if m == n:
        for shape in ((n + 1,), (n + 1, 2), ()):
            expect_refusal(lambda shape=shape: solve(A, like(A, *shape)), f"solve with B {shape}")


def representation(A: LinearOperator) -> None:
    """`repr` tells the class and the size."""
    for word in (type(A).__name__, f"{A.shape[-2]}x{A.shape[-1]}"):
        expect(word in repr(A), f"repr(A) is {A!r} and does not say {word}")


ALGEBRA_LAWS = (
    shape_and_dense,
    product_with_vectors,
    product_with_strided_vectors,
    transpose,
    adjoint,
    mixed_types,
    sums,
    multiples,
    products,
    batches,
    wrong_shapes,
    representation,
)
"""A new law is one function, and its name here."""
