"""KFOC: the Kronecker product nearest to each block of the curvature, in the Frobenius norm.

The best pair is the top singular pair of the rearranged block (Van Loan and Pitsianis 1993). Its
power iteration never needs the gradient of one example as a matrix, for that is a sum of few outer
products; with one position per example it is K-FAC with weights that depend on the data:

    w_n = sum_k g_nk.T B g_nk     A = sum_n w_n a_n a_n.T / ||B||^2
    u_n = a_n.T A a_n             B = sum_n u_n sum_k g_nk g_nk.T / ||A||^2

K-FAC has equal weights, and its `B` is the start. The factors are positive semi-definite at every
step, and stream over batches. Where there are few examples, the iteration runs in their Gram
matrices, and the factors are formed once.

Shapes: b = blocks, T = examples times columns, l = rows and r = columns of a parameter's matrix.
"""

from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature._blocks import Key
from matrigami.curvature._factors import MomentCache, plain
from matrigami.curvature._kfac import assembled, second_moments
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._moments import side_forms, side_moment
from matrigami.curvature._objective import Batch, Loss
from matrigami.curvature._passes import Labels, Repeated, Setting, passes
from matrigami.nn import Use
from matrigami.operators import LinearOperator, gram, named_tensors, norm, scale, trace
from matrigami.structures import KroneckerMatrix

Data = Iterable[dict[Key, list[Use]]]


def kfoc(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Batch] | Batch,
    *,
    labels: Labels = "exact",
    iterations: int = 2,
    reduce: bool = False,
    joint: bool = True,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> CurvatureMatrix:
    """The Frobenius-optimal Kronecker product for each block of the Fisher matrix.

    No farther from the block than K-FAC, at K-FAC's storage. The gain is largest where one tensor
    acts at many positions (Kronecker and tensor-train layers).

    Args:
        model: As for `kfac`.
        loss: As for `kfac`.
        data: As for `kfac`. If it is too much to be kept in memory, it is passed over twice for
            each iteration.
        labels: As for `kfac`; the same labels are drawn in each pass.
        iterations: Power iterations; after two the error changes in the third digit at most.
        reduce: As for `kfac`.
        joint: As for `kfac`.
        dtype: As for `kfac`.
        seed: As for `kfac`.

    Returns:
        A block-diagonal value whose blocks are `KroneckerMatrix` values, by parameter name.

    Raises:
        ValueError: As for `kfac`, or if there are no iterations.
        TypeError: As for `kfac`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        >>> kfoc(model, nn.CrossEntropyLoss(), batch)["weight"]
        KroneckerMatrix(1 of 15x15, 34 parameters)
    """
    if iterations < 1:
        raise ValueError(
            f"kfoc(iterations={iterations}): at least 1 is needed.\nFor none, kfac is the answer."
        )
    found = passes(model, loss, data, Setting(labels, joint, reduce, seed))
    every = Repeated(found)
    grams = {} if found.distributed else by_grams(every.load(), iterations, dtype)
    products = grams | _streamed(every, grams, iterations, dtype, distributed=found.distributed)
    return assembled(found.objective.model, products)


def fitted(kept: list[dict[Key, list[Use]]], iterations: int) -> dict[Key, KroneckerMatrix]:
    """The nearest Kronecker products to the blocks of batches that are in memory."""
    grams = by_grams(kept, iterations, None)
    return grams | _streamed(kept, grams, iterations, None, distributed=False)


def _streamed(
    every: Data,
    done: Collection[Key],
    iterations: int,
    dtype: torch.dtype | None,
    *,
    distributed: bool,
) -> dict[Key, KroneckerMatrix]:
    """All other blocks, by passes over the data that start from K-FAC."""
    products = second_moments(_without(every, done), distributed, dtype).products()
    for _ in range(iterations if products else 0):
        for left in (False, True):
            rest = _without(every, done)
            products = _half_step(rest, products, left=left, dtype=dtype, distributed=distributed)
    return products


def by_grams(
    kept: list[dict[Key, list[Use]]], iterations: int, dtype: torch.dtype | None
) -> dict[Key, KroneckerMatrix]:
    """The blocks that have few examples, from their Gram matrices.

    With `P = (G G.T)^2` and `Q = (A A.T)^2`, entry by entry, a power iteration is `u = Q w`,
    `w = P u`.
    """
    found: dict[Key, KroneckerMatrix] = {}
    for key in kept[0] if kept else ():
        parts = [use for blocks in kept for use in blocks[key]]
        if not _few(parts):
            continue
        A, G = (torch.cat(rows, 1).to(dtype) for rows in zip(*map(_rows, parts), strict=True))
        K = G @ G.mT
        P, Q = (K / _largest(K)).square(), (A @ A.mT).square()  # the scale of P does not matter
        w = u = P.new_ones(*P.shape[:-1], 1)
        for _ in range(iterations):
            w = P @ u
            w = w / _largest(w)
            u = Q @ w
        size = (w.mT @ u).clamp_min(torch.finfo(w.dtype).tiny)  # ||A||^2
        inputs, gradients = gram(A * w.sqrt()), gram(G * (u / size).clamp_min(0).sqrt())
        sides = (inputs, gradients) if parts[0].transposed else (gradients, inputs)
        found[key] = KroneckerMatrix(*sides)
    return found


def _largest(M: Tensor) -> Tensor:
    """The largest entry of each matrix, not zero."""
    return M.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)


def _few(parts: list[Use]) -> bool:
    """Whether the Gram matrices of the examples cost less than those of the features."""
    if not all(
        isinstance(use.inputs, Tensor)
        and use.gradients is not None
        and use.inputs.shape[2] == 1
        and use.transposed == parts[0].transposed
        for use in parts
    ):
        return False
    i, o = (known.shape[-1] for known in (parts[0].inputs, parts[0].gradients))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    examples = sum(use.gradients.shape[1] * use.gradients.shape[2] for use in parts)  # pyright: ignore[reportOptionalMemberAccess]
    return examples * (i + o) <= i * i + o * o


def _rows(use: Use) -> tuple[Float[Tensor, "b T i"], Float[Tensor, "b T o"]]:
    """Inputs and gradients of every example and column."""
    G = use.gradients
    A = use.inputs.expand(-1, -1, G.shape[2], -1)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return A.flatten(1, 2), G.flatten(1, 3)  # pyright: ignore[reportOptionalMemberAccess]


def _half_step(
    data: Data,
    at: dict[Key, KroneckerMatrix],
    *,
    left: bool,
    dtype: torch.dtype | None,
    distributed: bool,
) -> dict[Key, KroneckerMatrix]:
    """The best factors on one side, given those on the other."""
    known = {key: _of_unit_trace(K.factors[1 if left else 0]) for key, K in at.items()}
    totals: dict[Key, LinearOperator] = {}
    for blocks in data:
        cache = MomentCache(dtype)
        for key, parts in blocks.items():
            for use in parts:
                weights = side_forms(use, known[key], left=not left)
                M = cache.cast(side_moment(use, left=left, weights=weights), use)
                totals[key] = totals[key] + M if key in totals else M
    found = {}
    for key, M in totals.items():
        if distributed:
            for t in named_tensors(M).values():
                dist.all_reduce(t)
        other = known[key]
        size = norm(other).square().clamp_min(torch.finfo(other.dtype).tiny)
        sides = (scale(M, 1 / size), other) if left else (other, scale(M, 1 / size))
        found[key] = KroneckerMatrix(*map(plain, sides))
    return found


def _of_unit_trace(F: LinearOperator) -> LinearOperator:
    """Without its scale, so that no square of small gradients underflows."""
    return scale(F, 1 / trace(F).clamp_min(torch.finfo(F.dtype).tiny))


def _without(data: Data, done: Collection[Key]) -> Iterator[dict[Key, list[Use]]]:
    """The blocks that are not done yet; no pass at all if none is left."""
    for blocks in data:
        left = {key: parts for key, parts in blocks.items() if key not in done}
        if not left:
            return
        yield left
