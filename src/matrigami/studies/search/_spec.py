"""A search as a TOML file: a study without structures, and what to search.

[search]
structures = ["einsum(0.5, 0, 0.5, 0, 0.5, 0.5, 0)"]   # these, and
samples = 20                                           # so many random ones
seed = 0
macs = [3e4, 1e5, 3e5]                                 # sizes, in multiply-adds
keep = [1.0, 0.5]                                      # shares that go on to the next size
"""

import itertools
import math
import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrigami.structures import Einsum, parse
from matrigami.studies._spec import canonical_structure, check_names, check_types

KEYS = ("structures", "samples", "seed", "macs", "keep")

QUARTERS = 4
"""Random exponents are multiples of 1 / 4: sizes of hidden layers have such factors."""


@dataclass(frozen=True)
class Search:
    """What to search and how.

    Attributes:
        name: Of the search.
        tables: The study without structures, as in its file.
        structures: The candidates, those that were named first.
        macs: The sizes of the models, ascending: multiply-adds of one forward pass of one example.
        keep: Shares of the candidates that go on to the next size.
        folder: What paths in the tables are relative to.
    """

    name: str
    tables: Mapping[str, Any]
    structures: tuple[str, ...]
    macs: tuple[float, ...]
    keep: tuple[float, ...]
    folder: str = ""


def load_search(path: str | Path) -> Search:
    """A search from its file.

    Raises:
        ValueError: If the file cannot be read, or an entry is unknown, missing or invalid.
    """
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"Search file {path}: it cannot be read: {error}.\n"
            "Give the path of a TOML file with a table [search]."
        ) from error
    options = _options(path, tables)
    named = [canonical_structure(text) for text in options.get("structures", [])]
    macs = tuple(sorted(float(x) for x in options.get("macs", [])))
    keep = tuple(float(x) for x in options.get("keep", [1.0] * (len(macs) - 1)))
    drawn = sampled(options.get("samples", 0), options.get("seed", 0), named)
    _check(path, (*named, *drawn), macs, keep)
    name = tables.get("study", {}).get("name", Path(path).stem)
    return Search(name, tables, (*named, *drawn), macs, keep, str(Path(path).resolve().parent))


def _options(path: Any, tables: dict[str, Any]) -> Mapping[str, Any]:
    """The table [search], taken out of a file; its entries are of their types."""
    options = tables.pop("search", None)
    if not isinstance(options, dict) or "structure" in tables:
        raise ValueError(
            f"Search file {path}: it has no table [search], or [[structure]].\n"
            f"It takes [study], one [task], [model], [train] and [search] with {', '.join(KEYS)}."
        )
    check_names(f"Search file {path}", "keys of [search]", options, KEYS)
    check_types(f"Search file {path}", "search", options)
    return options


def _check(
    path: Any, structures: tuple[str, ...], macs: tuple[float, ...], keep: tuple[float, ...]
) -> None:
    """Refuse what cannot be searched."""
    others = [text for text in structures if _exponents(text) is None]
    fits = len(keep) == len(macs) - 1 and all(0 < share <= 1 for share in keep)
    sizes = len(set(macs)) >= 3 and all(1 <= size < math.inf for size in macs)
    if others or len(structures) < 2 or not sizes or not fits:
        raise ValueError(
            f"Search file {path}: {len(structures)} structures, macs = {list(macs)}, "
            f"keep = {list(keep)}.\n"
            + (f"{others[0]} has no exponents.\n" if others else "These do not make a search.\n")
            + "It takes two structures einsum(...) with seven exponents or more, three sizes or "
            "more, from 1 on, and in keep a share above 0 and up to 1 between any two sizes."
        )


def _exponents(text: str) -> tuple[float, ...] | None:
    """The seven exponents of a candidate."""
    recipe = parse(text)
    return recipe.exponents if isinstance(recipe, Einsum) and recipe.theta is not None else None


def sampled(number: int, seed: int, without: list[str] | tuple[str, ...] = ()) -> list[str]:
    """Different random members of the family, on the lattice of quarters.

    Each has a rank up to full (`rho <= min(alpha, eps)`), and the order of its factors that the
    taxonomy assumes (`min(beta, delta) <= min(alpha, eps)`).

    Args:
        number: How many.
        seed: Of the draw.
        without: Structures to leave out.

    Raises:
        ValueError: If there are not so many.

    Examples:
        >>> sampled(2, seed=0) == sampled(2, seed=0), len(set(sampled(20, seed=1)))
        (True, 20)
    """
    rest = [text for text in _lattice() if text not in without]
    if not 0 <= number <= len(rest):
        raise ValueError(
            f"sampled({number}): the lattice of quarters has {len(rest)} others.\n"
            "Draw so many at most, and not below 0."
        )
    return random.Random(seed).sample(rest, number)


def _lattice() -> list[str]:
    """The members whose exponents are quarters."""
    steps = range(QUARTERS + 1)
    thirds = [t for t in itertools.product(steps, repeat=3) if sum(t) == QUARTERS]
    return [
        canonical_structure(f"einsum({', '.join(f'{x / QUARTERS:g}' for x in (*i, *o, rank))})")
        for i, o in itertools.product(thirds, repeat=2)
        for rank in steps
        if max(rank, min(i[1], o[0])) <= min(i[0], o[1])
    ]
