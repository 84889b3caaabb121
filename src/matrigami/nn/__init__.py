"""Layers whose weight is a structured matrix, and learning rates that suit them."""

from matrigami.nn._linear import StructuredLinear
from matrigami.nn._scaling import (
    Norm,
    Rule,
    adam_rule,
    coordinate_check,
    coordinate_slope,
    param_groups,
    sgd_rule,
    spectral_rule,
)

__all__ = [
    "Norm",
    "Rule",
    "StructuredLinear",
    "adam_rule",
    "coordinate_check",
    "coordinate_slope",
    "param_groups",
    "sgd_rule",
    "spectral_rule",
]
