"""Families of structures: the best member of each for every storage.

Block families are closed forms: the singular values of the blocks of a partition compete. A recipe
of the library is a family too: `projected(recipes)` makes one from its projections.

One unit of storage is one number; a nonzero of a sparse matrix costs two, its value and its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matrigami.operators import Structure, cost, project
from matrigami.studies.analysis import _partitions
from matrigami.studies.analysis._curves import (
    Curve,
    Steps,
    competing,
    equal_ranks,
    from_steps,
    lowest,
)
from matrigami.studies.analysis._nested import nested_blocks, nested_curve, nested_member
from matrigami.studies.analysis._partitions import Partition


@dataclass(frozen=True, eq=False)
class Place:
    """Where a matrix lives: its size, and in which order its points are.

    Args:
        size: Rows and columns.
        points: Coordinates of rows and columns in the order of the matrix; None without geometry.
    """

    size: tuple[int, int]
    points: tuple[Float[Tensor, "m d"], Float[Tensor, "n d"]] | None = None
    _kept: dict[str, list[Partition]] = field(default_factory=dict, repr=False)

    def admissible(self) -> list[Bool[Tensor, "_ _"]]:
        """Pairs of clusters that are apart, by boxes where there are points."""
        if self.points is None:
            return _partitions.apart(*self.size)
        return _partitions.apart_in_space(*self.size, *self.points)

    def partitions(self, family: "Blocks") -> list[Partition]:
        """The partitions of a family, made once."""
        if family.name not in self._kept:
            self._kept[family.name] = family.partitions(self)
        return self._kept[family.name]


@runtime_checkable
class Family(Protocol):
    """A structure as the analysis sees it.

    Attributes:
        name: Its name.
        label: What people call it.
        world: Where it comes from: `HPC`, `AI` or both.
        optimal: Whether its members are the best ones, for the partition, or only quasi-best.
        ordered: Whether the order of rows and columns matters.
    """

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def world(self) -> str: ...
    @property
    def optimal(self) -> bool: ...
    @property
    def ordered(self) -> bool: ...

    def curve(self, A: Float[Tensor, "m n"], place: Place) -> Curve:
        """Error against storage."""
        ...

    def member(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Float[Tensor, "m n"]:
        """The best member with at most this storage, as a dense matrix; zero if there is none."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Low rank in each block of a partition; of several partitions the best.

    Args:
        name: As in `Family`.
        label: As in `Family`.
        world: As in `Family`.
        partitions: Those of a place.
        equal: All blocks have one rank; else ranks go where they are worth most.
        ordered: As in `Family`.
    """

    name: str
    label: str
    world: str
    partitions: Callable[[Place], list[Partition]]
    equal: bool = False
    ordered: bool = True
    optimal: bool = True

    def curve(self, A: Float[Tensor, "m n"], place: Place) -> Curve:
        """Error against storage."""
        return lowest([self._curve(A, part) for part in place.partitions(self)])

    def member(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Float[Tensor, "m n"]:
        """The best member with at most this storage."""
        part = self.best_partition(A, place, storage)
        blocks = part.blocks(A)
        kept = [
            _truncated(stack, ranks, most)
            for stack, (ranks, most) in zip(blocks, self.ranks(A, part, storage), strict=True)
        ]
        return part.matrix(kept)

    def best_partition(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Partition:
        """The partition with the lowest error at this storage."""
        return min(place.partitions(self), key=lambda part: self._curve(A, part).at(storage))

    def ranks(
        self, A: Float[Tensor, "m n"], part: Partition, storage: float
    ) -> list[tuple[Tensor, int]]:
        """The ranks of the blocks of each stack, and the rank that stands for a whole block."""
        numbers = storage * A.numel()
        if self.equal:
            each = sum(len(s) * sum(s.shape[1:]) for s in part.places)
            rank = int(numbers * (1 + 1e-6) // each)
            return [(torch.full((len(s),), rank), min(s.shape[1:]) + 1) for s in part.places]
        steps = self._steps(A, part)
        return list(zip(steps.ranks(numbers), steps.most, strict=True))

    def _curve(self, A: Float[Tensor, "m n"], part: Partition) -> Curve:
        """The curve of one partition."""
        if self.equal:
            return equal_ranks(_values(A, part), part.shapes, A.numel())
        steps = self._steps(A, part)
        return from_steps(steps.costs, steps.gains, A.numel())

    def _steps(self, A: Float[Tensor, "m n"], part: Partition) -> Steps:
        """The competition of one partition."""
        return competing(_values(A, part), part.shapes)


def _values(A: Float[Tensor, "m n"], part: Partition) -> list[Float[Tensor, "_ _"]]:
    """The singular values of all blocks."""
    return [torch.linalg.svdvals(stack) for stack in part.blocks(A)]


def _truncated(stack: Tensor, ranks: Tensor, most: int) -> Tensor:
    """Blocks of these ranks; those with the most are whole."""
    U, s, Vh = torch.linalg.svd(stack, full_matrices=False)
    kept = torch.arange(s.shape[1]) < torch.where(ranks >= most, s.shape[1], ranks)[:, None]
    return (U * (s * kept)[:, None, :]) @ Vh


@dataclass(frozen=True)
class Masks:
    """Matrices whose places are chosen, one set of places inside the next.

    Args:
        name: As in `Family`.
        label: As in `Family`.
        world: As in `Family`.
        rank: For each entry the place of its step in the order; steps are taken whole.
        units: Numbers that an entry costs.
        ordered: As in `Family`.
    """

    name: str
    label: str
    world: str
    rank: Callable[[Tensor], Tensor]
    units: int = 1
    ordered: bool = True
    optimal: bool = True

    def curve(self, A: Float[Tensor, "m n"], place: Place) -> Curve:
        """Error against storage."""
        step = self.rank(A).flatten()
        costs = self.units * torch.bincount(step).to(A)
        gains = torch.zeros_like(costs).index_add(0, step, A.flatten().square())
        return from_steps(costs, gains, A.numel())

    def member(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Float[Tensor, "m n"]:
        """The best member with at most this storage."""
        step = self.rank(A)
        costs = self.units * torch.bincount(step.flatten())
        taken = costs.cumsum(0) <= storage * A.numel() * (1 + 1e-6)
        return A * taken[step]


@dataclass(frozen=True)
class Candidates:
    """Members found one by one, each with its storage: closed forms of few sizes, projections.

    Args:
        name: As in `Family`.
        label: As in `Family`.
        world: As in `Family`.
        members: Of a matrix, pairs of stored numbers and a dense member.
        optimal: As in `Family`.
        ordered: As in `Family`.
    """

    name: str
    label: str
    world: str
    members: Callable[[Tensor], Sequence[tuple[float, Tensor]]]
    optimal: bool = False
    ordered: bool = True

    def curve(self, A: Float[Tensor, "m n"], place: Place) -> Curve:
        """Error against storage."""
        found = self.members(A)
        if not found:
            return Curve(A.new_ones(1), A.new_zeros(1))
        points = [(numbers / A.numel(), float((A - B).norm() / A.norm())) for numbers, B in found]
        return lowest([Curve(A.new_tensor([s]), A.new_tensor([e])) for s, e in points])

    def member(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Float[Tensor, "m n"]:
        """The best member with at most this storage."""
        fitting = [B for numbers, B in self.members(A) if numbers <= storage * A.numel()]
        return min(fitting, key=lambda B: float((A - B).norm()), default=torch.zeros_like(A))


@dataclass(frozen=True)
class Nested:
    """H2 matrices by strong, HSS matrices by weak admissibility: the better of both."""

    name: str = "h2"
    label: str = "H2 and HSS, nested bases"
    world: str = "HPC"
    optimal: bool = False
    ordered: bool = True

    def curve(self, A: Float[Tensor, "m n"], place: Place) -> Curve:
        """Error against storage."""
        return lowest([nested_curve(A, blocks) for blocks in self._both(place)])

    def member(self, A: Float[Tensor, "m n"], place: Place, storage: float) -> Float[Tensor, "m n"]:
        """The best member with at most this storage."""
        members = [nested_member(A, blocks, storage) for blocks in self._both(place)]
        return min(members, key=lambda B: float((A - B).norm()))

    def _both(self, place: Place) -> list:
        """Weakly and strongly admissible blocks."""
        strong = place.admissible()
        weak = [~torch.eye(len(mask), dtype=torch.bool) for mask in strong]
        return [nested_blocks(*place.size, masks) for masks in (weak, strong)]


def projected(name: str, recipes: Sequence[Structure], *, world: str = "AI") -> Candidates:
    """A family of the projections onto some recipes of the library.

    Args:
        name: Its name.
        recipes: Each gives one point, where it fits the size.
        world: Where it comes from.

    Examples:
        >>> from matrigami.structures import Monarch
        >>> family = projected("monarch of 2 blocks", [Monarch(blocks=2)])
        >>> A = torch.eye(4)
        >>> round(family.curve(A, Place((4, 4))).at(1.0), 3)
        0.0
    """

    def members(A: Tensor) -> list[tuple[float, Tensor]]:
        """The projections that exist."""
        found = []
        for recipe in recipes:
            try:
                B = project(recipe, A)
            except ValueError:  # a size or a rank that it does not have
                continue
            found.append((float(cost(B).params), B.dense()))
        return found

    return Candidates(name, name, world, members)
