"""The laws of a value: every rule agrees with the dense matrix.

Each law is one function of a single matrix `A` in double precision; a new law is one function and one entry of
`OPERATOR_LAWS`. Questions of square matrices are asked of `A` where it is well posed, and always of `A + s I`.

Shapes: m = rows, n = columns, k = right-hand sides.
"""

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from matrigami.operators import (
    LinearOperator,
    cost,
    diagonal,
    eigh,
    inverse,
    logdet,
    named_tensors,
    norm,
    power,
    slogdet,
    solve,
    sqrt,
    svdvals,
    to_scipy,
    trace,
    with_tensors,
)
from matrigami.structures import DiagonalMatrix
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    expect_refusal,
    random,
    stacked,
    well_posed,
)


def shape_and_dense(A: LinearOperator) -> None:
    """`shape` is that of `dense()`, and dtype and device those of the tensors."""
    D = A.dense()
    expect_equal(tuple(A.shape), tuple(D.shape), "A.shape")
    expect_equal(A.dtype, D.dtype, "A.dtype")
    expect_equal(A.device, D.device, "A.device")
    expect(A.dtype == torch.float64, "the laws ask for a value in double precision")


def product_with_vectors(A: LinearOperator) -> None:
    """`A @ X` for a vector, a matrix, no right-hand side at all, and a stack."""
    n, D = A.shape[-1], A.dense()
    for shape in ((n,), (n, 1), (n, 3), (n, 0), (2, n, 3), (0, n, 2), (2, 1, n, 2)):
        X = random(*shape, seed=len(shape))
        expect_close(A @ X, D @ X, f"A @ X with X of shape {shape}")


def product_with_strided_vectors(A: LinearOperator) -> None:
    """`A @ X` for an `X` that is not contiguous."""
    X = random(3, A.shape[-1]).mT
    expect_close(A @ X, A.dense() @ X, "A @ X with X transposed")
    X = random(1, A.shape[-1], 1).expand(2, A.shape[-1], 3)
    expect_close(A @ X, A.dense() @ X, "A @ X with X expanded")


def transpose(A: LinearOperator) -> None:
    """`A.T` is the transpose, and `A.T.T` is `A`."""
    D, X = A.dense(), random(A.shape[-2], 2)
    expect_equal(tuple(A.T.shape), tuple(D.mT.shape), "A.T.shape")
    expect_close(A.T.dense(), D.mT, "A.T")
    expect_close(A.T @ X, D.mT @ X, "A.T @ X")
    expect_close(A.T.T.dense(), D, "A.T.T")


def sums(A: LinearOperator) -> None:
    """`A + B`, `A - B`, `-A` with `B` of the same structure and of another."""
    D, X = A.dense(), random(A.shape[-1], 2)
    B = 2.0 * A.T.T
    for total, wanted in ((A + B, 3 * D), (A - B, -D), (-A, -D), (A + B - A, 2 * D)):
        expect_close(total.dense(), wanted, f"{total!r}")
        expect_close(total @ X, wanted @ X, f"{total!r} @ X")
    if D.shape[-1] == D.shape[-2]:
        eye = DiagonalMatrix(torch.ones_like(X[:, 0]))
        for total in (A + eye, eye + A):
            expect_close(total.dense(), D + eye.dense(), "the sum with the identity")


def multiples(A: LinearOperator) -> None:
    """`2.5 * A`, `A * 2.5`, and by a tensor."""
    D, X = A.dense(), random(A.shape[-1], 2)
    for multiple in (2.5 * A, A * 2.5, A * torch.tensor(2.5, dtype=A.dtype)):
        expect_close(multiple.dense(), 2.5 * D, "the multiple")
        expect_close(multiple @ X, 2.5 * (D @ X), "the multiple @ X")


def products(A: LinearOperator) -> None:
    """`A.T @ A`, `A @ A.T` and longer chains."""
    D = A.dense()
    for B, wanted in ((A.T @ A, D.mT @ D), (A @ A.T, D @ D.mT), (A @ (A.T @ A), D @ D.mT @ D)):
        X = random(B.shape[-1], 2)
        expect_close(B.dense(), wanted, f"{B!r}")
        expect_close(B @ X, wanted @ X, f"{B!r} @ X")
        expect_close(B.T.dense(), wanted.mT, f"the transpose of {B!r}")


def solutions(A: LinearOperator) -> None:
    """`solve(A, B)` and `inverse(A)`, for a vector, a matrix and none, or a refusal of a rectangle."""
    if A.shape[-1] != A.shape[-2]:
        expect_refusal(lambda: solve(A, random(A.shape[-2])), "solve with a rectangle")
        expect_refusal(lambda: inverse(A), "the inverse of a rectangle")
        return
    for S in _regular(A):
        D, n = S.dense(), S.shape[-1]
        for shape in ((n,), (n, 3), (n, 0), (2, n, 1)):
            B = random(*shape)
            X = solve(S, B)
            expect_equal(tuple(X.shape), shape, "the shape of the solution")
            expect_close(D @ X, B, f"A @ solve(A, B) for B of shape {shape}", 1e-7)
        inverted = inverse(S)
        expect_close(inverted.dense() @ D, torch.eye(n, dtype=D.dtype), "inverse(A) @ A", 1e-7)
        expect_close(inverted @ B, torch.linalg.solve(D, B), "inverse(A) @ B", 1e-7)
        expect_close(inverted.T @ B, torch.linalg.solve(D.mT, B), "inverse(A).T @ B", 1e-7)


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
            nan = bool(logdet(B).isnan())
            expect(nan == bool(sign < 0), "logdet is NaN exactly where the determinant is negative")


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
    """Real powers, square root and eigenpairs of `A @ A.T + I`."""
    m = A.shape[-2]
    S = A @ A.T + DiagonalMatrix(torch.ones(m, dtype=A.dtype))
    check_symmetric(S)


def check_symmetric(S: LinearOperator) -> None:
    """Real powers, square root and eigenpairs of a symmetric positive definite value."""
    D, n = S.dense(), S.shape[-1]
    root = sqrt(S).dense()
    expect_close(root @ root, D, "sqrt(S) squared", 1e-8)
    expect_close(root, root.mT, "sqrt(S) transposed", 1e-8)
    whitened = power(S, -0.5).dense()
    expect_close(whitened @ D @ whitened, torch.eye(n, dtype=D.dtype), "power(S, -1/2)", 1e-8)
    values, vectors = eigh(S)
    Q = vectors.dense()
    expect_close(Q.mT @ Q, torch.eye(n, dtype=D.dtype), "V.T @ V of eigh", 1e-8)
    expect_close(Q * values @ Q.mT, D, "V diag(values) V.T of eigh", 1e-8)
    k = (n + 1) // 2
    top, leading = eigh(S, k)
    expect_close(top, torch.linalg.eigvalsh(D).flip(-1)[:k], f"the {k} largest eigenvalues", 1e-8)
    expect_close(D @ leading.dense(), leading.dense() * top, f"the {k} leading eigenvectors", 1e-7)
    expect_close(logdet(S), torch.logdet(D), "logdet(S)", 1e-8)


def costs(A: LinearOperator) -> None:
    """`cost` tells the stored numbers and bytes exactly, and never fewer multiply-adds than are done."""
    params, macs, stored = cost(A)
    tensors = named_tensors(A).values()
    expect_equal(params, sum(t.numel() for t in tensors), "cost(A).params")
    expect_equal(stored, sum(t.nbytes for t in tensors), "cost(A).bytes")
    with FlopCounterMode(display=False) as counter:
        A.matmat(random(A.shape[-1], 1))
    done = counter.get_total_flops() // 2
    expect(macs >= done, f"cost(A).macs is {macs}, but A @ x takes {done} in matrix products alone")
    expect_equal(cost(A.T)[::2], (params, stored), "params and bytes of the transpose")


def batches(A: LinearOperator) -> None:
    """A stack of two members is one value; shape, product, transpose and algebra keep its axis."""
    S, members = stacked(A)
    D, n = torch.stack([B.dense() for B in members]), A.shape[-1]
    expect_equal(tuple(S.shape), tuple(D.shape), "the shape of a stack")
    expect_close(S.dense(), D, "the stack")
    for shape in ((n,), (n, 3), (n, 0), (2, n, 3), (3, 1, n, 2), (3, 2, n, 2)):
        X = random(*shape)
        expect_close(S @ X, D @ X, f"the stack times X of shape {shape}")
    expect_close(S.T.dense(), D.mT, "the transpose of a stack")
    factor = torch.tensor([2.0, -3.0], dtype=A.dtype)
    expect_close((S * factor).dense(), factor[:, None, None] * D, "a stack times a factor each")
    for total, wanted in ((S + S, 2 * D), (S + A, D + D[0]), (A - S, D[0] - D)):
        expect_close(total.dense(), wanted, "a sum with a stack")
        expect_close(total @ X, wanted @ X, "a sum with a stack, times X")
    for product, wanted in ((S @ S.T, D @ D.mT), (S @ A.T, D @ D[0].T), (A @ S.T, D[0] @ D.mT)):
        expect_close(product.dense(), wanted, "a product with a stack")
        expect_close(product.T.dense(), wanted.mT, "the transpose of a product with a stack")


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
        E = B.dense()
        for shape in ((E.shape[-1],), (E.shape[-1], 2), (2, E.shape[-1], 1)):
            X = solve(B, random(*shape))
            wanted = torch.linalg.solve(E, random(*shape)[:, None] if len(shape) == 1 else random(*shape))
            wanted = wanted[..., 0] if len(shape) == 1 else wanted
            expect_close(X, wanted, f"solutions of a stack with B of shape {shape}", 1e-7)
        for got, wanted in zip(slogdet(B), torch.linalg.slogdet(E), strict=True):
            expect_close(got, wanted, "slogdet of a stack", 1e-7)
        expect_close(inverse(B).dense(), torch.linalg.inv(E), "the inverses of a stack", 1e-6)
    check_batch_of_eigenpairs(S)


def check_batch_of_eigenpairs(S: LinearOperator) -> None:
    """Eigenpairs and roots of a stack `S @ S.T + I`."""
    P = S @ S.T + DiagonalMatrix(torch.ones(S.shape[-2], dtype=S.dtype))
    values, vectors = eigh(P)
    Q = vectors.dense()
    expect_close(Q * values[..., None, :] @ Q.mT, P.dense(), "eigh of a stack", 1e-8)
    root = sqrt(P).dense()
    expect_close(root @ root, P.dense(), "sqrt of a stack, squared", 1e-8)
    expect_equal(tuple(eigh(P, 1).values.shape), (*S.shape[:-2], 1), "the shape of eigh(S, 1)")


def vectorised_map(A: LinearOperator) -> None:
    """`torch.vmap` over a stack, which is a pytree, is the product with the stack."""
    S, _ = stacked(A)
    X = random(2, A.shape[-1], 3)
    got = torch.vmap(lambda B, Y: B.matmat(Y))(S, X)
    expect_close(got, S.dense() @ X, "vmap over a stack")


def pytree_round_trip(A: LinearOperator) -> None:
    """The leaves are the tensors; rebuilding and mapping give the same type and matrix."""
    leaves, spec = pytree.tree_flatten(A)
    tensors = list(named_tensors(A).values())
    expect(len(leaves) == len(tensors), f"{len(leaves)} leaves, but {len(tensors)} tensors")
    expect(all(a is b for a, b in zip(leaves, tensors, strict=True)), "leaves are not the tensors")
    again = pytree.tree_unflatten(leaves, spec)
    expect(type(again) is type(A), f"the rebuilt value is a {type(again).__name__}")
    expect_close(again.dense(), A.dense(), "the rebuilt value", 0.0)
    expect_equal(pytree.tree_flatten(again)[1], spec, "the tree of the rebuilt value")


def tensors_round_trip(A: LinearOperator) -> None:
    """`with_tensors(A, named_tensors(A))` is `A`; names are fit for a state dict."""
    named = named_tensors(A)
    again = with_tensors(A, iter(named.values()))
    expect_equal(list(named_tensors(again)), list(named), "the names after a round trip")
    expect_close(again.dense(), A.dense(), "the value after a round trip", 0.0)
    expect(all(name.isidentifier() for name in named), f"{list(named)} are not all identifiers")


def gradients(A: LinearOperator) -> None:
    """First and second derivatives of `A @ X` in `X` and in the tensors of `A`."""
    tensors = [t.clone().requires_grad_() for t in named_tensors(A).values()]
    X = random(A.shape[-1], 2).requires_grad_()

    def product(Y: Tensor, *parts: Tensor) -> Tensor:
        """`A @ Y` as a function of all of its numbers."""
        return with_tensors(A, iter(parts)) @ Y

    gradcheck(product, (X, *tensors), fast_mode=True)
    gradgradcheck(product, (X, *tensors), fast_mode=True)


def gradients_of_questions(A: LinearOperator) -> None:
    """Derivatives of `solve`, `slogdet`, `trace` and `norm` in the tensors of `A`."""
    tensors = [t.clone().requires_grad_() for t in named_tensors(A).values()]
    B = random(A.shape[-2], 2)

    def answers(*parts: Tensor) -> list[Tensor]:
        """All differentiable questions that the matrix allows."""
        S = with_tensors(A, iter(parts))
        found = [norm(S), diagonal(S)]
        if well_posed(A.dense()):
            found += [solve(S, B), slogdet(S)[1], inverse(S) @ B, trace(S)]
        return found

    gradcheck(lambda *parts: tuple(answers(*parts)), tuple(tensors), fast_mode=True, atol=1e-4)


def forward_derivatives(A: LinearOperator) -> None:
    """`torch.func.jvp` of the product is the product with the tangent."""
    X, V = random(A.shape[-1], 2), random(A.shape[-1], 2, seed=1)
    Y, tangent = torch.func.jvp(A.matmat, (X,), (V,))
    expect_close(Y, A.dense() @ X, "the value of jvp")
    expect_close(tangent, A.dense() @ V, "the tangent of jvp")


def single_precision(A: LinearOperator) -> None:
    """In float32 every answer is float32."""
    S = pytree.tree_map(lambda t: t.float(), A)
    X = random(A.shape[-1], 2, dtype=torch.float32)
    expect_close(S @ X, S.dense() @ X, "A @ X in float32", 1e-4)
    answers = {"dense": S.dense(), "norm": norm(S), "svdvals": svdvals(S), "diagonal": diagonal(S)}
    answers |= {"2.0 * A": (2.0 * S).dense(), "A @ A.T": (S @ S.T).dense(), "A + A": (S + S).dense()}
    if well_posed(A.dense()):
        answers |= {"solve": solve(S, X), "slogdet": slogdet(S)[1], "trace": trace(S)}
    for name, answer in answers.items():
        expect_equal(answer.dtype, torch.float32, f"the dtype of {name}")


def half_precision(A: LinearOperator) -> None:
    """`A @ X` in bfloat16, unless PyTorch has no kernel for it (as for the FFT)."""
    S = pytree.tree_map(lambda t: t.bfloat16(), A)
    X = random(A.shape[-1], 2, dtype=torch.bfloat16)
    try:
        Y = S @ X
    except RuntimeError as error:
        expect("Unsupported dtype" in str(error) or "not implemented" in str(error), str(error))
        return
    size = float(norm(A)) * float(X.double().norm())
    expect_equal(Y.dtype, torch.bfloat16, "the dtype of A @ X")
    error = float((Y.double() - A.dense() @ X.double()).norm())
    expect(error <= 0.05 * size + 1e-6, f"A @ X in bfloat16 is off by {error / size:.2g}")


def devices(A: LinearOperator) -> None:
    """Products happen where the tensors are."""
    S = pytree.tree_map(lambda t: t.to("meta"), A)
    Y = S @ torch.empty(A.shape[-1], 2, dtype=A.dtype, device="meta")
    expect_equal((Y.device.type, tuple(Y.shape)), ("meta", (A.shape[-2], 2)), "A @ X elsewhere")
    expect_equal(S.dense().device.type, "meta", "the device of dense()")


def wrong_shapes(A: LinearOperator) -> None:
    """Arguments that do not fit are refused in three lines."""
    m, n = A.shape[-2:]
    for shape in ((n + 1,), (n + 1, 2), (2, n + 1, 2), ()):
        expect_refusal(lambda shape=shape: A @ random(*shape), f"A @ X with X of shape {shape}")
    wide = A.T @ A  # n x n
    larger = DiagonalMatrix(torch.ones(n + 1, dtype=A.dtype))
    expect_refusal(lambda: A @ larger, "A @ B with too many rows")
    expect_refusal(lambda: wide + larger, "A + B of different sizes")
    if m == n:
        for shape in ((n + 1,), (n + 1, 2), ()):
            expect_refusal(lambda shape=shape: solve(A, random(*shape)), f"solve with B {shape}")


def scipy_view(A: LinearOperator) -> None:
    """The SciPy operator multiplies vectors and matrices, from both sides."""
    S, D = to_scipy(A), A.dense()
    x, y, X = random(A.shape[-1]), random(A.shape[-2]), random(A.shape[-1], 2)
    expect_equal(tuple(S.shape), tuple(D.shape), "the shape for SciPy")
    expect_close(torch.as_tensor(S @ x.numpy()), D @ x, "matvec for SciPy")
    expect_close(torch.as_tensor(S @ X.numpy()), D @ X, "matmat for SciPy")
    expect_close(torch.as_tensor(S.rmatvec(y.numpy())), D.T @ y, "rmatvec for SciPy")


def representation(A: LinearOperator) -> None:
    """`repr` tells the class and the size."""
    for word in (type(A).__name__, f"{A.shape[-2]}x{A.shape[-1]}"):
        expect(word in repr(A), f"repr(A) is {A!r} and does not say {word}")


def _regular(A: LinearOperator) -> list[LinearOperator]:
    """`A` where it is well posed, and `A` shifted by a multiple of the identity that dominates it."""
    shift = 1.5 * float(norm(A, 2).max()) + 1
    shifted = A + DiagonalMatrix(torch.full((A.shape[-1],), shift, dtype=A.dtype))
    return [A, shifted] if well_posed(A.dense()) else [shifted]


OPERATOR_LAWS = (
    shape_and_dense,
    product_with_vectors,
    product_with_strided_vectors,
    transpose,
    sums,
    multiples,
    products,
    solutions,
    determinants,
    traces,
    norms,
    integer_powers,
    symmetric_functions,
    costs,
    batches,
    batched_questions,
    vectorised_map,
    pytree_round_trip,
    tensors_round_trip,
    gradients,
    gradients_of_questions,
    forward_derivatives,
    single_precision,
    half_precision,
    devices,
    wrong_shapes,
    scipy_view,
    representation,
)
"""Every law of a value: a function that raises `AssertionError` when a value breaks it."""
