"""Laws of what is asked of a value: solve, determinant, trace, norm, power, eigenpairs, cost.

Each law is a function of a single matrix `A` in double precision, real or complex. What asks for a
regular matrix is asked of `A` where that is well posed, and always of `A` plus a multiple of the
identity.

Shapes: n = rows = columns.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matrigami.operators import (
    LinearOperator,
    cholesky,
    cost,
    diagonal,
    eigh,
    exp,
    inverse,
    logdet,
    lstsq,
    named_tensors,
    norm,
    pinv,
    power,
    shift,
    slogdet,
    solve,
    sqrt,
    svd,
    svdvals,
    to_scipy,
    trace,
)
from matrigami.structures import DiagonalMatrix, from_scipy
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    expect_matrix,
    expect_refusal,
    like,
    stacked,
    well_posed,
)


def solutions(A: LinearOperator) -> None:
    """`solve(A, B)`, `inverse(A)` of a vector, a matrix, none; NaN and rectangles are refused."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: solve(A, like(A, A.shape[-2])), "solve with a rectangle")
        expect_refusal(lambda: inverse(A), "the inverse of a rectangle")
        return
    for S in _regular(A):
        D, n = S.dense(), S.shape[-1]
        for shape in ((n,), (n, 3), (n, 0), (2, n, 1)):
            B = like(A, *shape)
            X = solve(S, B)
            expect_equal(tuple(X.shape), shape, "the shape of the solution")
            expect_close(D @ X, B, f"A @ solve(A, B) for B of shape {shape}", 1e-7)
        expect_refusal(lambda: solve(S, B * torch.nan), "solve for NaN")  # noqa: B023 - called now
        inverted = inverse(S)
        expect_close(inverted.dense() @ D, torch.eye(n, dtype=D.dtype), "inverse(A) @ A", 1e-7)
        expect_close(inverted @ B, torch.linalg.solve(D, B), "inverse(A) @ B", 1e-7)
        expect_close(inverted.T @ B, torch.linalg.solve(D.mT, B), "inverse(A).T @ B", 1e-7)


def shifted(A: LinearOperator) -> None:
    """`shift(A, amount)` is `A + amount I`, of stacks too, and `solve` takes it as its damping."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: shift(A, 1.0), "a rectangle plus a multiple of the identity")
        return
    amount = 1.5 * float(norm(A, 2)) + 1
    S = A @ A.H
    for B in (A, S, stacked(A)[0]):
        D = B.dense() + amount * torch.eye(A.shape[-1], dtype=A.dtype)
        expect_close(shift(B, amount).dense(), D, f"{B!r} plus a multiple of the identity", 1e-8)
    Y = like(A, A.shape[-1], 2)
    wanted = torch.linalg.solve(S.dense() + amount * torch.eye(A.shape[-1], dtype=A.dtype), Y)
    expect_close(solve(S, Y, amount), wanted, "solve with damping", 1e-8)


def determinants(A: LinearOperator) -> None:
    """`slogdet` with its sign, and `logdet`, NaN where the determinant is negative."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: slogdet(A), "slogdet of a rectangle")
        expect_refusal(lambda: logdet(A), "logdet of a rectangle")
        return
    for S in _regular(A):
        for B in (S, S.T, -1.0 * S, inverse(S)):
            sign, log = torch.linalg.slogdet(B.dense())
            got_sign, got_log = slogdet(B)
            expect_close(got_sign, sign, "the sign of the determinant")
            expect_close(got_log, log, "log |det A|", 1e-7)
            expect_logdet(logdet(B), torch.logdet(B.dense()))


def expect_logdet(got: Tensor, wanted: Tensor) -> None:
    """Raise unless they are the same logarithm: NaN alike, and equal up to turns."""
    expect(bool(got.isnan() == wanted.isnan()), "logdet is NaN where the determinant is negative")
    if not wanted.isnan():
        expect_close(got.real, wanted.real, "the logarithm of the determinant", 1e-7)
        expect_close(got.exp() / wanted.real.exp(), wanted.exp() / wanted.real.exp(), "its phase")


def traces(A: LinearOperator) -> None:
    """`diagonal` of any matrix, `trace` of a square one."""
    D = A.dense()
    for B, E in ((A, D), (A.T, D.mT), (A @ A.T, D @ D.mT), (3.0 * A, 3 * D)):
        expect_close(diagonal(B), torch.diagonal(E), f"the diagonal of {B!r}")
        if E.shape[0] == E.shape[1]:
            expect_close(trace(B), torch.trace(E), f"the trace of {B!r}")
        else:
            expect_refusal(lambda B=B: trace(B), "the trace of a rectangle")


def norms(A: LinearOperator) -> None:
    """Singular values in descending order; Frobenius, spectral and nuclear norm."""
    D = A.dense()
    for B, E in ((A, D), (A.T, D.mT)):
        expect_close(svdvals(B), torch.linalg.svdvals(E), "svdvals", 1e-7)
        expect_close(norm(B), torch.linalg.matrix_norm(E), "the Frobenius norm")
        expect_close(norm(B, 2), torch.linalg.matrix_norm(E, 2), "the spectral norm", 1e-7)
        expect_close(norm(B, torch.inf), torch.linalg.matrix_norm(E, 2), "the norm inf", 1e-7)
        expect_close(norm(B, 1), torch.linalg.matrix_norm(E, "nuc"), "the nuclear norm", 1e-7)


def singular_vectors(A: LinearOperator) -> None:
    """`svd`, and with it `pinv` and `lstsq`, of any shape."""
    D = A.dense()
    for B in (A, A.T, A @ A.H):
        U, values, V = svd(B)
        left, right, d = U.dense(), V.dense(), values.shape[-1]
        for Q in (left, right):
            expect_close(Q.mH @ Q, torch.eye(d, dtype=Q.dtype), "Q.H @ Q of svd", 1e-8)
        expect_close((left * values @ right.mH).to(D.dtype), B.dense(), "U diag(values) V.H", 1e-8)
    P, Y = pinv(A), like(A, A.shape[-2], 2)
    if regular_part(D):
        expect_close(P.dense(), torch.linalg.pinv(D), "pinv", 1e-6)
        expect_close(P @ Y, torch.linalg.pinv(D) @ Y, "pinv(A) @ Y", 1e-6)
        expect_close(lstsq(A, Y), torch.linalg.pinv(D) @ Y, "lstsq", 1e-6)
        expect_close(lstsq(A, Y[:, 0]), torch.linalg.pinv(D) @ Y[:, 0], "lstsq of a vector", 1e-6)


def regular_part(D: Tensor) -> bool:
    """Whether the singular values that are not zero are far from it."""
    values = torch.linalg.svdvals(D)
    return not bool(((values > 1e-12 * values[0]) & (values < 1e-4 * values[0])).any())


def exponentials(A: LinearOperator) -> None:
    """`exp` of a square matrix."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: exp(A), "the exponential of a rectangle")
        return
    for B in (A / norm(A, 2), (A @ A.H) / norm(A, 2).square()):
        expect_close(exp(B).dense(), torch.linalg.matrix_exp(B.dense()), f"exp of {B!r}", 1e-8)


def integer_powers(A: LinearOperator) -> None:
    """`power(A, p)` for whole `p`, negative ones where `A` is well posed."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: power(A, 2), "the square of a rectangle")
        return
    D = A.dense()
    exponents = (0, 1, 2, 3, -1, -2) if well_posed(D) else (0, 1, 2, 3)
    for p in exponents:
        wanted = torch.linalg.matrix_power(D, p)
        expect_close(power(A, p).dense(), wanted, f"power(A, {p})", 1e-7)


def symmetric_functions(A: LinearOperator) -> None:
    """Real powers, square root and eigenpairs of `A @ A.H + I`."""
    m = A.shape[-2]
    S = A @ A.H + DiagonalMatrix(torch.ones(m, dtype=A.dtype))
    check_symmetric(S)


def check_symmetric(S: LinearOperator) -> None:
    """Real powers, square root and eigenpairs of a Hermitian positive definite value."""
    D, n = S.dense(), S.shape[-1]
    root = sqrt(S).dense()
    expect_close(root @ root, D, "sqrt(S) squared", 1e-8)
    expect_close(root, root.mH, "the adjoint of sqrt(S)", 1e-8)
    whitened = power(S, -0.5).dense()
    expect_close(whitened @ D @ whitened, torch.eye(n, dtype=D.dtype), "power(S, -1/2)", 1e-8)
    values, vectors = eigh(S)
    Q = vectors.dense()
    expect_close(Q.mH @ Q, torch.eye(n, dtype=Q.dtype), "V.H @ V of eigh", 1e-8)
    expect_close((Q * values @ Q.mH).to(D.dtype), D, "V diag(values) V.H of eigh", 1e-8)
    L = cholesky(S).dense()
    expect_close(L @ L.mH, D, "L @ L.H of cholesky", 1e-8)
    k = (n + 1) // 2
    top, leading = eigh(S, k)
    expect_close(top, torch.linalg.eigvalsh(D).flip(-1)[:k], f"the {k} largest eigenvalues", 1e-8)
    V = leading.dense().to(D.dtype)
    expect_close(D @ V, V * top, f"the {k} leading eigenvectors", 1e-7)
    expect_logdet(logdet(S), torch.logdet(D))


def costs(A: LinearOperator) -> None:
    """`cost` tells numbers and bytes exactly, and never fewer multiply-adds than are done."""
    params, macs, stored = cost(A)
    tensors = named_tensors(A).values()
    expect_equal(params, sum(t.numel() for t in tensors), "cost(A).params")
    expect_equal(stored, sum(t.nbytes for t in tensors), "cost(A).bytes")
    with FlopCounterMode(display=False) as counter:
        A.matmat(like(A, A.shape[-1], 1))
    done = counter.get_total_flops() // 2
    expect(macs >= done, f"cost(A).macs is {macs}, but A @ x takes {done} in matrix products alone")
    expect_equal(cost(A.T)[::2], (params, stored), "params and bytes of the transpose")


def batched_questions(A: LinearOperator) -> None:
    """Every question about a stack is answered for each member."""
    S, members = stacked(A)
    D = torch.stack([B.dense() for B in members])
    expect_close(diagonal(S), torch.diagonal(D, dim1=-2, dim2=-1), "the diagonals of a stack")
    expect_close(svdvals(S), torch.linalg.svdvals(D), "svdvals of a stack", 1e-7)
    expect_close(norm(S), torch.linalg.matrix_norm(D), "the norms of a stack")
    expect_close(norm(S, 1), torch.linalg.matrix_norm(D, "nuc"), "nuclear norms of a stack", 1e-7)
    params, _, stored = cost(S)
    expect_equal((params, stored), (2 * cost(A).params, 2 * cost(A).bytes), "the cost of a stack")
    expect_equal(cost(S).macs, 2 * cost(A).macs, "the multiply-adds of a stack")
    if D.shape[-1] != D.shape[-2]:
        return
    expect_close(trace(S), torch.diagonal(D, dim1=-2, dim2=-1).sum(-1), "the traces of a stack")
    expect_close(power(S, 2).dense(), D @ D, "the squares of a stack", 1e-7)
    for B in _regular(S):
        E, n = B.dense(), B.shape[-1]
        for shape in ((n,), (n, 2), (2, n, 1)):
            Y = like(A, *shape)
            wanted = torch.linalg.inv(E) @ Y
            expect_close(solve(B, Y), wanted, f"solutions of a stack for {shape}", 1e-6)
        for got, wanted in zip(slogdet(B), torch.linalg.slogdet(E), strict=True):
            expect_close(got, wanted, "slogdet of a stack", 1e-7)
        expect_close(inverse(B).dense(), torch.linalg.inv(E), "the inverses of a stack", 1e-6)
    check_batch_of_eigenpairs(S)


def check_batch_of_eigenpairs(S: LinearOperator) -> None:
    """Eigenpairs and roots of a stack `S @ S.H + I`."""
    P = S @ S.H + DiagonalMatrix(torch.ones(S.shape[-2], dtype=S.dtype))
    values, vectors = eigh(P)
    Q = vectors.dense()
    expect_close(Q * values[..., None, :] @ Q.mH, P.dense(), "eigh of a stack", 1e-8)
    root = sqrt(P).dense()
    expect_close(root @ root, P.dense(), "sqrt of a stack, squared", 1e-8)
    expect_equal(tuple(eigh(P, 1).values.shape), (*S.shape[:-2], 1), "the shape of eigh(S, 1)")


def scipy_view(A: LinearOperator) -> None:
    """The SciPy operator multiplies vectors and matrices, from both sides."""
    S, D = to_scipy(A), A.dense()
    x, y, X = like(A, A.shape[-1]), like(A, A.shape[-2]), like(A, A.shape[-1], 2)
    expect_equal(tuple(S.shape), tuple(D.shape), "the shape for SciPy")
    expect_close(torch.as_tensor(S @ x.numpy()), D @ x, "matvec for SciPy")
    expect_close(torch.as_tensor(S @ X.numpy()), D @ X, "matmat for SciPy")
    expect_close(torch.as_tensor(S.rmatvec(y.numpy())), D.mH @ y, "rmatvec for SciPy")
    back = from_scipy(S)
    expect_equal(back.dtype, A.dtype, "the type of an operator that went to SciPy and back")
    expect_matrix(back, D, "an operator that went to SciPy and back")


def _regular(A: LinearOperator) -> list[LinearOperator]:
    """`A` where it is well posed, and `A` plus a multiple of the identity that dominates it."""
    amount = 1.5 * float(norm(A, 2).max()) + 1
    dominated = A + DiagonalMatrix(torch.full((A.shape[-1],), amount, dtype=A.dtype))
    return [A, dominated] if well_posed(A.dense()) else [dominated]


QUESTION_LAWS = (
    solutions,
    shifted,
    determinants,
    traces,
    norms,
    singular_vectors,
    exponentials,
    integer_powers,
    symmetric_functions,
    costs,
    batched_questions,
    scipy_view,
)
"""A new law is one function, and its name here."""
