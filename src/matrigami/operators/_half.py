"""Half precision: what factorises computes in single precision, and answers in the type that came.

LAPACK has no half precision, and its eight bits would not survive a factorisation.
"""

from typing import Any

import torch
from torch import Tensor

from matrigami.operators._base import LinearOperator, power
from matrigami.operators._eigen import cholesky, eigh, exp, norm, svd, svdvals
from matrigami.operators._functions import inverse, lstsq, pinv, slogdet, solve

HALF = (torch.float16, torch.bfloat16)

FACTORISING = (
    *(solve, lstsq, inverse, pinv, slogdet),
    *(norm, svd, svdvals, eigh, cholesky, power, exp),
)


def in_single(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any] | None:
    """The arguments in single precision, and the way back; None where they are not of half."""
    dtype = arguments[0].dtype
    if dtype not in HALF:
        return None
    single = tuple(_cast(a, dtype, torch.float32) for a in arguments)
    return single, lambda found: _cast(found, torch.float32, dtype)


def _cast(found: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    """Tensors and values of one type in another, alone or in a tuple; all else as it is."""
    if isinstance(found, Tensor | LinearOperator):
        return found.to(wanted) if found.dtype == given else found
    if not isinstance(found, tuple):
        return found
    parts = [_cast(part, given, wanted) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)


for function in FACTORISING:
    function.lift = in_single
