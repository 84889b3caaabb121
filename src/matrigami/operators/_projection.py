"""Projection: the member of a structure nearest to a matrix.

Shapes: m = rows, n = columns, r = rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.utils import _pytree as pytree

from matrigami.operators._algebra import cropped
from matrigami.operators._alternating import alternate
from matrigami.operators._base import LinearOperator, Value, question
from matrigami.operators._contraction import contractions
from matrigami.operators._convert import as_tensor
from matrigami.operators._dispatch import OpenFunction
from matrigami.operators._kernels import is_concrete
from matrigami.operators._memory import dense
from matrigami.operators._metric import Metric, Target, metric_of, whitened
from matrigami.operators._recipe import Structure, check_recipe
from matrigami.operators._tree import expand, mapped, named_tensors, with_tensors

TOL = 3e-3
"""Relative decrease of the squared error in five steps below which a search in a metric ends."""

ROUNDS = 200
"""Most steps of it."""

Progress = Callable[[int, float], None]
"""Told the step and the relative error in the metric."""

STEPS = 200
"""Most Levenberg-Marquardt steps; members are found again in far fewer."""

DIRECT = 2**22
"""Entries of the Jacobian up to which a step is solved directly: a few milliseconds, 32 MiB."""

STALLED = 1e-5
"""Relative decrease of the squared error in one step below which the fit ends."""

CG_STEPS = 300
"""Most conjugate-gradient steps in one of them: exact for a few hundred parameters."""


def _target(
    function: OpenFunction,
    recipe: Structure,
    W: Any,
    *,
    left: Any = None,
    right: Any = None,
    **how: Any,
) -> LinearOperator:
    """Project in the Frobenius norm, or in a metric; half precision is computed in single."""
    check_recipe(recipe, "project(recipe, W): recipe")
    search = Search(partial(function.answer, recipe), **how)
    plain = left is None and right is None
    if isinstance(W, LinearOperator):
        rounded = round_to(W, recipe) if plain else None
        if rounded is not None:
            return rounded
        W = dense(W, "project")
    W = as_tensor(W, torch.empty(()))
    _check_target(recipe, W)
    if W.dtype in {torch.bfloat16, torch.float16}:
        return _target(function, recipe, W.float(), left=left, right=right, **how).to(W.dtype)
    if plain:
        return function.answer(recipe, W)
    metric = metric_of(W, left, right)
    kinds = [M.dtype for M in (metric.left, metric.right) if M is not None]
    W = W.to(reduce(torch.promote_types, kinds, W.dtype))
    return metric_project(recipe, W, replace(search, metric=metric))


def _check_target(recipe: Structure, W: Tensor) -> None:
    """Whether this is a matrix of numbers.

    Raises:
        ValueError: If not.
    """
    if W.ndim < 2:
        raise ValueError(
            f"project(recipe, W): W has shape {tuple(W.shape)}; a matrix has two axes.\n"
            "Give a tensor of shape (*batch, m, n)."
        )
    if is_concrete(W) and not torch.isfinite(W).all():
        raise ValueError(
            "project(recipe, W): W has NaN or infinite entries.\n"
            f"No {type(recipe).__name__} member is nearest to it."
        )


@lambda default: OpenFunction(default, around=_target)
def project(
    recipe: Structure,
    W: Inexact[Tensor, "*batch m n"],
    *,
    left: Any = None,
    right: Any = None,
    tol: float = TOL,
    steps: int = ROUNDS,
    progress: Progress | None = None,
) -> LinearOperator:
    """The member of a structure nearest to `W`.

    Without a metric: nearest in the Frobenius norm; best for Dense, Diagonal, BlockDiagonal,
    LowRank, two-factor Kronecker, Monarch, BlockTensorTrain(cores=2), TensorTrain(cores=2) and
    Einsum on sizes that are not padded, quasi-best for the others (see the docstring of each).
    With `left` and `right`: nearest in `||left^(1/2) (W - A) right^(1/2)||_F`; best for Dense and
    LowRank, and for those named above where the metric is block diagonal in the blocks of their
    outermost tensors; else by alternating least squares (quasi-best, never worse in the metric than
    the Frobenius projection). What the metric does not feel is not determined.

    Args:
        recipe: The structure.
        W: The matrix, a tensor `(*batch, m, n)` or an operator; a member of the structure, or of
            a higher rank, is not made dense.
        left: Positive semi-definite, `m x m` (or a stack), e.g. the output-gradient moment of a
            layer.
        right: Positive semi-definite, `n x n` (or a stack), e.g. the input moment of a layer.
        tol: The search in a metric ends where five steps decrease the squared error by less than
            this share. Closed forms do not read it, nor the next two.
        steps: Most steps of the search.
        progress: Told the step and the relative error in the metric.

    Returns:
        A value of the structure.

    Raises:
        ValueError: If the size does not fit the recipe, `W` is not finite, or a metric does not fit
            or has negative eigenvalues.
    """
    raise TypeError(
        f"project({type(recipe).__name__}(), W): no projection onto it is known.\n"
        "Register one with @project.register in the file that defines it."
    )


@question
def round_to(A: LinearOperator, recipe: Structure) -> LinearOperator | None:
    """The member nearest to a value that need not be made dense for it; None where it must be.

    By default a member is its own. Otherwise a structure says what it knows.
    """
    return mapped(A, Tensor.clone) if _is_member(A, recipe) else None


def _is_member(A: LinearOperator, recipe: Structure) -> bool:
    """Whether a value has the layout and the sizes that the recipe draws."""
    try:
        m, n = A.shape[-2:]
        blank = recipe.blank(m, n, lambda *shape: torch.empty(shape, device="meta"))
    except ValueError:  # its ranks follow from a matrix, or the size does not fit
        return False
    (given, layout), (drawn, wanted) = map(pytree.tree_flatten, (A, blank))
    pairs = zip(given, drawn, strict=False)
    return layout == wanted and all(t.shape[t.ndim - s.ndim :] == s.shape for t, s in pairs)


@dataclass(frozen=True)
class Search:
    """How a member near in a metric is looked for.

    Args:
        project: The projection onto the structure in the Frobenius norm.
        metric: The metric.
        tol: Relative decrease of the squared error in five steps below which it ends.
        steps: Most steps.
        progress: Told the step and the relative error.
        start: A member to begin at; None for projections.
        target: The matrix with the metric, where searches share it.
    """

    project: Callable[[Tensor], LinearOperator]
    metric: Metric = field(default_factory=Metric)
    tol: float = TOL
    steps: int = ROUNDS
    progress: Progress | None = None
    start: LinearOperator | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        numbers = isinstance(self.tol, int | float) and isinstance(self.steps, int)
        if not numbers or not 0 <= self.tol < 1 or self.steps < 1:
            raise ValueError(
                f"project(recipe, W, tol={self.tol!r}, steps={self.steps!r}): one is out of "
                "range.\n"
                "tol must be a number of 0 to below 1, steps at least 1."
            )

    def __call__(self, W: Inexact[Tensor, "m n"]) -> LinearOperator:
        """From a member, or the projection of the matrix or of the whitened one, the better."""
        start = self.project(W) if self.start is None else self.start
        try:
            contractions(start)
        except TypeError:
            return least_squares_fit(start, W, self.metric)
        target = Target(W, self.metric) if self.target is None else self.target
        other = whitened(self.project, W, start, self.metric) if self.start is None else None
        starts = [start] if other is None else [start, other]
        best = min(starts, key=lambda A: target.pull(A)[1])
        options = {"tol": self.tol, "steps": self.steps, "progress": self.progress}
        return alternate(best, target, **options)

    def each(self, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
        """The same for every matrix of a stack."""
        batch = tuple(W.shape[:-2])
        if not batch:
            return self(W)
        found = []
        for i, w in enumerate(W.flatten(0, -3)):
            at = tuple(int(t) for t in torch.unravel_index(torch.tensor(i), batch))
            metric = self.metric.each(lambda M, at=at: expand(M, batch)[at])
            found.append(replace(self, metric=metric, target=None)(w))
        return stacked(found, batch)


def stacked(values: list[Value], batch: tuple[int, ...]) -> Value:
    """Values of one layout as a stack; as a single one where there are no batch axes."""
    parts = zip(*[named_tensors(A).values() for A in values], strict=True)
    every = [torch.stack(t).reshape(*batch, *t[0].shape) for t in parts]
    return with_tensors(values[0], iter(every))


def nearing(recipe: Structure, target: Target, **how: Any) -> LinearOperator:
    """`project` in a metric that is known to be one; the search may begin at a member, `start`."""
    search = Search(partial(project.answer, recipe), target.metric, target=target, **how)
    return metric_project(recipe, target.W, search)


@OpenFunction
def metric_project(recipe: Structure, W: Tensor, search: Search) -> LinearOperator:
    """Nearest member in a metric; by default it is searched for (quasi-best)."""
    return search.each(W)


def fitted_corner(A: LinearOperator, W: Inexact[Tensor, "*batch m n"]) -> LinearOperator:
    """The corner of the size of `W`, refitted if that cuts something: entries outside are free."""
    corner = cropped(A, *W.shape[-2:])
    if corner is A:
        return corner
    double = torch.promote_types(W.dtype, torch.float64)  # steps stall early in single precision
    return least_squares_fit(corner.to(double), W.to(double)).to(W.dtype)


def least_squares_fit(
    A: Value,
    W: Inexact[Tensor, "*batch m n"],
    metric: Metric | None = None,
    steps: int = STEPS,
) -> Value:
    """Minimise `||W - A||` in a metric over the tensors of `A`; the error never grows.

    Every structure is polynomial in its tensors. Each step solves the damped normal equations by
    conjugate gradients, so no Jacobian is formed. Source: More (1978), "The Levenberg-Marquardt
    algorithm".
    """
    metric = Metric() if metric is None else metric
    x = [t.detach().clone() for t in named_tensors(A).values()]
    damping, error = 1e-2, _misfit(A, W, metric)
    floor = 1e-24 * metric.square(W)
    for _ in range(steps):
        if error <= floor or damping > 1e12:
            break
        trial = [a + b for a, b in zip(x, _step(A, x, W, metric, damping), strict=True)]
        new = _misfit(with_tensors(A, iter(trial)), W, metric)
        if not new < error:
            damping *= 4
            continue
        stalled = error - new <= STALLED * error
        x, error, damping = trial, new, damping / 3
        if stalled:
            break
    return with_tensors(A, iter(x))


def _misfit(A: LinearOperator, W: Tensor, metric: Metric) -> float:
    """The squared error in the metric."""
    return metric.square(W - A.dense())


def _step(
    A: LinearOperator, x: list[Tensor], W: Tensor, metric: Metric, damping: float
) -> list[Tensor]:
    """Solve `(J.T M J + damping * scale) d = J.T M (W - A)`, directly or by conjugate gradients."""

    def member(tensors: list[Tensor]) -> Tensor:
        """The matrix as a function of its tensors."""
        return with_tensors(A, iter(tensors)).dense()

    value, pull = torch.func.vjp(member, x)  # pyright: ignore[reportAssignmentType]
    r = pull(metric.apply(W - value))[0]
    damping = damping * float(value.abs().square().mean().sqrt() + 1e-30)
    if sum(t.numel() for t in x) * W.numel() <= DIRECT:
        return _direct(member, x, r, metric, damping)
    d, p, rho = [torch.zeros_like(t) for t in x], r, _dot(r, r)
    target = 1e-6 * rho  # each step gains three digits of the gradient; more would be redone
    for _ in range(min(sum(t.numel() for t in x), CG_STEPS)):
        if rho <= target:
            break
        push = torch.func.jvp(member, (x,), (p,))[1]
        q = _plus(pull(metric.apply(push))[0], damping, p)
        step = rho / _dot(p, q)
        d, r = _plus(d, step, p), _plus(r, -step, q)
        rho, last = _dot(r, r), rho
        p = _plus(r, rho / last, p)
    return d


def _direct(
    member: Callable[[list[Tensor]], Tensor],
    x: list[Tensor],
    r: list[Tensor],
    metric: Metric,
    damping: float,
) -> list[Tensor]:
    """The step from the Jacobian itself: for few parameters far quicker than the iteration."""
    sizes = [t.numel() for t in x]
    eye = torch.eye(sum(sizes), dtype=x[0].dtype, device=x[0].device)
    basis = [e.reshape(-1, *t.shape) for e, t in zip(eye.split(sizes, 1), x, strict=True)]
    J = torch.vmap(lambda *v: torch.func.jvp(member, (x,), (list(v),))[1])(*basis)
    G = J.flatten(1).conj() @ metric.apply(J).flatten(1).mT
    d = torch.linalg.solve_ex(G + damping * eye, torch.cat([t.flatten() for t in r])).result
    return [part.reshape(t.shape) for part, t in zip(d.split(sizes), x, strict=True)]


def _plus(a: list[Tensor], step: Any, b: list[Tensor]) -> list[Tensor]:
    """`a + step b` of lists of tensors."""
    return [x + step * y for x, y in zip(a, b, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    """Real inner product of two lists of tensors."""
    return sum(float(torch.sum(s.conj() * t).real) for s, t in zip(a, b, strict=True))
