"""Layers whose weight is a structured matrix, and learning rates that suit them."""

from matrigami.nn._linear import StructuredLinear
from matrigami.nn._scaling import (
    adam_rule,
    coordinate_check,
    coordinate_slope,
    param_groups,
    sgd_rule,
)

__all__ = [
    "StructuredLinear",
    "adam_rule",
    "coordinate_check",
    "coordinate_slope",
    "param_groups",
    "sgd_rule",
]
