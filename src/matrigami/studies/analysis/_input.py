"""What is refused before any work: each message says what was asked, what was got, what to do."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matrigami._words import nearest
from matrigami.operators import LinearOperator, dense, free_memory
from matrigami.studies.analysis._result import ROUNDING

COPIES = 24
"""Matrices of the size of the one under analysis that are held at once: orders, places, factors."""


def checked_matrix(A: Any, budget: float, draws: int) -> Float[Tensor, "m n"]:
    """The matrix in double precision.

    Raises:
        ValueError: If it is none, is not finite or zero, or does not fit; or an option is out of
            range.
    """
    if not 0 < budget <= 1 or draws < 2:
        raise ValueError(
            f"analyze(A, budget={budget}, draws={draws}): out of range.\n"
            "The budget is a fraction of the dense storage; a deviation needs two draws.\n"
            "Give a budget in (0, 1], and at least 2 draws."
        )
    if isinstance(A, LinearOperator):
        A = dense(A, "analyze")
    if not isinstance(A, Tensor | np.ndarray | list | tuple):
        raise TypeError(
            f"analyze(A): A is a {type(A).__name__}.\nGive a tensor, an array or a value; the path "
            "of a file goes to `matrigami analyze`."
        )
    W = torch.as_tensor(A).detach()
    if W.ndim != 2 or W.shape[0] < 2 or W.shape[1] < 2 or W.is_complex():
        raise ValueError(
            f"analyze(A): A is {'a complex' if W.is_complex() else 'an'} array of shape "
            f"{tuple(W.shape)}.\n"
            "A real matrix of at least 2 x 2 was expected.\n"
            "Analyse one matrix of a stack at a time; reshape a kernel to (output, inputs)."
        )
    check_memory(*W.shape)
    W = W.to("cpu", torch.float64)
    bad = int((~W.isfinite()).sum())
    if bad or not W.any():
        raise ValueError(
            f"analyze(A): {bad} of {W.numel()} entries of A are NaN or infinite."
            f"{'' if bad else ' All are zero.'}\n"
            "No structure is near to such a matrix, or all are.\n"
            "Find where they come from: torch.isfinite(A).logical_not().nonzero()."
        )
    return W


def rounding_of(A: Any) -> float:
    """The relative error that the type of the entries makes, at least that of single precision."""
    kind = A.dtype if isinstance(A, Tensor | np.ndarray | LinearOperator) else None
    kind = torch.from_numpy(np.empty(0, kind)).dtype if isinstance(kind, np.dtype) else kind
    unit = torch.finfo(kind).eps / 2 if kind is not None and kind.is_floating_point else 0.0
    return max(unit, ROUNDING)


def check_memory(m: int, n: int) -> None:
    """Refuse a matrix whose analysis would not fit.

    Raises:
        ValueError: If it would not.
    """
    wanted, free = COPIES * 8 * m * n, free_memory("cpu")
    if wanted > free:
        raise ValueError(
            f"analyze(A): A is {m}x{n}; its analysis takes about {wanted / 2**30:.1f} GiB.\n"
            f"About {free / 2**30:.1f} GiB are free.\n"
            "Analyse a corner of it: A[:1024, :1024]; on the command line --largest 1024."
        )


def check_names(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse an unknown name, and an empty list.

    Raises:
        ValueError: If there is one.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(
                f"analyze(A, {what}=...): {name!r}: "
                f"known are {', '.join(known)}.\n"
                f"Did you mean {near!r}?"
            )


def point_pair(points: Any, A: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor] | None:
    """Coordinates of rows and of columns, in double precision.

    Raises:
        ValueError: If there are not as many as rows and columns, or they are not finite.
    """
    if points is None:
        return None
    pair = points if isinstance(points, tuple) else (points, points)
    clouds = [torch.as_tensor(p).detach().cpu().to(torch.float64) for p in pair]
    clouds = [p[:, None] if p.ndim == 1 else p for p in clouds]
    fits = all(p.ndim == 2 and len(p) == k for p, k in zip(clouds, A.shape, strict=True))
    if not fits or not all(bool(p.isfinite().all()) for p in clouds):
        raise ValueError(
            f"analyze(A, points=...): points of shape {[tuple(p.shape) for p in clouds]} for a "
            f"{A.shape[0]}x{A.shape[1]} matrix.\n"
            "Each row and each column has one point of finite coordinates.\n"
            "Give (n, d) for a square matrix, or a pair (m, d), (n, d)."
        )
    return clouds[0], clouds[1]
