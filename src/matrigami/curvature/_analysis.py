"""How far approximations of curvature are from the exact matrix, block by block.

Shapes: p = parameters in all, d = parameters of a block, k = columns.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.operators import LinearOperator

RIGHT_SIDES = 8
"""Random right-hand sides of the solve error."""

COLUMNS = 64
"""Columns of the exact matrix that are made at once."""


class BlockErrors(NamedTuple):
    """Relative errors of one approximation of one block.

    Args:
        block: Names of its parameters.
        size: Their number.
        approximation: Which one.
        trace: Its trace divided by that of the exact block.
        frobenius: `||F - G||_F / ||G||_F`.
        spectral: `||F - G||_2 / ||G||_2`.
        solve: `||(F + c I)^-1 R - (G + c I)^-1 R||_F / ||(G + c I)^-1 R||_F` for random `R`.
    """

    block: tuple[str, ...]
    size: int
    approximation: str
    trace: float
    frobenius: float
    spectral: float
    solve: float


def compare(
    exact: LinearOperator,
    approximations: Mapping[str, CurvatureMatrix],
    *,
    damping: float | None = None,
    largest: int = 2048,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[BlockErrors]:
    """Errors of approximations on every block of parameters that is small enough to be made dense.

    A block is that of all numbers of its parameters: what an approximation leaves out between the
    small blocks of a structured tensor counts as an error.

    Args:
        exact: `ggn`, `fisher` or `hessian` of the same model and data.
        approximations: By name, such as `{"kfac": kfac(...), "kfoc": kfoc(...)}`.
        damping: The number `c` in the solve error; by default a tenth of the mean eigenvalue of the
            exact block.
        largest: Blocks with more parameters are left out, for the exact block has the square of
            that many entries.
        seed: Of the right-hand sides.
        progress: Called with the number of columns of exact blocks that are done, and in all.

    Returns:
        One entry for each block and approximation; blocks in the order of the first one.

    Raises:
        ValueError: If sizes or blocks differ, or nothing was given.

    Examples:
        >>> from torch import nn
        >>> from matrigami.curvature import ggn, kfac
        >>> model, batch = nn.Linear(2, 2, bias=False), (torch.eye(2), torch.zeros(2, 2))
        >>> args = (model, nn.MSELoss(), batch)
        >>> found = compare(ggn(*args), {"kfac": kfac(*args)})
        >>> found[0].block, round(found[0].frobenius, 6)
        (('weight',), 0.0)
    """
    _check(exact, approximations)
    first = next(iter(approximations.values()))
    chosen = {names: at for names, at in positions(first).items() if len(at) <= largest}
    where = {name: positions(F) for name, F in approximations.items()}
    found, done, total = [], 0, sum(map(len, chosen.values()))
    for names, places in chosen.items():
        D = dense_block(exact, places)
        mean = float(D.diagonal().mean())
        c = 0.1 * mean if damping is None else damping
        generator = torch.Generator().manual_seed(seed)
        R = torch.randn(len(places), RIGHT_SIDES, generator=generator, dtype=torch.float64)
        R = R.to(dtype=D.dtype, device=D.device)
        for name, F in approximations.items():
            E = dense_block(F, where[name][names])
            found.append(BlockErrors(names, len(places), name, *_errors(E, D, R, c)))
        done += len(places)
        if progress is not None:
            progress(done, total)
    return found


def positions(F: CurvatureMatrix) -> dict[tuple[str, ...], Tensor]:
    """Where the parameters of each block are in the vector of all."""
    starts, start = {}, 0
    for name, shape in F.sizes.items():
        starts[name] = torch.arange(start, start + math.prod(shape))
        start += math.prod(shape)
    return {names: torch.cat([starts[name] for name in names]) for names in F.names}


def dense_block(A: LinearOperator, places: Tensor) -> Float[Tensor, "d d"]:
    """Some rows and the same columns of an operator, by products with unit vectors."""
    columns = []
    for some in places.split(COLUMNS):
        E = torch.zeros(A.shape[-1], len(some), dtype=A.dtype, device=A.device)
        E[some, torch.arange(len(some))] = 1.0
        columns.append(A.matmat(E)[places])
    return torch.cat(columns, -1)


def _errors(
    E: Float[Tensor, "d d"], D: Float[Tensor, "d d"], R: Float[Tensor, "d k"], damping: float
) -> tuple[float, float, float, float]:
    """Trace ratio, Frobenius, spectral and solve error; NaN relative to nothing."""
    eye = torch.eye(len(D), dtype=D.dtype, device=D.device)

    def relative(error: Tensor, whole: Tensor) -> float:
        """A ratio."""
        return float(error / whole) if float(whole) > 0 else math.nan

    norm = torch.linalg.matrix_norm
    solved, wanted = (
        (torch.linalg.solve(M + damping * eye, R) for M in (E, D))
        if damping
        else (torch.linalg.pinv(M, hermitian=True) @ R for M in (E, D))
    )
    return (
        relative(E.trace(), D.trace()),
        relative(norm(E - D), norm(D)),
        relative(norm(E - D, 2), norm(D, 2)),
        relative(norm(solved - wanted), norm(wanted)),
    )


def _check(exact: LinearOperator, approximations: Mapping[str, CurvatureMatrix]) -> None:
    """All must be of one size, with the same blocks."""
    if not approximations:
        raise ValueError(
            "compare(exact, {}): there are no approximations.\nGive at least one, by its name."
        )
    first = next(iter(approximations.values()))
    for name, F in approximations.items():
        if F.shape != exact.shape[-2:] or set(F.names) != set(first.names):
            raise ValueError(
                f"compare(exact, approximations): {name} is a {F!r} with {len(F.names)} blocks.\n"
                f"The exact matrix is {exact!r}, the first approximation has "
                f"{len(first.names)} blocks.\n"
                "Make them of the same model, with the same `joint`."
            )
