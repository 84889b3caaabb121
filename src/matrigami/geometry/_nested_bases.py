"""H2 matrices of points in the plane and in space, from products with the matrix alone.

Boxes of a balanced tree are near where the gap between them is less than half a side; every other
block of a box has low rank. One random sketch, `Y = A G` and `Z = A.H F`, serves all boxes of all
levels: on the complement of what `G` has near a box, its rows of `Y` show its far field alone,
hence a basis; and, less that basis, they are its near blocks times `G`, known by least squares.
What is left is a matrix of coefficients, with a sketch that is known, and half as many boxes. So
the number of products does not grow with the size of the matrix. Sources: Levitt and Martinsson
(2024), J. Comput. Appl. Math. 451 (arXiv:2205.02990), for bases and remainders; Yesypenko and
Martinsson (2023), arXiv:2311.01451, for blocks that are not next to the diagonal.

Shapes: N = boxes of b rows, c = most boxes near one, k = vectors, r = rank, e = near pairs, d =
dimension.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor

from matrigami.geometry._ordered import Ordered
from matrigami.operators import Places
from matrigami.structures import H2Matrix, PlacedBlocksMatrix

GAP = 0.5
"""Boxes are near where the gap between them is less than this share of the longest side."""

SPARE = 1.25
"""Vectors for each row near a box: with as many as rows its least squares would be singular."""

OVERSAMPLED = 10
"""Vectors beyond those and the rank."""

START = 24
"""The rank that is expected at first."""

CHUNK = 2**24
"""Numbers of a batch of sketches."""


class Near(NamedTuple):
    """The boxes near each box of a level, itself among them.

    Attributes:
        boxes: Their numbers.
        there: Which of these are meant; the others repeat the first.
        back: The place of the box itself in the list of that one.
    """

    boxes: Int[Tensor, "N c"]
    there: Bool[Tensor, "N c"]
    back: Int[Tensor, "N c"]


def near_boxes(X: Float[Tensor, "n d"], levels: int) -> list[Near]:
    """The near boxes of each level, the finest first.

    Args:
        X: Points in the order of the tree.
        levels: Of halvings.
    """
    p = -(-len(X) // 2**levels)
    low, high = (_padded(X, 2**levels * p, fill) for fill in (torch.inf, -torch.inf))
    low, high = low.unflatten(0, (-1, p)).amin(1), high.unflatten(0, (-1, p)).amax(1)
    found = []
    for _ in range(levels):
        found.append(_near(low, high))
        low, high = low.unflatten(0, (-1, 2)).amin(1), high.unflatten(0, (-1, 2)).amax(1)
    return found


def _padded(X: Float[Tensor, "n d"], n: int, fill: float) -> Float[Tensor, "_ d"]:
    """Nobody behind the last point."""
    return torch.nn.functional.pad(X, (0, 0, 0, n - len(X)), value=fill)


def _near(low: Float[Tensor, "N d"], high: Float[Tensor, "N d"]) -> Near:
    """By the gaps between boxes."""
    N = len(low)
    sides = (high - low).amax(1).clamp(min=0)
    apart = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0).norm(dim=-1)
    here = apart < GAP * torch.maximum(sides[:, None], sides)
    here |= torch.eye(N, dtype=torch.bool, device=low.device)
    place = here.cumsum(1) - 1
    c = int(place[:, -1].max()) + 1
    boxes = torch.zeros(N, c, dtype=torch.long, device=low.device)
    there = torch.zeros(N, c, dtype=torch.bool, device=low.device)
    t, s = here.nonzero(as_tuple=True)
    boxes[t, place[t, s]], there[t, place[t, s]] = s, True
    return Near(boxes, there, place[boxes, torch.arange(N, device=low.device)[:, None]])


class Sketch(NamedTuple):
    """A matrix of boxes, by products with random vectors.

    Attributes:
        Y: `A G`.
        G: The vectors.
        Z: `A.H F`.
        F: Other vectors.
    """

    Y: Inexact[Tensor, "N b k"]
    G: Inexact[Tensor, "N q k"]
    Z: Inexact[Tensor, "N q k"]
    F: Inexact[Tensor, "N b k"]

    @property
    def swapped(self) -> "Sketch":
        """Of the adjoint."""
        return Sketch(self.Z, self.F, self.Y, self.G)


class Step(NamedTuple):
    """One level: `A = near + left (what is left) right.H`.

    Attributes:
        near: The blocks of near boxes, less what the bases say of them.
        left: Orthonormal bases of rows.
        right: Of columns.
    """

    near: Inexact[Tensor, "N c b b"]
    left: Inexact[Tensor, "N b r"]
    right: Inexact[Tensor, "N b r"]


def needed(near: Near, rows: int, rank: int) -> int:
    """Vectors for a level."""
    return int(SPARE * near.boxes.shape[1] * rows) + rank + OVERSAMPLED


def split(sketch: Sketch, near: Near, error: float) -> Step:
    """Bases and near blocks of a level.

    Args:
        sketch: Of the matrix.
        near: The near boxes.
        error: Allowed in the Frobenius norm for each basis.
    """
    (left, first, G), (right, second, H) = (
        _based(s, near, error) for s in (sketch, sketch.swapped)
    )
    rank = max(first, second)
    left, right = left[..., :rank], right[..., :rank]
    G, H = (D - U[:, None] @ (U.mH[:, None] @ D) for U, D in ((left, G), (right, H)))
    H = H[near.boxes, near.back]  # of the block in this place, adjoint
    rest = left[:, None] @ (H @ left[:, None]).mH
    return Step((G + rest) * near.there[..., None, None], left, right)


def _based(
    sketch: Sketch, near: Near, error: float
) -> tuple[Inexact[Tensor, "N b b"], int, Inexact[Tensor, "N c b b"]]:
    """Bases of the far field, how many columns matter, and near blocks up to such columns."""
    N, b, k = sketch.Y.shape
    c = near.boxes.shape[1]
    bases, values, blocks = [], [], []
    for part in torch.arange(N, device=near.boxes.device).split(max(CHUNK // (c * b * k), 1)):
        there, Y = near.there[part][..., None, None], sketch.Y[part]
        known = (sketch.G[near.boxes[part]] * there).flatten(1, 2)  # cb k
        nobody = (~near.there[part]).repeat_interleave(b, 1).to(Y.dtype)
        L = torch.linalg.cholesky(known @ known.mH + torch.diag_embed(nobody))
        D = torch.cholesky_solve(known @ Y.mH, L).mH
        far = torch.linalg.qr((Y - D @ known).mH, mode="r").R.mH  # as many columns as rows
        U, found, _ = torch.linalg.svd(far, full_matrices=False)
        bases.append(U)
        values.append(found / max(k - c * b, 1) ** 0.5)
        blocks.append(D.unflatten(-1, (c, b)).transpose(1, 2))
    tails = torch.cat(values).square().flip(-1).cumsum(-1).flip(-1).sqrt()
    rank = max(int((tails > error).sum(-1).max()), 1)
    return torch.cat(bases), rank, torch.cat(blocks)


def reduced(sketch: Sketch, step: Step, near: Near) -> Sketch:
    """The sketch of what is left, two boxes in one."""
    adjoint = step.near[near.boxes, near.back].mH
    Y = _less(sketch.Y, step.near, sketch.G, near)
    Z = _less(sketch.Z, adjoint * near.there[..., None, None], sketch.F, near)
    left, right = step.left.mH, step.right.mH
    return Sketch(*[_joined(t) for t in (left @ Y, right @ sketch.G, right @ Z, left @ sketch.F)])


def _joined(t: Inexact[Tensor, "N r k"]) -> Inexact[Tensor, "_ q k"]:
    """Siblings as one box."""
    return t.unflatten(0, (-1, 2)).flatten(1, 2)


def _less(Y: Tensor, D: Tensor, G: Tensor, near: Near) -> Inexact[Tensor, "N b k"]:
    """`Y - D G`, neighbour by neighbour."""
    for place in range(D.shape[1]):
        Y = Y - D[:, place] @ G[near.boxes[:, place]]
    return Y


def _remainder(sketch: Sketch) -> Inexact[Tensor, "m n"]:
    """What is left, when everything is near."""
    G, Y = sketch.G.flatten(0, 1), sketch.Y.flatten(0, 1)
    return torch.linalg.lstsq(G.mH, Y.mH).solution.mH


def sketched(A: Ordered, nears: list[Near], error: float, seed: int) -> H2Matrix:
    """The matrix by random vectors, as many as it takes.

    Args:
        A: The matrix.
        nears: The near boxes of each level.
        error: Allowed in the Frobenius norm for each basis.
        seed: Of the random vectors.

    Raises:
        ValueError: If that is as many as the matrix has columns.
    """
    levels = _Levels(A, nears, seed)
    for near in nears:
        N, b, _ = levels.sketch.Y.shape
        if needed(near, b, 0) >= N * b:
            break
        levels.add(near, error)
    levels.grow(int(SPARE * levels.sketch.G.shape[:2].numel()) + 1)
    return _assembled(levels.steps, _remainder(levels.sketch), nears, len(A.order))


class _Levels:
    """The levels that are done, and a sketch of what they leave, of ever more vectors.

    What is known of a level is not computed again: vectors that are drawn later go through it.
    """

    def __init__(self, A: Ordered, nears: list[Near], seed: int) -> None:
        self.A, self.nears = A, nears
        self.steps: list[Step] = []
        self.like = A.zero().expand(*A.leaves, 1)
        self.generator = torch.Generator(self.like.device).manual_seed(seed)
        self.sketch = self._drawn(0)

    def grow(self, k: int) -> None:
        """Have at least so many vectors.

        Raises:
            ValueError: If the matrix has no more columns.
        """
        if k > len(self.A.order):
            raise ValueError(
                f"{self.A.call}({self.A.A!r}): it takes {k} products, as many as columns, at this "
                "tolerance.\n"
                "Between boxes that are apart the matrix does not compress.\n"
                "Use a larger tol, a smaller leaf, or points among which it is smooth."
            )
        more = k - self.sketch.Y.shape[-1]
        if more > 0:
            fresh = self._drawn(more)
            for step, near in zip(self.steps, self.nears, strict=False):
                fresh = reduced(fresh, step, near)
            self.sketch = Sketch(*[torch.cat(t, -1) for t in zip(self.sketch, fresh, strict=True)])

    def add(self, near: Near, error: float) -> None:
        """The next level, by as many vectors as its ranks ask for."""
        b, rank = self.sketch.Y.shape[1], START
        while True:
            self.grow(needed(near, b, rank))
            step = split(self.sketch, near, error)
            rank = step.left.shape[-1]
            if self.sketch.Y.shape[-1] >= needed(near, b, min(rank, b - OVERSAMPLED)):
                break
            rank += OVERSAMPLED
        self.steps.append(step)
        self.sketch = reduced(self.sketch, step, near)

    def _drawn(self, k: int) -> Sketch:
        """Products with random vectors."""
        G, F = (_gaussian(self.like, k, self.generator) for _ in range(2))
        Y = self.A.times(G.flatten(0, 1))
        Z = self.A.times(F.flatten(0, 1).conj(), transposed=True).conj()
        return Sketch(Y.reshape(G.shape), G, Z.reshape(G.shape), F)


def _gaussian(
    like: Inexact[Tensor, "N b _"], k: int, generator: torch.Generator
) -> Inexact[Tensor, "N b k"]:
    """Random vectors."""
    shape = (*like.shape[:2], k)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _assembled(steps: list[Step], top: Tensor, nears: list[Near], size: int) -> H2Matrix:
    """The value, whose levels are listed from the coarsest.

    Near blocks take what the levels above say of their boxes, so that every pair of rows and
    columns is either near or far.
    """
    couplings, down, up = [], [], []
    N = len(steps[-1].left) // 2
    blocks = top.unflatten(0, (N, -1)).unflatten(2, (N, -1)).transpose(1, 2)  # N N q q
    every = torch.arange(N, device=top.device)
    above = Near(every.expand(N, N), torch.ones_like(every.expand(N, N), dtype=torch.bool), every)
    for step, near in zip(reversed(steps), reversed(nears[: len(steps)]), strict=True):
        blocks, inner = _parted(blocks, above, near)
        couplings.append(_placed(blocks, above, None))
        blocks = step.near + step.left[:, None] @ inner @ step.right[near.boxes].mH
        above = near
        down.append(_bases(step.left, None))
        up.append(_bases(step.right.conj(), None).T)
    first, empty = steps[0], [()] * (len(steps) - 1)
    return H2Matrix(
        (_placed(blocks, above, size),),
        (*empty, (_bases(first.left, size),)),
        tuple(couplings),
        (*empty, (_bases(first.right.conj(), size).T,)),
        tuple(down[:-1]),
        tuple(up[:-1]),
        (size, size),
    )


def _parted(
    blocks: Inexact[Tensor, "M c q q"], above: Near, near: Near
) -> tuple[Inexact[Tensor, "M c q q"], Inexact[Tensor, "N _ r r"]]:
    """Blocks without those of children that are near, and these."""
    t = torch.arange(len(near.boxes), device=blocks.device)[:, None].expand_as(near.boxes)
    s = near.boxes
    parents = above.boxes[t // 2] == (s // 2)[..., None]
    place = (parents & above.there[t // 2]).long().argmax(-1)
    M, c, q, _ = blocks.shape
    B = blocks.reshape(M, c, 2, q // 2, 2, q // 2).transpose(3, 4).clone()
    index = (t // 2, place, t % 2, s % 2)
    inner = B[index] * near.there[..., None, None]
    B[tuple([i[near.there] for i in index])] = 0
    return B.transpose(3, 4).reshape(blocks.shape), inner


def _placed(blocks: Inexact[Tensor, "N c b b"], near: Near, size: int | None) -> PlacedBlocksMatrix:
    """The blocks that are not zero, by units or, with a size, by rows."""
    N, _, b, _ = blocks.shape
    t, place = (near.there & (blocks != 0).any(-1).any(-1)).nonzero(as_tuple=True)
    rows, columns = (_places(i, b, size) for i in (t, near.boxes[t, place]))
    m = N * b if size is None else size
    return PlacedBlocksMatrix(blocks[t, place], rows, columns, (m, m))


def _bases(U: Inexact[Tensor, "N b r"], size: int | None) -> PlacedBlocksMatrix:
    """From the coefficients of each box to its rows."""
    N, b, r = U.shape
    t = torch.arange(N, device=U.device)
    shape = (N * b if size is None else size, N * r)
    return PlacedBlocksMatrix(U, _places(t, b, size), _places(t, r, None), shape)


def _places(boxes: Int[Tensor, " e"], b: int, size: int | None) -> Places:
    """Boxes as units, or the rows in each, of which those behind the last are nowhere."""
    if size is None:
        return Places(boxes[:, None])
    rows = boxes[:, None] * b + torch.arange(b, device=boxes.device)
    return Places(rows.clamp(max=size)[:, None])
