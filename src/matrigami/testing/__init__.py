"""The law suites: what a matrix, a structure, a layer, an optimiser has to obey, ours and yours."""

from matrigami.testing._layer_laws import LAYER_LAWS, check_layer
from matrigami.testing._optimizer_suite import OPTIMIZER_LAWS, check_optimizer
from matrigami.testing._structure_laws import STRUCTURE_LAWS
from matrigami.testing._suite import (
    LAWS,
    OPERATOR_LAWS,
    SIZES,
    Size,
    check_operator,
    check_structure,
)

__all__ = [
    "LAWS",
    "LAYER_LAWS",
    "OPERATOR_LAWS",
    "OPTIMIZER_LAWS",
    "SIZES",
    "STRUCTURE_LAWS",
    "Size",
    "check_layer",
    "check_operator",
    "check_optimizer",
    "check_structure",
]
