"""The base class of recipes, and the sizes and ranks that they need before they build a value."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from matrigami.operators._base import LinearOperator, Value
from matrigami.operators._convert import is_count
from matrigami.operators._functions import fans
from matrigami.operators._tree import named_tensors, with_tensors

BALANCE = 4
"""Largest accepted ratio of two factors; beyond it the size is padded (a prime gives 1 x p)."""


class Structure(ABC):
    """A recipe: a family of matrices with one parameterisation, e.g. `LowRank(rank=8)`.

    A subclass is a frozen dataclass of hyper-parameters that says in `blank` which tensors a member
    has. `project(recipe, W)` is its other half.
    """

    exact_projection: ClassVar[bool] = True
    """Whether `project` surely finds a member again; False where it may stop at a local minimum."""

    @abstractmethod
    def blank(self, m: int, n: int, empty: Callable[..., Tensor]) -> LinearOperator:
        """A `m x n` member of tensors made by `empty(*shape)`, or a `ValueError`."""

    def init(
        self,
        m: int,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LinearOperator:
        """Draw a random `m x n` member, Gaussian, scaled tensor by tensor as `fans` says.

        Args:
            m: Rows.
            n: Columns.
            generator: Source of the random numbers.
            dtype: Type of the tensors, real or complex.
            device: Where they are.

        Raises:
            ValueError: If the structure has no member of this size.
        """
        check_sizes(self, m=m, n=n)
        return draw(self.blank(m, n, partial(torch.empty, dtype=dtype, device=device)), generator)


def check_recipe(structure: Any, what: str) -> None:
    """Refuse what is no recipe.

    Args:
        structure: What was given.
        what: The call, and the name of the argument.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(structure, Structure):
        return
    is_class = isinstance(structure, type) and issubclass(structure, Structure)
    raise TypeError(
        f"{what}={structure!r} is no structure{' but a class of them' if is_class else ''}.\n"
        "Give a recipe such as LowRank(rank=2); matrigami.structures.parse reads the name of one."
    )


def check_sizes(what: Any, **sizes: Any) -> None:
    """Refuse sizes that nothing can have.

    Args:
        what: Of what they are.
        sizes: By their names.

    Raises:
        ValueError: If one is no whole number of at least 1.
    """
    for name, size in sizes.items():
        if not is_count(size):
            raise ValueError(
                f"{what}: {name} cannot be {size!r}.\nSizes are whole numbers of at least 1."
            )


EXAMPLES: dict[str, Structure] = {}
"""One recipe of each structure by its command-line name: laws, tables and CLI walk over it."""

Recipe = TypeVar("Recipe", bound=Structure)


def example(name: str, **arguments: Any) -> Callable[[type[Recipe]], type[Recipe]]:
    """Enter a recipe in `EXAMPLES`: its name, and the arguments of the one that stands for it.

    Args:
        name: What study files and the command line call it.
        **arguments: Hyper-parameters that fit small sizes, too.

    Raises:
        ValueError: If the name is taken by another recipe.
    """

    def entered(cls: type[Recipe]) -> type[Recipe]:
        """The class as it is."""
        taken = type(EXAMPLES.get(name))
        if name in EXAMPLES and taken.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"example({name!r}): the name is that of {taken.__name__} already.\n"
                f"Give {cls.__name__} another one."
            )
        EXAMPLES[name] = cls(**arguments)
        return cls

    return entered


def factorize(n: int, parts: int) -> tuple[int, ...]:
    """Balanced ascending factors of the smallest size at least `n` that has them.

    Primes go, in ascending order, each to the smallest factor (the rule of Qiu et al. 2024); a
    size whose factors differ by more than `BALANCE` is padded.

    Examples:
        >>> factorize(3072, 2), factorize(512, 2), factorize(7, 2), factorize(64, 3)
        ((32, 96), (16, 32), (2, 4), (4, 4, 4))
    """
    size = n
    while True:
        factors = _balanced(size, parts)
        if factors[-1] <= BALANCE * factors[0]:
            return factors
        size += 1


def padded_size(n: int, blocks: int) -> int:
    """The smallest multiple of `blocks` at least `n`."""
    return math.ceil(n / blocks) * blocks


def resolve_rank(rank: float, full: int, what: str) -> int:
    """A rank given as a number, or as a fraction of full.

    Args:
        rank: An int between 1 and `full`, or a float in (0, 1], rounded up.
        full: The largest rank that adds anything.
        what: What asked, for the message.

    Raises:
        ValueError: If the rank is below 1, above full, or not a number of either kind.

    Examples:
        >>> resolve_rank(3, 8, "LowRank"), resolve_rank(0.25, 10, "LowRank")
        (3, 3)
    """
    fraction = isinstance(rank, float)
    valid = 0 < rank <= 1 if fraction else 1 <= rank <= full
    if not valid:
        raise ValueError(
            f"{what}: rank {rank} is out of range; the full rank of this shape is {full}.\n"
            f"Give an int from 1 to {full}, or a fraction of full above 0.0 and up to 1.0."
        )
    return math.ceil(rank * full) if fraction else int(rank)


def resolve_blocks(blocks: float, m: int, n: int, what: str) -> int:
    """A number of equal blocks given as such, or as a fraction of full, `min(m, n)`.

    Args:
        blocks: An int of at least 1, or a float in (0, 1]: then the largest number of blocks that
            divides both sizes and is at most that fraction of full.
        m: Rows.
        n: Columns.
        what: What asked, for the message.

    Raises:
        ValueError: If the number is not of either kind.

    Examples:
        >>> resolve_blocks(4, 16, 64, "Monarch"), resolve_blocks(0.3, 24, 36, "Monarch")
        (4, 6)
    """
    fraction = isinstance(blocks, float)
    if not (0 < blocks <= 1 if fraction else blocks >= 1):
        raise ValueError(
            f"{what}: {blocks} is no number of blocks.\n"
            "Give an int of at least 1, or a fraction of full above 0.0 and up to 1.0."
        )
    if not fraction:
        return int(blocks)
    most = max(int(blocks * min(m, n)), 1)
    return max(b for b in range(1, most + 1) if m % b == 0 and n % b == 0)


def draw(A: Value, generator: torch.Generator | None = None) -> Value:
    """A value like `A` with Gaussian entries, scaled tensor by tensor as `fans(A)` says."""
    tensors = [
        torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) * fan.std
        for t, fan in zip(named_tensors(A).values(), fans(A), strict=True)
    ]
    return with_tensors(A, iter(tensors))


def _balanced(n: int, parts: int) -> tuple[int, ...]:
    """Hand each prime of `n`, ascending, to the smallest factor."""
    factors = [1] * parts
    prime = 2
    while n > 1:
        if prime * prime > n:
            prime = n
        while n % prime == 0:
            factors[factors.index(min(factors))] *= prime
            n //= prime
        prime += 1
    return tuple(sorted(factors))
