"""Laws of what NumPy, SciPy and PyTorch have taught: arrays, indices, operators, other types.

Each law is a function of a single matrix `A` in double precision, real or complex.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from matrigami import operators
from matrigami.operators import (
    DenseMatrix,
    LinearOperator,
    OpenFunction,
    diagonal,
    entries,
    solve,
    take_rows,
)
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    expect_matrix,
    like,
    stacked,
    well_posed,
)


def arrays(A: LinearOperator) -> None:
    """NumPy arrays and lists go in where tensors do; arrays come back for arrays."""
    D, (m, n) = A.dense(), A.shape
    for shape in ((n,), (n, 2)):
        X = like(A, *shape)
        found = A @ X.numpy()
        expect(isinstance(found, np.ndarray), f"A @ array is a {type(found).__name__}")
        expect_close(torch.as_tensor(found), D @ X, "A @ array")
    found = like(A, m).numpy() @ A
    expect(isinstance(found, np.ndarray), f"array @ A is a {type(found).__name__}")
    expect_close(torch.as_tensor(found), like(A, m) @ D, "array @ A")
    expect_close(A @ ([1] * n), D.sum(1), "A @ list")
    expect_close(torch.as_tensor(np.asarray(A)), D, "numpy.asarray(A)")
    X = like(A, n, 2)
    backwards = torch.as_tensor(A @ X.numpy()[::-1])
    expect_close(backwards, D @ X.flip(0), "A @ array with negative strides")


def from_the_left(A: LinearOperator) -> None:
    """`X @ A` for a vector, a matrix and a stack."""
    D, m = A.dense(), A.shape[-2]
    for shape in ((m,), (3, m), (0, m), (2, 3, m)):
        X = like(A, *shape)
        expect_close(X @ A, X @ D, f"X @ A with X of shape {shape}")


def arithmetic(A: LinearOperator) -> None:
    """`A / 2`, sums of matrices and of their entries, sums with tensors, `A ** 2`."""
    D = A.dense()
    for half in (2, torch.tensor(2), np.float64(2)):
        expect_matrix(A / half, D / 2, "A / 2")
    expect_matrix(A / torch.tensor(3), D / 3, "A / torch.tensor(3)")
    nothing = (A / 0).dense().isfinite()
    expect(not bool((nothing & (D != 0)).any()), "A / 0 has finite entries")
    expect_matrix(sum([A, A, A]), 3 * D, "sum([A, A, A])")
    expect_close(A.sum(), D.sum(), "A.sum()")
    for dim in (0, 1, -1, -2):
        expect_close(A.sum(dim), D.sum(dim), f"A.sum({dim})")
    B = like(A, *A.shape)
    for found in (A + B, B + A, A - (-B)):
        expect_matrix(found, D + B, "the sum with a tensor")
    expect_matrix(B - A, B - D, "the difference from a tensor")
    if A.shape[-1] == A.shape[-2]:
        expect_matrix(A**2, D @ D, "A ** 2", 1e-8)


def rows_and_entries(A: LinearOperator) -> None:
    """`A[i, j]`, rows, columns and parts of them are those of the dense matrix."""
    D, (m, n) = A.dense(), A.shape
    i, j = torch.tensor([m - 1, 0, m // 2]), torch.tensor([0, n - 1, n // 2])
    expect_close(entries(A, i, j), D[i, j], "entries")
    expect_close(take_rows(A, i), D[i], "rows")
    expect_close(entries(A, -1 - i, [-1, 0, 0]), D[-1 - i, [-1, 0, 0]], "entries from the end")
    expect_close(take_rows(A, np.array([-1, 0])), D[[-1, 0]], "rows of an array of indices")
    for beyond in ((m, 0), (0, n), (-m - 1, 0)):
        try:
            entries(A, *[torch.tensor([place]) for place in beyond])
        except IndexError as error:
            expect(len(str(error).splitlines()) == 2, "the message for an index has not two lines")
        else:
            expect(False, f"the entry {beyond} is answered")
    for index in ((0, n - 1), (-1,), (i,), (i, j), (0,), (slice(1, None), 0), (i, slice(0, 2))):
        expect_close(A[index], D[index], f"A[{index}]")
    expect_close(A[..., 0], D[..., 0], "A[..., 0]")
    expect_matrix(A[:], D, "A[:]")


def members_of_a_stack(A: LinearOperator) -> None:
    """Indices in front pick members of a stack, which are values."""
    S, members = stacked(A)
    expect_matrix(S[1], members[1].dense(), "a member of a stack")
    expect_matrix(S[:, :, :], S.dense(), "all of a stack")
    expect_close(S[0, 0], members[0].dense()[0], "a row of a member")
    expect_matrix(operators.expand(A, (3,)), A.dense().expand(3, *A.shape), "A repeated")


def moves(A: LinearOperator) -> None:
    """`to` and `detach` keep the matrix."""
    kind = torch.complex64 if A.dtype.is_complex else torch.float32
    B = A.to(kind)
    expect_equal(B.dtype, kind, "the dtype of A.to(dtype)")
    expect_close(B.dense(), A.dense().to(kind), "A.to(dtype)", 1e-5)
    expect_equal(A.to("meta").device.type, "meta", "the device of A.to(device)")
    grown = operators.mapped(A, lambda t: t.clone().requires_grad_())
    expect(not grown.detach().dense().requires_grad, "A.detach() has a derivative")


def questions() -> list[tuple[str, Callable[..., Any]]]:
    """Every open function of one value, and those that are built on them."""
    found = {name: getattr(operators, name) for name in operators.__all__}
    one = [
        name
        for name, f in found.items()
        if isinstance(f, OpenFunction) and f.around in {diagonal.around, operators.norm.around}
    ]
    binary = {"add", "compose", "round_to"}
    return [(name, found[name]) for name in one if name not in binary]


def by_keyword_and_wrong_type(A: LinearOperator) -> None:
    """Questions take their matrix by keyword, and refuse everything else in the same words."""
    expect_close(diagonal(A=A), diagonal(A), "diagonal(A=A)")
    for name, ask in questions():
        for wrong in (A.dense(), None, "A"):
            try:
                ask(wrong)
            except TypeError as error:
                lines = str(error).splitlines()
                expect(lines[0].startswith(f"{name}(A): A is a "), f"{name}(A) says {lines[0]!r}")
                expect(len(lines) <= 3, f"{name}(A) says {len(lines)} lines")
            else:
                expect(False, f"{name} takes a {type(wrong).__name__}")


def solutions_of_arrays(A: LinearOperator) -> None:
    """`solve` answers an array by an array, lists by tensors, and takes dampings for a stack."""
    if not well_posed(A.dense()):
        return
    D, n = A.dense(), A.shape[-1]
    b = like(A, n)
    found = solve(A, b.numpy())
    expect(isinstance(found, np.ndarray), f"solve(A, array) is a {type(found).__name__}")
    expect_close(torch.as_tensor(D.numpy() @ found), b, "A @ solve(A, array)", 1e-7)
    sweep = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) + 3 * torch.linalg.matrix_norm(D, 2)
    found = solve(A, b[:, None], sweep)
    eye = torch.eye(n, dtype=D.dtype)
    wanted = torch.linalg.solve(D + sweep[:, None, None] * eye, b[:, None].expand(3, n, 1))
    expect_close(found, wanted, "solve with a sweep of dampings", 1e-8)
    other = DenseMatrix(like(A, n, n)) + DenseMatrix(10 * n * eye)
    expect_close(solve(A @ other, D @ other.dense() @ b), b, "solve with a product", 1e-6)


HABIT_LAWS = (
    arrays,
    from_the_left,
    arithmetic,
    rows_and_entries,
    members_of_a_stack,
    moves,
    by_keyword_and_wrong_type,
    solutions_of_arrays,
)
"""A new law is one function, and its name here."""
