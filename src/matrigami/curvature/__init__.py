"""Curvature of training losses as matrices of the same algebra."""

from matrigami.curvature._analysis import BlockErrors, compare, dense_block, positions
from matrigami.curvature._approximations import APPROXIMATIONS, Approximation
from matrigami.curvature._capture import Capture, Moments, capture
from matrigami.curvature._damping import damped
from matrigami.curvature._ekfac import ekfac
from matrigami.curvature._estimator import FactorPair, FisherEstimator
from matrigami.curvature._ggn import GaussNewtonMatrix, fisher, ggn
from matrigami.curvature._hessian import HessianMatrix, hessian
from matrigami.curvature._influence import influence
from matrigami.curvature._input_estimator import InputEstimator
from matrigami.curvature._kfac import kfac
from matrigami.curvature._kfoc import kfoc
from matrigami.curvature._laplace import LaplacePosterior, Prediction, laplace
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._objective import Objective
from matrigami.curvature._watch import ModelWatch

__all__ = [
    "APPROXIMATIONS",
    "Approximation",
    "BlockErrors",
    "Capture",
    "CurvatureMatrix",
    "FactorPair",
    "FisherEstimator",
    "GaussNewtonMatrix",
    "HessianMatrix",
    "InputEstimator",
    "LaplacePosterior",
    "ModelWatch",
    "Moments",
    "Objective",
    "Prediction",
    "capture",
    "compare",
    "damped",
    "dense_block",
    "ekfac",
    "fisher",
    "ggn",
    "hessian",
    "influence",
    "kfac",
    "kfoc",
    "laplace",
    "positions",
]
