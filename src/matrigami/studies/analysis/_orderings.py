"""Orders of rows and columns: which entries are neighbours is a choice, and a separate question.

Bisection: a set is halved at the median of a key, again and again, so that the clusters of the
partitions are the sets. Keys: the widest coordinate of points (geometric), the projection of rows
onto their first principal direction (PCA), which of two far rows is nearer by the angle of a Gram
matrix (March et al. 2017, arXiv:1707.00164). Reverse Cuthill-McKee narrows the band of the largest
entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matrigami.studies.analysis._partitions import depth

Order = tuple[Int[Tensor, " m"], Int[Tensor, " n"]]
"""Which rows and which columns come first."""

RANDOM = 3
"""Random orders, whose errors are averaged."""

POWER_STEPS = 6
"""Of the iteration that finds a principal direction."""

NEIGHBORS = 8
"""Entries of a row, on average, that reverse Cuthill-McKee keeps."""

SMALLEST = 4
"""Sets of so many are not halved further."""

LABELS = {
    "given": "the given order",
    "random": "a random order",
    "geometric": "geometric order",
    "pca": "PCA bisection",
    "gram": "Gram-angle bisection",
    "rcm": "reverse Cuthill-McKee",
}
"""What the orders are called."""

ORDERINGS = tuple(LABELS)
"""Their names."""

SEARCHED = ("pca", "gram", "rcm")
"""Orders that are made from the entries: null models get the same search."""


@dataclass(frozen=True)
class Traits:
    """What decides which orders exist.

    Args:
        symmetric: The matrix equals its transpose: rows and columns have one order.
        definite: And its diagonal is positive, that of a Gram matrix.
    """

    symmetric: bool
    definite: bool


def traits_of(A: Float[Tensor, "m n"]) -> Traits:
    """Whether the matrix is symmetric, and may be a Gram matrix."""
    symmetric = A.shape[0] == A.shape[1] and bool(
        (A - A.mT).abs().max() <= 1e-10 * A.abs().max() if A.numel() else True
    )
    definite = symmetric and bool((A.diagonal() > 0).all()) and _is_gram(A)
    return Traits(symmetric, definite)


def _is_gram(A: Float[Tensor, "n n"]) -> bool:
    """Whether no two-by-two minor is negative."""
    d = A.diagonal()
    return bool((A.square() <= d[:, None] * d * (1 + 1e-8)).all())


def order(
    name: str,
    A: Float[Tensor, "m n"],
    traits: Traits,
    points: tuple[Float[Tensor, "m d"], Float[Tensor, "n d"]] | None = None,
    seed: int = 0,
) -> Order | None:
    """An order of a matrix by its name; None where it does not exist.

    Args:
        name: One of `ORDERINGS`.
        A: The matrix.
        traits: Of the matrix.
        points: Coordinates of rows and columns, for `geometric`.
        seed: For `random`.
    """
    m, n = A.shape
    if name == "given":
        return torch.arange(m), torch.arange(n)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(m, generator=generator)
        return rows, rows if traits.symmetric else torch.randperm(n, generator=generator)
    if name == "geometric":
        if points is None:
            return None
        return _by_points(points[0], depth(m, n)), _by_points(points[1], depth(m, n))
    return _from_entries(name, A, traits)


def _from_entries(name: str, A: Float[Tensor, "m n"], traits: Traits) -> Order | None:
    """An order that is made from the entries."""
    m, n = A.shape
    if name == "rcm":
        return _cuthill_mckee(A) if m == n and n > 2 else None
    if name == "gram" and not traits.definite:
        return None
    rows = bisection(m, _angles(A) if name == "gram" else _principal(A), depth(m, n))
    return rows, rows if traits.symmetric else bisection(n, _principal(A.mT), depth(m, n))


def bisection(
    n: int, key: Callable[[Int[Tensor, " _"]], Float[Tensor, " _"]], halvings: int
) -> Int[Tensor, " n"]:
    """The order in which the halves of every set follow each other.

    Args:
        n: Size of the whole set.
        key: Of a set, a number for each member; those below the median come first.
        halvings: Those of the partitions, so that their clusters are the sets; small ones are
            halved further.
    """
    sets = [(torch.arange(n), -(-n // 2**halvings) * 2**halvings)]
    ordered: list[Tensor] = []
    while sets:
        members, capacity = sets.pop()
        if len(members) <= SMALLEST or capacity <= SMALLEST:
            ordered.append(members)
            continue
        members = members[key(members).argsort(stable=True)]
        half = -(-capacity // 2)
        sets += [(members[half:], half), (members[:half], half)]
    return torch.cat(ordered)


def _by_points(X: Float[Tensor, "n d"], halvings: int) -> Int[Tensor, " n"]:
    """Halved along the widest axis."""

    def key(members: Tensor) -> Tensor:
        box = X[members]
        return box[:, int((box.amax(0) - box.amin(0)).argmax())]

    return bisection(len(X), key, halvings)


def _principal(A: Float[Tensor, "m n"]) -> Callable[[Tensor], Tensor]:
    """The projections of rows onto their first principal direction."""
    start = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0), dtype=A.dtype)

    def key(members: Tensor) -> Tensor:
        rows = A[members] - A[members].mean(0)
        v = start
        for _ in range(POWER_STEPS):
            v = rows.mT @ (rows @ v)
            v = v / v.norm().clamp(min=1e-300)
        return rows @ v

    return key


def _angles(A: Float[Tensor, "n n"]) -> Callable[[Tensor], Tensor]:
    """How much nearer to one of two far members than to the other, by the angle."""
    d = A.diagonal()
    distance = 1 - A.square() / (d[:, None] * d)

    def key(members: Tensor) -> Tensor:
        D = distance[members][:, members]
        first = int(D[0].argmax())
        second = int(D[first].argmax())
        return D[first] - D[second]

    return key


def _cuthill_mckee(A: Float[Tensor, "n n"]) -> Order:
    """Of the graph of the largest entries off the diagonal."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - not needed to import the package
    from scipy.sparse.csgraph import reverse_cuthill_mckee  # noqa: PLC0415

    n = len(A)
    weight = (A.abs() + A.mT.abs()).fill_diagonal_(0)
    kept = min(NEIGHBORS * n, n * (n - 1))
    cut = weight.flatten().kthvalue(n * n - kept + 1).values
    graph = csr_array(((weight >= cut) & (weight > 0)).numpy())
    found = torch.as_tensor(reverse_cuthill_mckee(graph, symmetric_mode=True).copy()).long()
    return found, found


def inverse(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order that undoes another."""
    return order.argsort()
