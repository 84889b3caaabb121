"""The kernel matrix of points in two or three dimensions, as an H2 matrix on an octree.

Cells that touch, down to leaves, are near: their blocks are entries of the kernel. All others
belong to the far field of exactly one level: their parents touch, they do not. A parent couples the
coefficients of all of its children at once, with those of each of its neighbours by one block, the
same for all parents of a level: a convolution over parents, whose gaps are left out.

Shapes: m = targets, n = sources, N = cells of a level, P = parents of a level, d = dimension, D =
3^d - 1 neighbours, r = rank.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matrigami.geometry.particles._chebyshev import (
    Basis,
    Entries,
    basis,
    far_offsets,
)
from matrigami.geometry.particles._kernels import HOMOGENEOUS, Kernel, interactions, is_singular
from matrigami.geometry.particles._near import Leaves, gathered_leaves, near_field
from matrigami.geometry.particles._octree import Octree, decoded, octree, offsets
from matrigami.geometry.particles._planned import placed
from matrigami.operators import Places, is_differentiated
from matrigami.structures import H2Matrix, PlacedBlocksMatrix

CAP = {1: 64, 2: 64, 3: 64}
"""Most points of a cell that is not split, by dimension."""

OCCUPANCY = {1: 32, 2: 28, 3: 24}
"""Points of a leaf of a uniform cloud."""


ALLOWED = 1.0
"""The largest error of an entry over its root mean square."""


@dataclass(frozen=True)
class Far:
    """The operators of one level, whose cells are the children of its parents.

    Attributes:
        basis: Of the cells.
        factor: What the basis is multiplied by.
        couplings: Between a parent's children and those of each neighbour.
    """

    basis: Basis
    factor: float
    couplings: Float[Tensor, "D cr cr"]


def fast_multipole_matrix(
    targets: Float[Tensor, "m d"],
    sources: Float[Tensor, "n d"],
    kernel: Kernel,
    scale: Tensor | float,
    tol: float,
    planned: bool = False,
) -> H2Matrix:
    """The kernel matrix; `targets is sources` for one cloud; blocks of points may be planned."""
    d = sources.shape[1]
    with torch.no_grad():
        points = targets.detach(), sources.detach()
        same = targets is sources
        tree = octree(points[1] if same else points[0], points[1], CAP[d], OCCUPANCY[d])
    singular = is_singular(kernel)

    def entries(X: Tensor, Y: Tensor) -> Tensor:
        """The kernel of all pairs."""
        return interactions(kernel, X, Y, scale, singular=singular)

    size = (len(targets), len(sources))
    rows = gathered_leaves(tree, of_targets=True)
    columns = rows if same else gathered_leaves(tree, of_targets=False)
    near = near_field(tree, rows, targets, sources, entries, planned)
    partners = [_partners(tree, level) for level in range(1, len(tree.levels) - 1)]
    spanned = _spanned(kernel, entries, scale, singular)
    far = _far_levels(tree, partners, kernel, entries, spanned, tol, sources)
    left = _leaf_bases(tree, rows, targets, far, planned)
    right = left if same else _leaf_bases(tree, columns, sources, far, planned)
    up = _transfers(tree, far)
    return H2Matrix(
        near,
        left,
        tuple([_coupling(p, F) for p, F in zip(partners, far, strict=True)]),
        tuple([tuple([B.T for B in side]) for side in right]),
        tuple([B.T for B in up]),
        up,
        size,
    )


def _spanned(kernel: Kernel, entries: Entries, scale: Tensor | float, singular: bool) -> Entries:
    """The kernel and, where that is asked for, beside it its derivative in the scale.

    Bases of the kernel alone hold three digits of it; of homogeneous kernels it is a multiple.
    """
    if not isinstance(scale, Tensor) or not is_differentiated(scale) or kernel in HOMOGENEOUS:
        return entries
    at = scale.detach()

    def both(X: Tensor, Y: Tensor) -> Tensor:
        """Along the rows of the kernel those of `s dK / ds`."""

        def moved(s: Tensor) -> Tensor:
            """The kernel of a scale."""
            return interactions(kernel, X, Y, s, singular=singular)

        return torch.cat(torch.func.jvp(moved, (at,), (at,)), -1)

    return both


def _parents(tree: Octree, level: int) -> Int[Tensor, " P"]:
    """The index, among the cells of a level, of those that have children."""
    return tree.levels[level].split.nonzero()[:, 0]


def _bases(
    kernel: Kernel, entries: Entries, sizes: list[float], errors: list[float], like: Tensor
) -> tuple[Basis | None, list[Basis], list[float]]:
    """The basis of each level, with its factor; of homogeneous kernels, one for all of them."""
    d, degree = like.shape[1], HOMOGENEOUS.get(kernel)
    if degree is None:
        pairs = enumerate(zip(sizes, errors, strict=True), 1)
        bases = [basis(entries, h, d, level, e, like) for level, (h, e) in pairs]
        return None, bases, [1.0] * len(sizes)
    error = min(e / h**degree for e, h in zip(errors, sizes, strict=True))
    unit = basis(entries, 1.0, d, len(sizes), error, like)
    return unit, [unit.resized(h) for h in sizes], [h ** (degree / 2) for h in sizes]


def _far_levels(
    tree: Octree,
    partners: list[Tensor],
    kernel: Kernel,
    entries: Entries,
    spanned: Entries,
    tol: float,
    like: Tensor,
) -> list[Far]:
    """The operators of all levels, from the children of level one to the finest.

    Args:
        tree: The cells.
        partners: Of the parents of each level.
        kernel: The kernel.
        entries: Of all pairs.
        spanned: What bases are made for.
        tol: The relative error.
        like: A tensor of the type and on the device wanted.
    """
    d = like.shape[1]
    depths = range(1, len(tree.levels) - 1)
    sizes = [tree.side / 2 ** (level + 1) for level in depths]
    if not sizes:
        return []
    with torch.no_grad():
        errors = _errors(entries, sizes, tol, like)
        unit, bases, factors = _bases(kernel, spanned, sizes, errors, like)
    shared = None if unit is None else _parent_couplings(unit, entries, d)
    return [
        Far(b, factor, _level_couplings(p, b, entries) if shared is None else shared)
        for p, b, factor in zip(partners, bases, factors, strict=True)
    ]


def _level_couplings(
    partners: Int[Tensor, "D P"], b: Basis, entries: Entries
) -> Float[Tensor, "D cr cr"]:
    """Those between the parents of a level; none are computed where no two parents touch."""
    d = b.skeleton.shape[1]
    if (partners >= 0).any():
        return _parent_couplings(b, entries, d)
    width = 2**d * b.U.shape[1]
    return b.U.new_zeros(1, 1, 1).expand(3**d - 1, width, width)


def _errors(entries: Entries, sizes: list[float], tol: float, like: Tensor) -> list[float]:
    """The error of an entry of each level, for a relative error of the product with random signs.

    The mean square of a sum with random signs is the sum of the squares. Per unit of density, `e^2
    (6^d - 3^d) h^d` of error comes from each level; the levels share it equally.
    """
    d, generator = like.shape[1], torch.Generator().manual_seed(0)
    X, Y = (torch.rand(1000, d, generator=generator, dtype=torch.float64) - 0.5 for _ in range(2))
    pick = torch.randint(len(far_offsets(d)), (1000,), generator=generator)
    far, near = (Y + far_offsets(d)[pick]).to(like), (3 * Y).to(like)

    def energy(Y: Tensor, h: float, cells: int) -> float:
        """The sum of the squares over cells."""
        K = entries((X.to(like) * h)[:, None], (Y * h)[:, None])
        return float(K.square().mean()) * cells * h**d

    cells = 6**d - 3**d
    total = energy(near, sizes[-1], 3**d) + sum(energy(far, h, cells) for h in sizes)
    return [ALLOWED * tol * (total / (len(sizes) * cells * h**d)) ** 0.5 for h in sizes]


def _parent_couplings(b: Basis, entries: Entries, d: int) -> Float[Tensor, "D cr cr"]:
    """For each neighbour of a parent, the blocks between all children, zero where they touch."""
    r, c = b.U.shape[1], 2**d
    far = far_offsets(d)
    apart = (far.to(b.U) * b.h)[:, None]
    blocks = b.M @ entries(b.skeleton, b.skeleton + apart) @ b.M.mT
    table = torch.cat([blocks, blocks.new_zeros(1, r, r)])
    octants = _octants(d)
    sides = offsets(d)[_others(3**d)]
    shift = 2 * sides[:, None, None] + octants[None, None] - octants[None, :, None]  # D c c d
    lookup = torch.full((7,) * d, len(far))
    lookup[tuple((far + 3).unbind(-1))] = torch.arange(len(far))
    index = lookup[tuple((shift + 3).unbind(-1))]  # D c c
    return table[index].transpose(-3, -2).reshape(len(shift), c * r, c * r)


def _others(count: int) -> list[int]:
    """The places among `3^d` cells of all but the one in the middle."""
    return [i for i in range(count) if i != count // 2]


def _octants(d: int) -> Int[Tensor, "c d"]:
    """The places of the children in their parent, in the order of the curve."""
    return decoded(torch.arange(2**d), d)


def _coupling(partner: Int[Tensor, "D P"], far: Far) -> PlacedBlocksMatrix:
    """The blocks of the parents of a level, listed by the neighbours that any of them has."""
    chosen, P = (partner >= 0).any(1).nonzero()[:, 0], partner.shape[1]
    partner = partner[chosen]
    here = partner >= 0
    most = int(here.sum(1).max()) if len(chosen) else 0
    order = (~here).long().argsort(stable=True, dim=1)[:, :most]
    found = here.gather(1, order)
    rows = torch.where(found, order, P)
    columns = torch.where(found, partner.gather(1, order), P)
    width = far.couplings.shape[-1]
    blocks = far.couplings if len(chosen) == len(far.couplings) else far.couplings[chosen]
    return PlacedBlocksMatrix(blocks, Places(rows), Places(columns), (P * width, P * width))


def _partners(tree: Octree, level: int) -> Int[Tensor, "D P"]:
    """For each neighbour, which parent it is; minus one for none."""
    parents, cells = _parents(tree, level), tree.levels[level]
    slot = torch.full((len(cells.codes) + 1,), -1, device=parents.device)
    slot[parents] = torch.arange(len(parents), device=parents.device)
    return slot[cells.neighbours[parents][:, _others(cells.neighbours.shape[1])]].T


def _transfers(tree: Octree, far: list[Far]) -> tuple[PlacedBlocksMatrix, ...]:
    """From the coefficients of the children of each parent to those of the parent itself."""
    transfers = []
    for level in range(2, len(far) + 1):
        coarse, fine = far[level - 2], far[level - 1]
        b, d = fine.basis, len(tree.corner)
        centers = (_octants(d).to(b.U) - 0.5) * b.h
        S = coarse.basis.at(centers[:, None] + b.skeleton)  # c s rcoarse
        T = (b.M @ S).mT * (coarse.factor / fine.factor)
        block = T.transpose(0, 1).flatten(1)[None]  # 1 rcoarse (c rfine)
        parents = _parents(tree, level)
        above = tree.levels[level - 1]
        codes = tree.levels[level].codes[parents]
        parent = torch.searchsorted(above.codes[above.split], codes // 2**d)
        rows = (parent * 2**d + codes % 2**d)[None]
        columns = torch.arange(len(parents), device=rows.device)[None]
        size = (int(above.split.sum()) * 2**d * T.shape[1], len(parents) * block.shape[-1])
        transfers.append(PlacedBlocksMatrix(block, Places(rows), Places(columns), size))
    return tuple(transfers)


def _leaf_bases(
    tree: Octree, leaves: list[Leaves], X: Float[Tensor, "n d"], far: list[Far], planned: bool
) -> tuple[tuple[PlacedBlocksMatrix, ...], ...]:
    """From the coefficients of leaves to their points, level by level."""
    d = X.shape[1]
    padded = torch.cat([X, X[:1]])
    found: list[list[PlacedBlocksMatrix]] = [[] for _ in far]
    for leaf in leaves:
        if leaf.level < 2:
            continue
        F = far[leaf.level - 2]
        above = tree.levels[leaf.level - 1]
        slot = torch.searchsorted(above.codes[above.split], leaf.codes // 2**d) * 2**d
        slot = slot + leaf.codes % 2**d
        make = partial(_basis_at, F, padded, leaf, tree.centers(leaf.level, leaf.codes))
        r = F.basis.U.shape[1]
        size = (len(X), int(above.split.sum()) * 2**d * r)
        blocks = placed(make, leaf.points, slot, size, r, F.basis.U, planned)
        found[leaf.level - 2].append(blocks)
    return tuple([tuple(level) for level in found])


def _basis_at(
    far: Far, X: Float[Tensor, "n d"], leaf: Leaves, centers: Float[Tensor, "l d"], kept: Tensor
) -> Float[Tensor, "k p r"]:
    """The basis at the points of some leaves."""
    return far.basis.at(X[leaf.points[kept]] - centers[kept][:, None]) * far.factor
