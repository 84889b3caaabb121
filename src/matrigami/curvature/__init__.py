"""Curvature of training losses as matrices of the same algebra."""

from matrigami.curvature._ggn import GaussNewtonMatrix, fisher, ggn
from matrigami.curvature._hessian import HessianMatrix, hessian
from matrigami.curvature._objective import Objective

__all__ = ["GaussNewtonMatrix", "HessianMatrix", "Objective", "fisher", "ggn", "hessian"]
