"""Laws of a value as a citizen of PyTorch: derivatives, transforms, pytrees, dtypes, devices.

Each law is a function of a single matrix `A` in double precision.

Shapes: m = rows, n = columns.
"""

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

from matrigami.operators import (
    LinearOperator,
    diagonal,
    inverse,
    named_tensors,
    norm,
    slogdet,
    solve,
    svdvals,
    trace,
    with_tensors,
)
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    like,
    random,
    stacked,
    well_posed,
)


def vectorised_map(A: LinearOperator) -> None:
    """`torch.vmap` over a stack, which is a pytree, is the product with the stack."""
    S, _ = stacked(A)
    X = like(A, 2, A.shape[-1], 3)
    got = torch.vmap(lambda B, Y: B.matmat(Y))(S, X)
    expect_close(got, S.dense() @ X, "vmap over a stack")


def pytree_round_trip(A: LinearOperator) -> None:
    """The leaves are the tensors; rebuilding and mapping give the same type and matrix."""
    leaves, spec = pytree.tree_flatten(A)
    tensors = list(named_tensors(A).values())
    numbers = [t for t in leaves if t.is_floating_point() or t.is_complex()]
    expect(len(numbers) == len(tensors), f"{len(numbers)} leaves, but {len(tensors)} tensors")
    expect(all(a is b for a, b in zip(numbers, tensors, strict=True)), "leaves are not the tensors")
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
    X = like(A, A.shape[-1], 2).requires_grad_()

    def product(Y: Tensor, *parts: Tensor) -> Tensor:
        """`A @ Y` as a function of all of its numbers."""
        return with_tensors(A, iter(parts)) @ Y

    gradcheck(product, (X, *tensors), fast_mode=True)
    gradgradcheck(product, (X, *tensors), fast_mode=True)


def gradients_of_questions(A: LinearOperator) -> None:
    """Derivatives of `solve`, `slogdet`, `trace` and `norm` in the tensors of `A`."""
    tensors = [t.clone().requires_grad_() for t in named_tensors(A).values()]
    B = like(A, A.shape[-2], 2)

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
    X, V = like(A, A.shape[-1], 2), like(A, A.shape[-1], 2, seed=1)
    Y, tangent = torch.func.jvp(A.matmat, (X,), (V,))  # pyright: ignore[reportAssignmentType]
    expect_close(Y, A.dense() @ X, "the value of jvp")
    expect_close(tangent, A.dense() @ V, "the tangent of jvp")


def single_precision(A: LinearOperator) -> None:
    """In float32 (or complex64) every answer is in single precision."""
    single = torch.complex64 if A.dtype.is_complex else torch.float32
    S = A.to(single)
    X = random(A.shape[-1], 2, dtype=single)
    expect_close(S @ X, S.dense() @ X, "A @ X in float32", 1e-4)
    answers = {"dense": S.dense(), "norm": norm(S), "svdvals": svdvals(S), "diagonal": diagonal(S)}
    answers |= {
        "2.0 * A": (2.0 * S).dense(),
        "A @ A.T": (S @ S.T).dense(),
        "A + A": (S + S).dense(),
    }
    if well_posed(A.dense()):
        answers |= {"solve": solve(S, X), "slogdet": slogdet(S)[1], "trace": trace(S)}
    for name, answer in answers.items():
        precise = single.to_real() if name in {"norm", "svdvals"} else answer.dtype
        expect_equal(answer.dtype.to_complex(), torch.complex64, f"the precision of {name}")
        expect_equal(answer.dtype, precise, f"the dtype of {name}")


def half_precision(A: LinearOperator) -> None:
    """`A @ X` in bfloat16, unless PyTorch has no kernel for it (as for the FFT)."""
    if A.dtype.is_complex:
        return
    S = A.to(torch.bfloat16)
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
    S = A.to("meta")
    Y = S @ torch.empty(A.shape[-1], 2, dtype=A.dtype, device="meta")
    expect_equal((Y.device.type, tuple(Y.shape)), ("meta", (A.shape[-2], 2)), "A @ X elsewhere")
    expect_equal(S.dense().device.type, "meta", "the device of dense()")


TORCH_LAWS = (
    vectorised_map,
    pytree_round_trip,
    tensors_round_trip,
    gradients,
    gradients_of_questions,
    forward_derivatives,
    single_precision,
    half_precision,
    devices,
)
"""A new law is one function, and its name here."""
