"""The approximations of curvature that are known by name: on the command line, and to the laws."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from matrigami.curvature._ekfac import ekfac
from matrigami.curvature._kfac import kfac
from matrigami.curvature._kfoc import kfoc
from matrigami.curvature._matrix import CurvatureMatrix


class Approximation(NamedTuple):
    """A way to approximate the Fisher matrix of a model, block by block.

    Args:
        make: Called as `kfac` is: with model, loss and data, and `labels`, `reduce`, `joint` and
            `seed` by name.
        keeps_trace: Each block has the trace of that of the Fisher matrix.
        is_exact_for_one: The block of a single example without shared positions is that of the
            Fisher matrix.

    Examples:
        >>> APPROXIMATIONS["ekfac"].keeps_trace
        True
    """

    make: Callable[..., CurvatureMatrix]
    keeps_trace: bool = False
    is_exact_for_one: bool = True


APPROXIMATIONS = {
    "kfac": Approximation(kfac),
    "ekfac": Approximation(ekfac, keeps_trace=True),
    "kfoc": Approximation(kfoc),
    "kfoc+ec": Approximation(partial(ekfac, basis=kfoc), keeps_trace=True),
}
"""By name; `matrigami.testing.check_curvature` and `matrigami curvature` walk over it."""
