"""The laws of a recipe: what `init` draws and what `project` finds.

Each law is a function of a recipe and a size.

Shapes: m = rows, n = columns.
"""

import pickle
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import (
    DenseMatrix,
    LinearOperator,
    Metric,
    Structure,
    contractions,
    fans,
    least_squares_fit,
    named_tensors,
    project,
    with_tensors,
)
from matrigami.testing._expectations import (
    expect,
    expect_close,
    expect_equal,
    expect_refusal,
    random,
)
from matrigami.testing._question_laws import check_symmetric


def refuses_in_one_voice(recipe: Structure, m: int, n: int) -> bool:
    """Whether the recipe has no members of a size; `init` and `project` must agree on it."""
    try:
        recipe.init(m, n)
    except ValueError:
        where = f"a {m}x{n} matrix that {recipe} refuses"
        expect_refusal(lambda: recipe.init(m, n), where)
        expect_refusal(lambda: project(recipe, random(m, n)), f"projecting {where}")
        return True
    return False


def initial_members(recipe: Structure, m: int, n: int) -> None:
    """`init` draws finite members of the right size and dtype, the same ones from the same seed."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        A = member(recipe, m, n, dtype=dtype)
        expect_equal((*A.shape, A.dtype), (m, n, dtype), "size and dtype")
        expect(bool(A.dense().isfinite().all()), f"an initial member in {dtype} is not finite")
    expect_equal(recipe.init(m, n).dtype, torch.get_default_dtype(), "the default dtype")
    expect_equal(recipe.init(m, n, device="meta").device.type, "meta", "the device")
    A, B, C = (member(recipe, m, n, seed=seed).dense() for seed in (1, 1, 2))
    expect_close(A, B, "a member drawn with the same seed", 0.0)
    expect(not torch.equal(A, C), "members drawn with different seeds are equal")


def initial_scale(recipe: Structure, m: int, n: int) -> None:
    """Each tensor has a fan, and the standard deviation that it prescribes."""
    A = member(recipe, m, n)
    tensors, factors = named_tensors(A), fans(A)
    expect_equal(len(factors), len(tensors), "the number of fans")
    for (name, t), fan in zip(tensors.items(), factors, strict=True):
        bound = 6 / t.numel() ** 0.5  # six standard errors of the root mean square
        rms = float(t.square().mean().sqrt()) / fan.std
        expect(
            abs(rms - 1) <= max(bound, 1e-12), f"the spread of {name} is {rms:.2g} times its fan's"
        )
    expect(any(fan.last for fan in factors), "no tensor is marked as the last one applied")


def contraction_of_each_tensor(recipe: Structure, m: int, n: int) -> None:
    """`after @ contraction @ before` is the derivative of the matrix along each tensor."""
    A = member(recipe, m, n)
    tensors = list(named_tensors(A).values())
    parts = contractions(A)
    expect_equal(len(parts), len(tensors), "the number of contractions")
    for i, (C, before, after) in enumerate(parts):
        d = random(*tensors[i].shape, seed=i)
        moved = [tensors[i] + d if j == i else t for j, t in enumerate(tensors)]
        change = with_tensors(A, iter(moved)).dense() - A.dense()
        X = random(n, 2)
        Y = replace(C, core=d) @ (X if before is None else before @ X)
        expect_close(Y if after is None else after @ Y, change @ X, "the part of a tensor")
        expect_close(C.with_blocks(C.blocks()), C.core, "the blocks of a tensor", 0.0)
        expect_close(C.T.dense(), C.dense().mT, "the transpose of a contraction")


def zero_of_last(recipe: Structure, m: int, n: int) -> None:
    """With the tensors marked `last` at zero, the matrix is zero."""
    A = member(recipe, m, n)
    pairs = zip(named_tensors(A).values(), fans(A), strict=True)
    zeroed = with_tensors(A, iter([t * (0.0 if fan.last else 1.0) for t, fan in pairs]))
    expect_close(
        zeroed.dense(), torch.zeros(m, n, dtype=A.dtype), "the matrix after zero_init", 0.0
    )


def recipe_is_plain_data(recipe: Structure, m: int, n: int) -> None:
    """A recipe can be compared, printed on one line, and sent to another process."""
    again = pickle.loads(pickle.dumps(recipe))  # noqa: S301 - our own bytes
    expect_equal(again, recipe, "the recipe after pickling")
    expect(type(recipe).__name__ in repr(recipe), "the repr of a recipe does not say its name")
    expect("\n" not in repr(recipe), "the repr of a recipe has more than one line")


def members_are_found_again(recipe: Structure, m: int, n: int) -> None:
    """`project(recipe, A.dense())` is `A`; a quasi-best projection at least improves on zero."""
    D = member(recipe, m, n).dense()
    P = project(recipe, D)
    expect_equal((*P.shape, P.dtype), (m, n, D.dtype), "size and dtype of a projection")
    error = _error(P, D) / float(D.norm())
    if recipe.exact_projection:
        expect(error <= 1e-7, f"a member is found again with relative error {error:.2g}")
    expect(error < 1, f"the projection of a member is no better than zero: {error:.2g}")


def projection_is_nearest(recipe: Structure, m: int, n: int) -> None:
    """No nearby member is nearer, beyond the `sqrt(t - 1)` that `t` sequential SVDs guarantee."""
    W = random(m, n, seed=3)
    P = project(recipe, W)
    best = _error(P, W)
    expect(best <= float(W.norm()) * (1 + 1e-9), "the projection is farther than zero")
    tensors = list(named_tensors(P).values())
    slack = max(len(tensors) - 1, 1) ** 0.5 if recipe.exact_projection else 1.0
    for seed in range(4):
        for size in (1e-3, 1e-1):
            moved = [t + size * random(*t.shape, seed=seed) for t in tensors]
            near = _error(with_tensors(P, iter(moved)), W)
            expect(best <= slack * near + 1e-5, f"{best:.6g} from W, but {near:.6g} at a neighbour")
    refined = _error(least_squares_fit(P, W, steps=10), W)
    expect(best <= slack * refined + 1e-3, f"{best:.6g} from W, {refined:.6g} after refinement")


def projection_of_a_stack(recipe: Structure, m: int, n: int) -> None:
    """A stack is projected as well as matrix by matrix, and an operator as its dense matrix."""
    W = random(2, m, n, seed=4)
    P, first = project(recipe, W), project(recipe, DenseMatrix(W[0]))
    expect_equal(tuple(P.shape), (2, m, n), "the shape of the projection of a stack")
    errors = (P.dense() - W).norm(dim=(-2, -1))
    each = [_error(first, W[0]), _error(project(recipe, W[1]), W[1])]
    expect_close(errors, torch.tensor(each, dtype=W.dtype), "the errors of a stack", 1e-3)
    single = project(recipe, W[0].float())
    expect_equal(single.dtype, torch.float32, "the dtype of a projection in float32")
    error = torch.tensor(_error(single, W[0].float()), dtype=W.dtype)
    expect_close(error, errors[0], "the error of that projection", 1e-3)


def projection_in_a_metric(recipe: Structure, m: int, n: int) -> None:
    """With `left` and `right`, the error in their metric is no larger than without."""
    W = random(m, n, seed=5)
    left, right = (_positive_definite(size) for size in (m, n))
    metric = Metric(left, right)
    plain, steered = project(recipe, W), project(recipe, W, left=left, right=right)
    errors = [_metric_error(A, W, metric) for A in (steered, plain)]
    expect(
        errors[0] <= errors[1] * (1 + 1e-7) + 1e-12,
        f"in the metric {errors[0]:.6g} > {errors[1]:.6g}",
    )


def projection_keeps_symmetry_usable(recipe: Structure, m: int, n: int) -> None:
    """A projection that is positive definite has the right powers and eigenpairs."""
    if m != n:
        return
    P = project(recipe, _positive_definite(n).dense())
    D = P.dense()
    symmetric = bool(torch.allclose(D, D.mT, atol=1e-10))
    if symmetric and float(torch.linalg.eigvalsh(D)[0]) > 0.1:
        check_symmetric(P)


def bad_targets(recipe: Structure, m: int, n: int) -> None:
    """A target with NaN or infinity, or without two axes, is refused in three lines."""
    for bad in (torch.nan, torch.inf):
        W = random(m, n)
        W[0, 0] = bad
        expect_refusal(lambda W=W: project(recipe, W), f"projecting a matrix with {bad}")
    expect_refusal(lambda: project(recipe, random(n)), "projecting a vector")


def member(
    recipe: Structure, m: int, n: int, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> LinearOperator:
    """The random member of one seed."""
    return recipe.init(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _error(A: LinearOperator, W: Float[Tensor, "m n"]) -> float:
    """The Frobenius distance."""
    return float((A.dense() - W).norm())


def _metric_error(A: LinearOperator, W: Float[Tensor, "m n"], metric: Metric) -> float:
    """The squared distance in a metric."""
    E = A.dense() - W
    return float((E * metric.apply(E)).sum())


def _positive_definite(n: int) -> DenseMatrix:
    """A well-conditioned positive definite matrix."""
    F = random(n, n, seed=6)
    return DenseMatrix(F @ F.mT / n + 0.5 * torch.eye(n, dtype=F.dtype))


STRUCTURE_LAWS = (
    initial_members,
    initial_scale,
    contraction_of_each_tensor,
    zero_of_last,
    recipe_is_plain_data,
    members_are_found_again,
    projection_is_nearest,
    projection_of_a_stack,
    projection_in_a_metric,
    projection_keeps_symmetry_usable,
    bad_targets,
)
"""A new law is one function, and its name here."""
