"""Rounding with feedback: the error of one weight is made good by those that are still to come.

With `A = E[x x.T]` of the inputs, `B = E[g g.T]` of the output gradients and `E = W - W'`, the loss
rises by `tr(B E A E.T) / 2` to second order. With `A = L D L.T` and `B = K C K.T`, unit lower,

    K.T E L = (rounding errors r),    tr(B E A E.T) = sum_ij C_i D_j r_ij^2,

if the entries are rounded from the last to the first, each after the errors behind it were added:
`w'_ij = Q(w_ij + (K.T E L)_ij)`, `E_ij` being zero so far. `A = None` is rounding to nearest,
`B = None` is GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the form of Chee et al. (2023, QuIP),
both are YAQA's objective (Tseng et al. 2025, arXiv 2505.22988). One Cholesky factor of each.

Shapes: m = rows, n = columns, b = rows and columns of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.compress._grid import Grid, QuantizedMatrix, spread
from matrigami.compress._moments import (
    checked_dampings,
    checked_moments,
    damped,
    relative,
    row_losses,
    unit_lower,
    unit_of,
)
from matrigami.compress._scales import refitted
from matrigami.operators import LinearOperator

LEAF = 8
"""Columns whose errors are spread one by one; those of more are spread by a product."""

ACTIVITY = 0.01
"""Of the mean activity added to all when ranges are fitted, so that dead inputs count a little."""

TILE = 16
"""Rows and columns of a tile of the two-sided order."""

FAR = 1e30
"""A step so long that any number is rounded to zero."""


@dataclass(frozen=True)
class Rounding:
    """A rounded matrix, and how well it was done.

    Attributes:
        value: The matrix.
        loss: `tr(B E A E.T) / tr(B W A W.T)`, on the held-out moment where there is one.
        nearest: The same of rounding to nearest, on the same grid.
        damping: The damping that was used, relative to the mean of the diagonals.
        kept: Rows (of stacks: of all matrices) that stayed rounded to nearest, as nothing better
            was found.
    """

    value: QuantizedMatrix
    loss: Float[Tensor, "*batch"]
    nearest: Float[Tensor, "*batch"]
    damping: float
    kept: int


@torch.no_grad()
def round_ldl(
    W: Float[Tensor, "*batch m n"],
    A: LinearOperator | Tensor | None = None,
    B: LinearOperator | Tensor | None = None,
    *,
    grid: Grid | None = None,
    damping: float | tuple[float, ...] = 0.01,
    by_activity: bool = True,
    refit: bool = True,
    keep_zeros: bool = False,
    holdout: LinearOperator | Tensor | None = None,
) -> Rounding:
    """Round a matrix onto a grid so that the loss of the model rises least.

    Scales are those of the given weights. Rows for which rounding to nearest is better, on the
    held-out moment or else on `A`, keep it; with `B` all rows or none.

    Args:
        W: The weights, outputs by inputs.
        A: Second moment of the inputs `(*batch, n, n)`; None rounds to nearest.
        B: Second moment of the output gradients `(*batch, m, m)`; None treats all rows alike.
        grid: Bits, groups, symmetry; `Grid()` by default.
        damping: Added to the diagonals, relative to their mean. Of several the best is taken, by
            the held-out moment or else by `A`.
        by_activity: Whether weights of large moments are rounded first, groups staying as they are
            (static act-order); else from the last to the first.
        refit: Whether the scales are fitted to the codes by least squares in the end.
        keep_zeros: Whether weights that are zero stay zero, as those of a pruned matrix should; the
            others make up for it.
        holdout: Second moment of inputs that `A` has not seen.

    Raises:
        ValueError: If a moment has another size, or is not positive semi-definite.

    Examples:
        >>> W, A = torch.tensor([[0.2, 0.2, 0.2, 1.0]]), torch.ones(4, 4)  # the sum alone matters
        >>> value = round_ldl(W, A, grid=Grid(2, symmetric=False)).value
        >>> bool((value.dense() - W).sum().abs() < 0.1)
        True
    """
    grids = (Grid() if grid is None else grid,)
    options = checked_dampings("round_ldl", damping)
    return roundings(W, A, B, grids, options, by_activity, refit, keep_zeros, holdout)[0]


@torch.no_grad()
def roundings(
    W: Float[Tensor, "*batch m n"],
    A: LinearOperator | Tensor | None,
    B: LinearOperator | Tensor | None,
    grids: tuple[Grid, ...],
    dampings: tuple[float, ...],
    by_activity: bool = True,
    refit: bool = True,
    keep_zeros: bool = False,
    holdout: LinearOperator | Tensor | None = None,
) -> list[Rounding]:
    """`round_ldl` onto each of several grids; the moments are factorised once."""
    _, inputs, B, judge = checked_moments("round_ldl", W, A, B, holdout)
    work = W.to(torch.promote_types(W.dtype, torch.float32))
    inputs, judge = inputs / unit_of(inputs), judge / unit_of(judge)  # only shares are asked for
    loss = partial(_lost, judge.to(work), None if B is None else B.to(work))
    activity = None if A is None else damped(inputs, ACTIVITY).diagonal(dim1=-2, dim2=-1)
    known = None if A is None else factors(inputs, B, dampings, by_activity)
    options = refit, keep_zeros
    simple = [grid.round(work, activity) for grid in grids]
    made = [
        _to_nearest(work, loss, n) if known is None else _better(work, loss, n, known, *options)
        for n in simple
    ]
    return [replace(found, value=_like(found.value, W)) for found in made]


def _to_nearest(W: Tensor, loss: Callable[[Tensor], Tensor], nearest: QuantizedMatrix) -> Rounding:
    """Without moments."""
    lost = relative(loss(W - nearest.dense()).sum(-1), loss(W).sum(-1))
    return Rounding(nearest, lost, lost, 0.0, W.shape[:-1].numel())


def _better(
    W: Tensor,
    loss: Callable[[Tensor], Tensor],
    nearest: QuantizedMatrix,
    known: "Factors",
    refit: bool,
    keep_zeros: bool,
) -> Rounding:
    """With the best damping, and rounded to nearest where that is no worse."""
    plain, whole = loss(W - nearest.dense()), loss(W).sum(-1)
    tried = _rounded(W, known, nearest, refit, keep_zeros)
    losses = loss(W - tried.dense())
    best = int(losses.flatten(1).sum(-1).argmin())
    worse = _worse(losses[best], plain, known.K is not None)
    value = _chosen(worse, nearest, _each(tried, lambda t: t[best]))
    lost, simple = (t.sum(-1) for t in (torch.where(worse, plain, losses[best]), plain))
    told = relative(lost, whole), relative(simple, whole)
    return Rounding(value, *told, known.dampings[best], int(worse.sum()))


def _lost(A: Tensor, B: Tensor | None, E: Tensor) -> Tensor:
    """What the errors of each row cost."""
    return row_losses(E, A, B).double()


class Factors(NamedTuple):
    """The moments with each damping, the order of columns and rows, and factors in that order."""

    dampings: tuple[float, ...]
    A: Tensor
    B: Tensor | None
    columns: Tensor
    rows: Tensor | None
    L: Tensor
    K: Tensor | None


def factors(A: Tensor, B: Tensor | None, dampings: tuple[float, ...], by_activity: bool) -> Factors:
    """Factorise the moments, in double precision."""
    Ad, columns = torch.stack([damped(A, d) for d in dampings]), _order(A, by_activity)
    L = unit_lower(_both(Ad, columns), "A")[0]
    if B is None:
        return Factors(dampings, Ad, None, columns, None, L, None)
    Bd = torch.stack([damped(B, d) for d in dampings])
    rows = _order(Bd, by_activity)
    return Factors(dampings, Ad, Bd, columns, rows, L, unit_lower(_both(Bd, rows), "B")[0])


def _rounded(
    W: Tensor, known: Factors, nearest: QuantizedMatrix, refit: bool, keep_zeros: bool
) -> QuantizedMatrix:
    """Round with each damping: a stack, whose steps are taken all at once, as precise as `W`."""
    many, n, size = len(known.dampings), W.shape[-1], nearest.group
    W, (_, _, _, columns, rows, L, K) = W.expand(many, *W.shape), known
    nearest = _each(nearest, lambda t: t.expand(many, *t.shape))
    zeros = None if nearest.zero is None else spread(nearest.zero, size, n)
    steps, least = spread(nearest.scale, size, n), Grid(nearest.bits).least
    steps = torch.where(W == 0, FAR, steps) if keep_zeros else steps
    problem = Problem(W, steps, zeros, least).columns(columns)
    if rows is None or K is None:
        codes = by_columns(problem, L.to(W))
    else:
        codes = by_tiles(problem.rows(rows), K.to(W), L.to(W))
        codes = _taken(codes.mT, rows.argsort(-1)).mT
    codes = _taken(codes, columns.argsort(-1))
    value = replace(nearest, codes=codes.to(torch.int8))
    B = None if known.B is None else known.B.to(W)
    return refitted(value, W, known.A.to(W), B) if refit else value


@dataclass(frozen=True)
class Problem:
    """Weights in the order of the work, with the step and the zero of each."""

    W: Tensor
    steps: Tensor
    zeros: Tensor | None
    least: int

    def columns(self, order: Tensor) -> "Problem":
        """The columns in another order."""
        return self._each(lambda t: _taken(t, order))

    def rows(self, order: Tensor) -> "Problem":
        """The rows in another order."""
        return self._each(lambda t: _taken(t.mT, order).mT)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The same with every tensor exchanged."""
        zeros = None if self.zeros is None else function(self.zeros)
        return Problem(function(self.W), function(self.steps), zeros, self.least)


def by_columns(problem: Problem, L: Float[Tensor, "*batch n n"]) -> Tensor:
    """The codes, column by column from the last; all rows at once."""
    W, steps, least = problem.W.mT.contiguous(), problem.steps.mT.contiguous(), problem.least
    zeros = torch.zeros_like(W) if problem.zeros is None else problem.zeros.mT.contiguous()
    codes = torch.empty_like(W)
    each = [t.unbind(-2) for t in (W, steps, zeros, codes)]  # views, made at once

    def rounded(j: int, target: Tensor) -> Tensor:
        """The code of one column."""
        w, step, zero, code = (t[j] for t in each)
        torch.addcdiv(zero, target, step, out=code).round_().clamp_(least, -1 - least)
        return torch.addcmul(w, code - zero, step, value=-1)

    feed_back(W, L, rounded)
    return codes.mT


def feed_back(
    W: Float[Tensor, "*batch n m"], L: Tensor, rounded: Callable[[int, Tensor], Tensor]
) -> None:
    """Columns of a matrix, given as rows, from the last one, each after the errors behind it.

    Of a range of columns the second half comes first, and one product spreads its errors to the
    first half: nearly all of the work is in large products.

    Args:
        W: The transpose of the weights.
        L: The unit lower triangle.
        rounded: Rounds column j, of which the target is given, and returns its error.
    """
    target, E = W.clone(), torch.empty_like(W)
    targets, errors = target.unbind(-2), E.unbind(-2)

    def halves(start: int, stop: int) -> None:
        """The columns of a range."""
        if stop - start <= LEAF:
            for j in range(stop - 1, start - 1, -1):
                errors[j].copy_(rounded(j, targets[j]))
                target[..., start:j, :].addcmul_(L[..., j, start:j, None], E[..., j, None, :])
            return
        middle = (start + stop) // 2
        halves(middle, stop)
        first, second = slice(start, middle), slice(middle, stop)
        target[..., first, :] += L[..., second, first].mT @ E[..., second, :]
        halves(start, middle)

    halves(0, W.shape[-2])


def by_tiles(problem: Problem, K: Float[Tensor, "*batch m m"], L: Tensor) -> Tensor:
    """The codes, anti-diagonal by anti-diagonal of tiles from the last one.

    `P = E L` grows to the left with every tile of errors, `R = K.T P`, without the tile's own
    rows, upwards with every tile of `P` that is finished.
    """
    m, n = problem.W.shape[-2:]
    W, steps = _tiles(problem.W), _tiles(problem.steps, 1.0)
    zeros = torch.zeros_like(W) if problem.zeros is None else _tiles(problem.zeros)
    K, L = _bands(K), _bands(L)
    P, R, codes = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W)
    rows, columns = W.shape[-4:-2]
    for wave in range(rows + columns - 1):
        done = torch.arange(max(0, wave - columns + 1), min(wave, rows - 1) + 1, device=W.device)
        i, j = rows - 1 - done, columns - 1 - wave + done
        at = (..., i, j, slice(None), slice(None))
        Ki, Lj = K[..., i, :, :], L[..., j, :, :]
        own = _own(Ki, i), _own(Lj, j)
        shift = own[0].mT @ P[at] + R[at]
        codes[at], E = _rounded_tile(W[at], steps[at], zeros[at], problem.least, shift, *own)
        finished = P[at] + E @ own[1]
        P[..., i, :, :, :] += (E @ Lj).unflatten(-1, (columns, TILE)).movedim(-2, -3)
        R[..., :, j, :, :] += (Ki.mT @ finished).unflatten(-2, (rows, TILE)).movedim(-3, -4)
    return codes.movedim(-3, -2).flatten(-4, -3).flatten(-2)[..., :m, :n]


def _rounded_tile(
    W: Tensor, steps: Tensor, zeros: Tensor, least: int, shift: Tensor, K: Tensor, L: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and errors of a stack of tiles, anti-diagonal by anti-diagonal.

    Every pass does whole tiles and keeps an anti-diagonal: fewer, larger operations.
    """
    at = torch.arange(TILE, device=W.device)
    waves = (at[:, None] + at).flip(0, 1)
    codes, E, base = torch.zeros_like(W), torch.zeros_like(W), W + shift
    for wave in range(2 * TILE - 1):
        code = ((base + K.mT @ E @ L) / steps).add_(zeros).round_().clamp_(least, -1 - least)
        now = waves == wave
        codes = torch.where(now, code, codes)
        E = torch.where(now, W - (code - zeros) * steps, E)
    return codes, E


def _tiles(X: Tensor, fill: float = 0.0) -> Tensor:
    """A matrix in tiles, `(*batch, tiles of rows, tiles of columns, b, b)`, filled up."""
    m, n = X.shape[-2:]
    X = torch.nn.functional.pad(X, (0, -n % TILE, 0, -m % TILE), value=fill)
    return X.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).movedim(-3, -2)


def _bands(L: Tensor) -> Tensor:
    """A unit lower triangle in bands of rows, `(*batch, tiles, b, n)`, filled up with zeros."""
    lacking = -L.shape[-1] % TILE
    return torch.nn.functional.pad(L, (0, lacking, 0, lacking)).unflatten(-2, (-1, TILE))


def _own(bands: Tensor, i: Tensor) -> Tensor:
    """Of each band the tile on the diagonal."""
    tiles = bands.unflatten(-1, (-1, TILE)).movedim(-2, -3)
    return tiles[..., torch.arange(len(i), device=i.device), i, :, :]


def _worse(found: Tensor, plain: Tensor, together: bool) -> Tensor:
    """The rows for which rounding to nearest is no worse; all or none if they hang together."""
    if together:
        found, plain = (t.sum(-1, keepdim=True).expand_as(t) for t in (found, plain))
    return found >= plain


def _each(value: QuantizedMatrix, function: Callable[[Tensor], Tensor]) -> QuantizedMatrix:
    """The same with every tensor exchanged."""
    zero = None if value.zero is None else function(value.zero)
    return replace(value, codes=function(value.codes), scale=function(value.scale), zero=zero)


def _chosen(first: Tensor, one: QuantizedMatrix, other: QuantizedMatrix) -> QuantizedMatrix:
    """Some rows of one matrix, the rest of another."""
    parts = [(one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero)]
    codes, steps, zero = (
        None if a is None else torch.where(first[..., None], a, b) for a, b in parts
    )
    return replace(other, codes=codes, scale=steps, zero=zero)


def _order(M: Tensor, by_activity: bool) -> Tensor:
    """The order of the work, reversed: the largest moments come last."""
    d = M.diagonal(dim1=-2, dim2=-1)
    return d.argsort(dim=-1, stable=True) if by_activity else torch.arange(d.shape[-1]).expand_as(d)


def _taken(X: Tensor, columns: Tensor) -> Tensor:
    """Columns in another order, batch by batch."""
    batch = torch.broadcast_shapes(X.shape[:-2], columns.shape[:-1])
    X = X.expand(*batch, *X.shape[-2:])
    return X.gather(-1, columns[..., None, :].expand_as(X))


def _both(M: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a moment in another order."""
    return _taken(_taken(M, order).mT, order).mT


def _like(value: QuantizedMatrix, W: Tensor) -> QuantizedMatrix:
    """The scales in the type of the weights."""
    zero = None if value.zero is None else value.zero.to(W.dtype)
    return replace(value, scale=value.scale.to(W.dtype), zero=zero)
