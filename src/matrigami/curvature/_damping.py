"""Damping: a multiple of the identity added to curvature, exactly or factor by factor.

Shapes: m, n = sizes of the left and right factor.
"""

from typing import Literal

from torch import Tensor

from matrigami.curvature._factors import plain
from matrigami.curvature._matrix import CurvatureMatrix, mapped
from matrigami.operators import LinearOperator, shift, trace
from matrigami.structures import KroneckerMatrix


def damped(
    F: CurvatureMatrix, damping: float, rule: Literal["tikhonov", "pi"] = "tikhonov"
) -> CurvatureMatrix:
    """Curvature plus damping, ready for `solve`, `inverse`, `power` and `logdet`.

    Args:
        F: A result of `kfac`, `ekfac` or `kfoc`.
        damping: A non-negative number.
        rule: `"tikhonov"`: `F + damping I`, exact, by the eigenpairs of the factors. `"pi"`:
            `(B + sqrt(damping) / pi I) (x) (A + pi sqrt(damping) I)` with
            `pi^2 = (tr A / n) / (tr B / m)`, which needs no eigenvalues (Martens and Grosse 2015,
            arXiv:1503.05671, section 6.3).

    Raises:
        ValueError: If the damping is negative, the rule unknown, or `"pi"` is asked of blocks that
            are no Kronecker products.

    Examples:
        >>> import torch
        >>> from matrigami.curvature import kfac
        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
        >>> F = kfac(model, torch.nn.MSELoss(), batch)
        >>> F.dense().diagonal(), damped(F, 0.5).dense().diagonal()
        (tensor([1., 1.]), tensor([1.5000, 1.5000]))
    """
    if rule not in ("tikhonov", "pi") or damping < 0:
        raise ValueError(
            f"damped(F, damping={damping}, rule={rule!r}): one of them is out of range.\n"
            "damping is a number of at least 0, rule 'tikhonov' or 'pi'."
        )
    if rule == "tikhonov":
        return shift(F, damping)  # pyright: ignore[reportReturnType]
    return mapped(F, lambda B: _factored(B, damping))


def _factored(block: LinearOperator, damping: float) -> KroneckerMatrix:
    """Damping shared between the factors in the ratio of their mean eigenvalues."""
    if not isinstance(block, KroneckerMatrix):
        raise ValueError(
            f"damped(F, rule='pi'): a block is a {type(block).__name__}.\n"
            "The rule splits the damping between Kronecker factors.\nUse rule='tikhonov'."
        )
    B, A = block.factors
    b, a = trace(B) / B.shape[-1], trace(A) / A.shape[-1]
    pi = _ratio(a, b)
    root = damping**0.5
    return KroneckerMatrix(plain(shift(B, root / pi)), plain(shift(A, root * pi)))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`sqrt(a / b)`, or 1 where a factor is zero."""
    usable = (a > 0) & (b > 0)
    return (a / b.where(usable, b.new_ones(()))).where(usable, a.new_ones(())).sqrt()
