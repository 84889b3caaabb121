"""Layers whose weight is a structured matrix, what every layer is, and rates that suit them."""

from matrigami.nn import _transformers as _transformers  # registers its rules
from matrigami.nn._anatomy import (
    Entry,
    OneHot,
    Part,
    Parts,
    Role,
    Tap,
    Use,
    Whole,
    anatomy,
    parts,
    refusal,
    runs_as,
    unread,
)
from matrigami.nn._budget import cost_of, parsed_budget, under_budget
from matrigami.nn._called import called_with
from matrigami.nn._candidates import hopeful
from matrigami.nn._choice import Patterns, chosen, matching, matrix_view
from matrigami.nn._experts import StructuredMoE
from matrigami.nn._layers import affine, scale_and_shift, weight_part
from matrigami.nn._linear import StructuredLinear
from matrigami.nn._mixture import Mixture, Routing, RoutingLosses, routing_loss
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
from matrigami.nn._separate import SeparateAttention, SeparateExperts, separate_, separated
from matrigami.nn._stand_in import StructuredConv, dense_of, stand_in, swap
from matrigami.nn._surgery import Exchange, Exchanges, replace_, to_dense_
from matrigami.nn._taps import linear_use
from matrigami.nn._uses import Uses, uses

__all__ = [
    "Entry",
    "Exchange",
    "Exchanges",
    "Mixture",
    "Norm",
    "OneHot",
    "Part",
    "Parts",
    "Patterns",
    "Role",
    "Routing",
    "RoutingLosses",
    "Rule",
    "SeparateAttention",
    "SeparateExperts",
    "StructuredConv",
    "StructuredLinear",
    "StructuredMoE",
    "Tap",
    "Use",
    "Uses",
    "Whole",
    "adam_rule",
    "affine",
    "anatomy",
    "called_with",
    "chosen",
    "coordinate_check",
    "coordinate_slope",
    "cost_of",
    "dense_of",
    "hopeful",
    "linear_use",
    "matching",
    "matrix_view",
    "param_groups",
    "parsed_budget",
    "parts",
    "refusal",
    "replace_",
    "routing_loss",
    "runs_as",
    "scale_and_shift",
    "separate_",
    "separated",
    "sgd_rule",
    "spectral_rule",
    "stand_in",
    "swap",
    "to_dense_",
    "under_budget",
    "unread",
    "uses",
    "weight_part",
]
